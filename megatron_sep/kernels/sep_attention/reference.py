"""Sep-Attention through a dense mask: slow, O(Q T) memory, the truth that the other implementations are held to."""

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.config.position import SelfAdjustingConfig
from megatron_sep.kernels.grouped import is_grouped
from megatron_sep.kernels.sep_attention.scores import DistanceBias, weights


def reference_attention(
    q_BHQD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    plan: MaskPlan,
    scale: float,
    dropout: float = 0.0,
    *,
    bias: DistanceBias | None = None,
    adjusting: SelfAdjustingConfig | None = None,
) -> Tensor:
    """torch's attention under ``plan.dense()``, or written out where scores go through more: [B, H, Q, D]."""
    if bias is None and adjusting is None:
        return scaled_dot_product_attention(
            q_BHQD,
            k_BHTD,
            v_BHTD,
            attn_mask=plan.dense()[:, None],
            dropout_p=dropout,
            scale=scale,
            enable_gqa=is_grouped(q_BHQD, k_BHTD),
        )
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    group = q_BHQD.shape[1] // k_BHTD.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, 1) for x in (k_BHTD, v_BHTD))
    scores_BHQT = q_BHQD.to(wide) @ k.mT * scale
    if bias is not None:
        scores_BHQT = scores_BHQT + bias.dense(plan)
    shares_BHQT = weights(scores_BHQT, plan.dense()[:, None], adjusting)
    return (drop(shares_BHQT, dropout) @ v).to(q_BHQD.dtype)
