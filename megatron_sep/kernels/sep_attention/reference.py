"""Sep-Attention through a dense mask: slow, O(S^2) memory, the truth that the other implementations are held to."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_sep.attention.pattern import MaskPlan


def reference_attention(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, plan: MaskPlan, scale: float, dropout: float = 0.0
) -> Tensor:
    """torch's attention under ``plan.dense()``: [B, H, S, D]."""
    return scaled_dot_product_attention(
        q_BHSD,
        k_BHSD,
        v_BHSD,
        attn_mask=plan.dense()[:, None],
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q_BHSD.shape[1] != k_BHSD.shape[1],
    )
