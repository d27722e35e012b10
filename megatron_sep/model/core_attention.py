"""megatron-core's core attention, computed by Sep-Attention under the plan of its layer."""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_sep.attention.context import ContextPlan
from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.config.position import SelfAdjustingConfig
from megatron_sep.kernels.sep_attention import check_fit
from megatron_sep.kernels.sep_attention.scores import DistanceBias
from megatron_sep.model.operations import Operations
from megatron_sep.model.recompute import recomputed
from megatron_sep.parallel.exchange import gather_keys


class SepCoreAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k^T / sqrt(d) under the layer's plan) v (arXiv 2412.12094, eq. 1 and 2).

    The scores may fall with the distance (ALiBi), the softmax may be the self-adjusting one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        operations: Operations,
        context_group: dist.ProcessGroup | None = None,
        recompute: bool = False,
        attention_dropout: float | None = None,
        adjusting: SelfAdjustingConfig | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = 1 / math.sqrt(config.kv_channels)
        self._adjusting = {} if adjusting is None else {"adjusting": adjusting}
        self.full_attention, self.sep_attention = operations.full_attention, operations.sep_attention
        self.context_group, self.recompute = context_group, recompute

    def forward(
        self,
        q_SBHD: Tensor,
        k_SBHD: Tensor,
        v_SBHD: Tensor,
        attention_mask: MaskPlan | ContextPlan,
        attention_bias: DistanceBias | None = None,
        **_: Any,
    ) -> Tensor:
        """``attention_mask`` is the layer's plan; returns [S, B, H * D]."""
        if isinstance(attention_mask, ContextPlan) or (self.recompute and self.training):
            attended: Tensor = self._attend_apart(q_SBHD, k_SBHD, v_SBHD, attention_mask, attention_bias)
            return attended
        return self._attend(q_SBHD, k_SBHD, v_SBHD, attention_mask, attention_bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _attend_apart(
        self,
        q_SBHD: Tensor,
        k_SBHD: Tensor,
        v_SBHD: Tensor,
        plan: MaskPlan | ContextPlan,
        bias: DistanceBias | None,
    ) -> Tensor:
        """What a layer is not compiled with: a recomputation of its own, and keys that differ in number each time."""
        attend = self._attend_with_others if isinstance(plan, ContextPlan) else self._attend
        if self.recompute and self.training:
            return recomputed(attend, q_SBHD, k_SBHD, v_SBHD, plan, bias)
        return attend(q_SBHD, k_SBHD, v_SBHD, plan, bias)  # type: ignore[arg-type]

    def _attend_with_others(
        self, q_SBHD: Tensor, k_SBHD: Tensor, v_SBHD: Tensor, plan: ContextPlan, bias: DistanceBias | None
    ) -> Tensor:
        """This rank's queries over its own keys and those that it needs of the other context-parallel ranks."""
        k, v = gather_keys(k_SBHD, v_SBHD, plan.route, self.context_group)
        chunks = zip(q_SBHD.chunk(len(plan.parts)), plan.parts, strict=True)
        return torch.cat([self._attend(q, k[: part.num_keys], v[: part.num_keys], part, bias) for q, part in chunks])

    def _attend(
        self, q_SBHD: Tensor, k_SBHD: Tensor, v_SBHD: Tensor, plan: MaskPlan, bias: DistanceBias | None
    ) -> Tensor:
        q_BHSD, k_BHSD, v_BHSD = (t.permute(1, 2, 0, 3) for t in (q_SBHD, k_SBHD, v_SBHD))
        check_fit(q_BHSD, k_BHSD, v_BHSD, plan, bias)
        more: dict[str, Any] = self._adjusting | ({} if bias is None else {"bias": bias})
        attend = self.full_attention if plan.causal else self.sep_attention
        if self.training and self.dropout > 0:
            with tensor_parallel.get_cuda_rng_tracker().fork():  # heads differ between tensor-parallel ranks
                o_BHSD = attend(q_BHSD, k_BHSD, v_BHSD, plan, self.scale, self.dropout, **more)
        else:
            o_BHSD = attend(q_BHSD, k_BHSD, v_BHSD, plan, self.scale, **more)
        return o_BHSD.permute(2, 0, 1, 3).flatten(2)
