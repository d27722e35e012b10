"""Sep-Attention: softmax attention over the keys that a plan makes visible, in several equal implementations."""

import math
import operator
from typing import Protocol

import torch
from torch import Tensor

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.config.position import SelfAdjustingConfig
from megatron_sep.kernels.registry import function_for
from megatron_sep.kernels.sep_attention.scores import DistanceBias
from megatron_sep.kernels.symbols import truth


class Attention(Protocol):
    """What a row of ``sep_attention`` or ``full_attention`` names."""

    def __call__(
        self,
        q_BHSD: Tensor,
        k_BHSD: Tensor,
        v_BHSD: Tensor,
        plan: MaskPlan,
        scale: float,
        dropout: float = 0.0,
        /,
        *,
        bias: DistanceBias | None = None,
        adjusting: SelfAdjustingConfig | None = None,
    ) -> Tensor:
        """[B, H, S, D], laid out in memory like the queries; a row takes no argument for what it does not have."""
        ...


def sep_attention(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    plan: MaskPlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    dropout: float = 0.0,
    bias: DistanceBias | None = None,
    adjusting: SelfAdjustingConfig | None = None,
) -> Tensor:
    """Attention of each query to the keys it sees in ``plan``: [B, H, S, D], laid out in memory like ``q_BHSD``.

    The inputs may be views of any strides; keys and values may have fewer heads, a divisor of the queries'. The queries
    are those of the plan: as many as the keys, or fewer where it has a span of them. ``scale`` multiplies the scores
    (default 1 / sqrt(D)), ``bias`` is added to them, ``adjusting`` multiplies their softmax by them. A plan of plain
    causal attention goes to torch's own kernels whatever the backend, or, with a bias, to the fastest row of
    ``full_attention``. ``backend``: "auto" (Triton on CUDA where it can, else the reference), "triton", "flex" or
    "reference"; dropout and ``adjusting`` exist in the reference alone. Raises ValueError for what does not fit,
    BackendError for a backend that cannot take it.
    """
    check_fit(q_BHSD, k_BHSD, v_BHSD, plan, bias)
    if scale is None:
        scale = 1 / math.sqrt(q_BHSD.shape[-1])
    attend = function_for(
        "full_attention" if plan.causal else "sep_attention",
        "auto" if plan.causal else backend,
        q_BHSD.device,
        q_BHSD.dtype,
        head_size=operator.index(q_BHSD.shape[3]),  # a constant in compiled code too
        dropout=truth(dropout > 0),
        biased=bias is not None,
        adjusting=adjusting is not None,
        positive_scale=truth(scale > 0),
        whole=plan.span is None,
        even=plan.even,
        training=torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHSD, k_BHSD, v_BHSD)),
    )
    given = {name: value for name, value in (("bias", bias), ("adjusting", adjusting)) if value is not None}
    out: Tensor = attend(q_BHSD, k_BHSD, v_BHSD, plan, scale, *((dropout,) if dropout else ()), **given)
    return out


def check_fit(q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, bias: DistanceBias | None = None) -> None:
    """Raise ValueError for tensors that do not fit each other or their plan."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            "sep_attention: q [B, H, Q, D] and k, v [B, H or fewer, T, D] do not fit each other: "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"sep_attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if bias is not None and bias.slopes_H.shape != q.shape[1:2]:
        raise ValueError(f"sep_attention: slopes for {len(bias.slopes_H)} heads, the queries have {q.shape[1]}")
    if bias is not None and bias.position_BT is not None and bias.position_BT.shape != plan.reach_BT.shape:
        raise ValueError(
            f"sep_attention: positions {tuple(bias.position_BT.shape)} of the bias are not those of the plan's keys, "
            f"{tuple(plan.reach_BT.shape)}"
        )
    if plan.reach_BT.shape != (k.shape[0], k.shape[2]) or plan.num_queries != q.shape[2]:
        raise ValueError(
            f"sep_attention: the plan is for {plan.num_queries} queries of [B, T] = {tuple(plan.reach_BT.shape)} keys, "
            f"got {q.shape[2]} queries of {(k.shape[0], k.shape[2])}; build the plan from the ids of this micro-batch"
        )
