"""Sep-Attention through a dense mask: slow, O(Q T) memory, the truth that the other implementations are held to."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.kernels.grouped import is_grouped


def reference_attention(
    q_BHQD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, plan: MaskPlan, scale: float, dropout: float = 0.0
) -> Tensor:
    """torch's attention under ``plan.dense()``: [B, H, Q, D]."""
    return scaled_dot_product_attention(
        q_BHQD,
        k_BHTD,
        v_BHTD,
        attn_mask=plan.dense()[:, None],
        dropout_p=dropout,
        scale=scale,
        enable_gqa=is_grouped(q_BHQD, k_BHTD),
    )
