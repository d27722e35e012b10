"""Full causal attention through the fastest of torch's kernels that can run the inputs."""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.kernels.grouped import is_grouped

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def causal_attention(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, _plan: MaskPlan, scale: float, dropout: float = 0.0
) -> Tensor:
    """Every query sees every earlier key: [B, H, S, D]. The plan is ``causal`` and has nothing to add."""
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
        return scaled_dot_product_attention(
            q_BHSD,
            k_BHSD,
            v_BHSD,
            dropout_p=dropout,
            is_causal=True,
            scale=scale,
            enable_gqa=is_grouped(q_BHSD, k_BHSD),
        )
