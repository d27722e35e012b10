"""megatron-core's core attention, computed by Sep-Attention under the plan of its layer."""

import math
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.config.position import SelfAdjustingConfig
from megatron_sep.kernels.sep_attention import check_fit
from megatron_sep.kernels.sep_attention.scores import DistanceBias
from megatron_sep.model.operations import Operations


class SepCoreAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k^T / sqrt(d) under the layer's plan) v (arXiv 2412.12094, eq. 1 and 2).

    The scores may fall with the distance (ALiBi), the softmax may be the self-adjusting one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        operations: Operations,
        attention_dropout: float | None = None,
        adjusting: SelfAdjustingConfig | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = 1 / math.sqrt(config.kv_channels)
        self._adjusting = {} if adjusting is None else {"adjusting": adjusting}
        self.full_attention, self.sep_attention = operations.full_attention, operations.sep_attention

    def forward(
        self,
        q_SBHD: Tensor,
        k_SBHD: Tensor,
        v_SBHD: Tensor,
        attention_mask: MaskPlan,
        attention_bias: DistanceBias | None = None,
        **_: Any,
    ) -> Tensor:
        """``attention_mask`` is the layer's plan; returns [S, B, H * D]."""
        q_BHSD, k_BHSD, v_BHSD = (t.permute(1, 2, 0, 3) for t in (q_SBHD, k_SBHD, v_SBHD))
        check_fit(q_BHSD, k_BHSD, v_BHSD, attention_mask, attention_bias)
        more: dict[str, Any] = self._adjusting | ({} if attention_bias is None else {"bias": attention_bias})
        attend = self.full_attention if attention_mask.causal else self.sep_attention
        if self.training and self.dropout > 0:
            with tensor_parallel.get_cuda_rng_tracker().fork():  # heads differ between tensor-parallel ranks
                o_BHSD = attend(q_BHSD, k_BHSD, v_BHSD, attention_mask, self.scale, self.dropout, **more)
        else:
            o_BHSD = attend(q_BHSD, k_BHSD, v_BHSD, attention_mask, self.scale, **more)
        return o_BHSD.permute(2, 0, 1, 3).flatten(2)
