"""The operations of a model: each resolved once, when the model is built, and handed down from there."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch

from megatron_sep.config.schema import ModelConfig
from megatron_sep.kernels import registry, why_not
from megatron_sep.kernels.adamw import AdamW
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.cross_entropy import TokenLosses
from megatron_sep.kernels.gelu import BiasGelu
from megatron_sep.kernels.norm import MakeNorm, OpenResidual
from megatron_sep.kernels.operation import BackendError, Implementation, Operation, always, on_cuda
from megatron_sep.kernels.rotary import SplitRotated
from megatron_sep.kernels.sep_attention import Attention

_MEGATRON = "megatron_sep.model.split_vocabulary"
_loss = partial(Implementation, benchmark="tools/bench_operations.py", tests="tests/model/test_operations.py")
SPLIT_VOCABULARY = (
    _loss("triton_split", f"{_MEGATRON}:triton_token_losses", why_not.fused_rows, on_cuda),
    _loss("megatron_fused", f"{_MEGATRON}:fused_token_losses", why_not.bf16_gradient, on_cuda),
    _loss("megatron", f"{_MEGATRON}:token_losses", why_not.nothing, always),
)
"""Further rows of ``cross_entropy``: megatron-core's, for a vocabulary that the tensor-parallel ranks share."""


@dataclass(frozen=True)
class Operations:
    """What computes a model, whose layers and engine look nothing up themselves."""

    full_attention: Attention
    sep_attention: Attention
    norm: MakeNorm
    open_residual: OpenResidual
    split_rotated: SplitRotated
    bias_gelu: BiasGelu
    token_losses: TokenLosses
    adamw: AdamW


def operations_table() -> Mapping[str, Operation]:
    """The registry with the rows that need megatron-core."""
    table = registry.OPERATIONS
    return table | {"cross_entropy": table["cross_entropy"].with_rows(*SPLIT_VOCABULARY)}


def training_call(model: ModelConfig, device: torch.device, dtype: torch.dtype, tensor_parallel: int) -> Call:
    """All that the operations of a model in training will be called with."""
    return Call.on(
        device,
        dtype,
        head_size=model.head_size,
        dropout=model.attention_dropout > 0,
        biased=not model.position.rotates,
        adjusting=model.self_adjusting_softmax is not None,
        training=True,
        tensor_parallel=tensor_parallel,
    )


def resolve(call: Call, norm: str, backends: Mapping[str, str]) -> Operations:
    """Choose and import everything for a model: ``call`` says what it will compute, ``norm`` which norm it has.

    ``backends``: rows by operation; auto where none is named. Raises BackendError.
    """
    table = operations_table()
    unknown = ", ".join(sorted(backends.keys() - table.keys()))
    if unknown:
        raise BackendError(f"there is no operation {unknown}; name some of {', '.join(table)}")
    backends = _with_its_norm(norm, backends)
    operation_of = {field.name: field.name for field in fields(Operations)} | {
        "norm": norm,
        "token_losses": "cross_entropy",
    }
    return Operations(
        **{
            field: table[operation].resolve(call, backends.get(operation, "auto"))
            for field, operation in operation_of.items()
        }
    )


def _with_its_norm(norm: str, backends: Mapping[str, str]) -> Mapping[str, str]:
    """A fused ``open_residual`` computes the norms itself, so it goes with the fused norm. Raises BackendError."""
    if backends.get(norm, "auto") in ("auto", "triton"):
        return backends
    if backends.get("open_residual", "auto") in ("auto", "reference"):
        return {**backends, "open_residual": "reference"}
    raise BackendError(
        f"open_residual={backends['open_residual']} computes the norms itself, so {norm}={backends[norm]} would not be "
        f"used: leave one of the two out, or set {norm} to triton"
    )
