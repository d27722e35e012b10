"""Sep-Attention: softmax attention over the keys that a plan makes visible, in several equal implementations."""

import math

from torch import Tensor
from torch.compiler import assume_constant_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.kernels import registry

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def sep_attention(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    plan: MaskPlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """Attention of each query to the keys it sees in ``plan``: [B, H, S, D], laid out in memory like ``q_BHSD``.

    The inputs may be views of any strides; keys and values may have fewer heads, a divisor of the queries'. The queries
    are those of the plan: as many as the keys, or fewer where it has a span of them. ``scale`` multiplies the scores
    (default 1 / sqrt(D)). A plan of plain causal attention goes to torch's own kernels whatever the backend.
    ``backend``: "auto" (Triton on CUDA but for a span of queries, else the reference), "triton", "flex" or "reference";
    dropout exists in the reference alone. Raises ValueError for what does not fit, BackendError for a backend that
    cannot run.
    """
    _check(q_BHSD, k_BHSD, v_BHSD, plan)
    if scale is None:
        scale = 1 / math.sqrt(q_BHSD.shape[-1])
    if plan.causal:
        return causal_attention(q_BHSD, k_BHSD, v_BHSD, scale, dropout)
    if backend == "auto" and plan.span is not None:
        backend = "reference"  # the fused kernel takes queries at all positions
    name = _choose(backend, q_BHSD.device.type)
    if dropout and name != "reference":
        raise ValueError(
            f"sep_attention: backend {name!r} has no dropout (got {dropout}); set it to 0 or pass backend='reference'"
        )
    if name == "reference":
        from megatron_sep.kernels.sep_attention.reference import reference_attention

        return reference_attention(q_BHSD, k_BHSD, v_BHSD, plan, scale, dropout)
    if name == "flex":
        from megatron_sep.kernels.sep_attention.flex import flex_sep_attention

        return flex_sep_attention(q_BHSD, k_BHSD, v_BHSD, plan, scale)
    from megatron_sep.kernels.sep_attention.triton import triton_attention

    out: Tensor = triton_attention(q_BHSD, k_BHSD, v_BHSD, plan, scale)
    return out


def causal_attention(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Every query sees every earlier key: the fastest of torch's kernels that can run these inputs."""
    grouped = q_BHSD.shape[1] != k_BHSD.shape[1]
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
        return scaled_dot_product_attention(
            q_BHSD, k_BHSD, v_BHSD, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )


@assume_constant_result  # type: ignore[untyped-decorator]
def _choose(backend: str, device: str) -> str:
    return registry.choose("sep_attention", backend, device)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            "sep_attention: q [B, H, Q, D] and k, v [B, H or fewer, T, D] do not fit each other: "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"sep_attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if plan.reach_BT.shape != (k.shape[0], k.shape[2]) or plan.num_queries != q.shape[2]:
        raise ValueError(
            f"sep_attention: the plan is for {plan.num_queries} queries of [B, T] = {tuple(plan.reach_BT.shape)} keys, "
            f"got {q.shape[2]} queries of {(k.shape[0], k.shape[2])}; build the plan from the ids of this micro-batch"
        )
