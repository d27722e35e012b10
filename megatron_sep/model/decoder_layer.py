"""The decoder layer for megatron-core's GPTModel: parallel or sequential residual, LayerNorm with bias or RMSNorm."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from torch.nn.functional import dropout

from megatron_sep.attention.context import ContextPlan
from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.config.position import SelfAdjustingConfig
from megatron_sep.config.schema import Recompute
from megatron_sep.kernels.norm import MakeNorm
from megatron_sep.model.branches import SelfAttention, transform
from megatron_sep.model.core_attention import SepCoreAttention
from megatron_sep.model.operations import Operations
from megatron_sep.model.positions import Told
from megatron_sep.model.recompute import recomputed
from megatron_sep.parallel.core_versions import mlp_spec

Plan: TypeAlias = MaskPlan | ContextPlan
_COMPILATIONS = 64
"""The most of one layer: each window of an annealing has its own, in training and in validation."""


class Norm:
    """Makes a norm where megatron-core builds its own, and marks it as megatron-core does."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float, make: MakeNorm, **_: Any
    ) -> torch.nn.Module:
        norm = make(hidden_size, eps, config.params_dtype)
        for parameter in norm.parameters():  # tells it to sum these gradients over the tensor-parallel ranks
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class RowLinear(tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """megatron-core's row-parallel matrix product, told its group.

    Left to itself it passes None on, and the warning about that is a break in the compiled layer. ``biases``: in place
    of megatron-core's one setting for a whole model.
    """

    _forward_impl: Callable[..., Tensor]

    def __init__(self, *args: Any, biases: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"bias": biases})
        self._multiply: Callable[..., Tensor] = self._forward_impl
        self._forward_impl = self._multiply_in_group

    def _multiply_in_group(self, **arguments: Any) -> Tensor:
        return self._multiply(**arguments | {"tp_group": self.tp_group})


class ColumnLinear(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """megatron-core's column-parallel matrix product, with ``biases`` in place of its one setting for a whole model."""

    def __init__(self, *args: Any, biases: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"bias": biases})


class DecoderLayer(TransformerLayer):  # type: ignore[misc]
    """x + attention(ln1(x)) + mlp(ln2(x)) (arXiv 2204.06745, section 2.1), or the MLP after the attention."""

    def __init__(
        self,
        *args: Any,
        operations: Operations,
        parallel_residual: bool,
        recompute: bool,
        compiled: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.open_residual, self.bias_gelu = operations.open_residual, operations.bias_gelu
        self.recompute = recompute
        residual = self._parallel_residual if parallel_residual else self._sequential_residual
        self.residual: Callable[..., Tensor] = _compiled(residual) if compiled else residual

    def forward(
        self, hidden_states: Tensor, attention_mask: Sequence[Plan], rotary_pos_emb: Told = None, **_: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [S, B, hidden]; attention_mask holds the plan of every layer of the whole model.

        rotary_pos_emb is what ``Positions`` tells.
        """
        plan = attention_mask[self.layer_number - 1]  # outside the compiled part, which all layers share
        if self.recompute and self.training:
            return recomputed(self.residual, hidden_states, plan, rotary_pos_emb), None
        return self.residual(hidden_states, plan, rotary_pos_emb), None

    def _parallel_residual(self, x: Tensor, plan: Plan, told: Told) -> Tensor:
        (normal, other), stream = self._open(x, (self.input_layernorm, self.pre_mlp_layernorm), self._both)
        attended = self._branch(self.self_attention(normal, attention_mask=plan, rotary_pos_emb=told))
        return stream + attended + self._branch(transform(self.mlp, self.bias_gelu, other))

    def _sequential_residual(self, x: Tensor, plan: Plan, told: Told) -> Tensor:
        (normal,), stream = self._open(x, (self.input_layernorm,), self._both[:1])
        x = stream + self._branch(self.self_attention(normal, attention_mask=plan, rotary_pos_emb=told))
        (normal,), stream = self._open(x, (self.pre_mlp_layernorm,), self._both[1:])
        return stream + self._branch(transform(self.mlp, self.bias_gelu, normal))

    @property
    def _both(self) -> tuple[RowLinear, RowLinear]:
        """The matrix products that write to the residual stream."""
        return self.self_attention.linear_proj, self.mlp.linear_fc2

    def _open(
        self, x: Tensor, norms: Sequence[torch.nn.Module], writers: Sequence[RowLinear]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The norms of x, and x with the biases of what will be added, unless dropout falls on them too."""
        biases = [] if self.hidden_dropout else [writer.bias for writer in writers if writer.bias is not None]
        return self.open_residual(x, norms, biases)

    def _branch(self, output_with_bias: tuple[Tensor, Tensor | None]) -> Tensor:
        """What a branch adds to the stream that ``_open`` gave."""
        output, bias = output_with_bias
        if not self.hidden_dropout:
            return output
        return dropout(output if bias is None else output + bias, self.hidden_dropout, self.training)


def _compiled(residual: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """All layers share their compilations; after torch's own limit of 8 they would go on uncompiled."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _COMPILATIONS)
    return torch.compile(residual, dynamic=False)


def decoder_block(
    *,
    num_layers: int,
    operations: Operations,
    parallel_residual: bool,
    recompute: Recompute,
    compiled: bool,
    context_group: dist.ProcessGroup | None,
    biases: bool = True,
    mlp_biases: bool = True,
    adjusting: SelfAdjustingConfig | None = None,
    growth: float = 1.0,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm, for GPTModel."""
    spec: ModuleSpec = get_gpt_layer_local_spec()
    spec.module = DecoderLayer
    spec.params = {
        "operations": operations,
        "parallel_residual": parallel_residual,
        "recompute": recompute is True,
        "compiled": compiled,
    }
    norm = ModuleSpec(module=Norm, params={"make": operations.norm})
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    parts.self_attention.submodules.core_attention = ModuleSpec(
        module=SepCoreAttention,
        params={
            "operations": operations,
            "context_group": context_group,
            "recompute": recompute == "selective",
            "adjusting": adjusting,
        },
    )
    attention = parts.self_attention
    attention.module = SelfAttention
    attention.params |= {"split_rotated": operations.split_rotated, "growth": growth}
    attention.submodules.linear_qkv = ModuleSpec(module=ColumnLinear, params={"biases": biases})
    attention.submodules.linear_proj = ModuleSpec(module=RowLinear, params={"biases": biases})
    products = MLPSubmodules(
        linear_fc1=ModuleSpec(module=ColumnLinear, params={"biases": mlp_biases}),
        linear_fc2=ModuleSpec(module=RowLinear, params={"biases": mlp_biases}),
    )
    parts.mlp = mlp_spec(products)
    parts.sharded_state_dict_keys_map = {}
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)
