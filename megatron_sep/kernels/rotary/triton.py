"""Bias, split and rotation in one pass; back, one pass from three gradients to one matrix and the bias's gradient.

A slot is a head's D numbers of one token in the packed matrix: for each of N groups GROUP queries, a key, a value. The
first HALF numbers of a slot turn with the next HALF; the REST stay.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sep.kernels.columns.triton import column_sums, num_programs
from megatron_sep.kernels.launch import Launch

FORWARD: dict[int, Launch] = {}
BACKWARD: dict[int, Launch] = {64: Launch(rows=16, warps=4, programs=16)}
"""By padded head size, where the rule below is not the best."""


def _launch(table: dict[int, Launch], padded: int) -> Launch:
    return table.get(padded) or Launch(rows=min(max(4096 // padded, 1), 64), warps=4, programs=12)


@triton.jit
def _slot(slot, Q, K, V, q_h, k_h, v_h, q_s, k_s, v_s, q_b, k_b, v_b, GROUP: tl.constexpr):
    """Where the head of a slot lies among queries, keys or values, that tensor's strides, and whether it turns."""
    n = slot // (GROUP + 2)
    j = slot % (GROUP + 2)
    at = tl.where(j < GROUP, Q + (n * GROUP + j) * q_h, tl.where(j == GROUP, K + n * k_h, V + n * v_h))
    s = tl.where(j < GROUP, q_s, tl.where(j == GROUP, k_s, v_s))
    b = tl.where(j < GROUP, q_b, tl.where(j == GROUP, k_b, v_b))
    return at, s, b, j <= GROUP


@triton.jit
def _turn(COS, SIN, s, b, t_s, t_b, there, HALF: tl.constexpr, PH: tl.constexpr):
    """Cosine and sine of the tokens' angles; 1 and 0 where nothing turns."""
    d = tl.arange(0, PH)
    at = s[:, None] * t_s + b[:, None] * t_b + d[None, :]
    inside = there[:, None] & (d < HALF)[None, :]
    return tl.load(COS + at, mask=inside, other=1.0), tl.load(SIN + at, mask=inside, other=0.0)


@triton.jit
def _forward_rotary(
    X, BIAS, COS, SIN, Q, K, V, tokens, B, t_s, t_b, q_h, k_h, v_h, q_s, k_s, v_s, q_b, k_b, v_b,
    D: tl.constexpr, HALF: tl.constexpr, PH: tl.constexpr, PR: tl.constexpr, GROUP: tl.constexpr,
    BIASED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    out, o_s, o_b, turns = _slot(slot, Q, K, V, q_h, k_h, v_h, q_s, k_s, v_s, q_b, k_b, v_b, GROUP)
    t = tl.program_id(1) * T + tl.arange(0, T)
    s = (t // B).to(tl.int64)
    b = t % B
    from_ = X + t.to(tl.int64)[:, None] * (tl.num_programs(0) * D) + slot * D
    to = out + (s * o_s + b * o_b)[:, None]
    there = t < tokens
    if HALF > 0:
        d = tl.arange(0, PH)[None, :]
        inside = there[:, None] & (d < HALF)
        x = tl.load(from_ + d, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(from_ + HALF + d, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            x += tl.load(BIAS + slot * D + d, mask=d < HALF, other=0.0).to(tl.float32)
            y += tl.load(BIAS + slot * D + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
        cos, sin = _turn(COS, SIN, s, b, t_s, t_b, t < tl.where(turns, tokens, 0), HALF, PH)
        tl.store(to + d, (x * cos - y * sin).to(Q.dtype.element_ty), mask=inside)
        tl.store(to + HALF + d, (y * cos + x * sin).to(Q.dtype.element_ty), mask=inside)
    if 2 * HALF < D:
        e = tl.arange(0, PR)[None, :]
        inside = there[:, None] & (e < D - 2 * HALF)
        z = tl.load(from_ + 2 * HALF + e, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            z += tl.load(BIAS + slot * D + 2 * HALF + e, mask=e < D - 2 * HALF, other=0.0).to(tl.float32)
        tl.store(to + 2 * HALF + e, z.to(Q.dtype.element_ty), mask=inside)


@triton.jit
def _backward_rotary(
    DQ, DK, DV, COS, SIN, DX, PARTS, tokens, B, t_s, t_b, q_h, k_h, v_h, q_s, k_s, v_s, q_b, k_b, v_b,
    D: tl.constexpr, HALF: tl.constexpr, PH: tl.constexpr, PR: tl.constexpr, GROUP: tl.constexpr,
    BIASED: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of a slot for this program's tokens, turned back, and its share of the bias's gradient."""
    slot = tl.program_id(0)
    from_, o_s, o_b, turns = _slot(slot, DQ, DK, DV, q_h, k_h, v_h, q_s, k_s, v_s, q_b, k_b, v_b, GROUP)
    d = tl.arange(0, PH)[None, :]
    e = tl.arange(0, PR)[None, :]
    dx_sum = tl.zeros([T, PH], tl.float32)
    dy_sum = tl.zeros([T, PH], tl.float32)
    dz_sum = tl.zeros([T, PR], tl.float32)
    for first in tl.range(tl.program_id(1) * T, tokens, tl.num_programs(1) * T, num_stages=STAGES):
        t = first + tl.arange(0, T)
        s = (t // B).to(tl.int64)
        b = t % B
        to = DX + t.to(tl.int64)[:, None] * (tl.num_programs(0) * D) + slot * D
        at = from_ + (s * o_s + b * o_b)[:, None]
        there = t < tokens
        if HALF > 0:
            inside = there[:, None] & (d < HALF)
            x = tl.load(at + d, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(at + HALF + d, mask=inside, other=0.0).to(tl.float32)
            cos, sin = _turn(COS, SIN, s, b, t_s, t_b, t < tl.where(turns, tokens, 0), HALF, PH)
            dx = x * cos + y * sin
            dy = y * cos - x * sin
            tl.store(to + d, dx.to(DX.dtype.element_ty), mask=inside)
            tl.store(to + HALF + d, dy.to(DX.dtype.element_ty), mask=inside)
            if BIASED:
                dx_sum += dx
                dy_sum += dy
        if 2 * HALF < D:
            inside = there[:, None] & (e < D - 2 * HALF)
            z = tl.load(at + 2 * HALF + e, mask=inside, other=0.0)
            tl.store(to + 2 * HALF + e, z, mask=inside)
            if BIASED:
                dz_sum += z.to(tl.float32)
    if BIASED:
        part = PARTS + tl.program_id(1) * (tl.num_programs(0) * D) + slot * D
        if HALF > 0:
            tl.store(part + d, tl.sum(dx_sum, 0)[None, :], mask=d < HALF)
            tl.store(part + HALF + d, tl.sum(dy_sum, 0)[None, :], mask=d < HALF)
        if 2 * HALF < D:
            tl.store(part + 2 * HALF + e, tl.sum(dz_sum, 0)[None, :], mask=e < D - 2 * HALF)


def split_rotated(
    qkv_SBX: Tensor, bias: Tensor | None, angle: Tensor | None, groups: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``rotary.SplitRotated``."""
    cos, sin = (None, None) if angle is None else (angle.cos(), angle.sin())
    return split_rotated_forward(qkv_SBX, bias, cos, sin, groups, size)


@torch.library.custom_op("megatron_sep::split_rotated_forward", mutates_args=())
def split_rotated_forward(
    qkv: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, groups: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, contiguous [S, B, heads, D]; cosine and sine [S, 1 or B, R / 2], fp32."""
    qkv = qkv.contiguous()
    heads = _outputs(qkv, groups, size)
    tables, constants, launch = _arguments(qkv, cos, sin, groups, size, FORWARD)
    tokens = qkv.shape[0] * qkv.shape[1]
    _forward_rotary[(qkv.shape[2] // size, triton.cdiv(tokens, launch.rows))](
        qkv, qkv if bias is None else bias, *tables[:2], *heads, tokens, qkv.shape[1], *tables[2:], *_strides(heads),
        **constants, BIASED=bias is not None, T=launch.rows, num_warps=launch.warps,
    )  # fmt: skip
    return heads


@torch.library.custom_op("megatron_sep::split_rotated_backward", mutates_args=())
def split_rotated_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None, biased: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of the packed matrix [S, B, X] and of the bias [X], empty where there is none."""
    heads = [x if x.stride(3) == 1 else x.contiguous() for x in (dq, dk, dv)]
    dqkv, dbias = _gradients(dq, dk, biased)
    slots = dqkv.shape[2] // dq.shape[3]
    tables, constants, launch = _arguments(dqkv, cos, sin, dk.shape[2], dq.shape[3], BACKWARD)
    tokens = dqkv.shape[0] * dqkv.shape[1]
    blocks = triton.cdiv(tokens, launch.rows)
    programs = num_programs(dqkv.device, launch.programs, blocks, slots)
    parts = dqkv.new_empty((1, programs, dbias.shape[0]), dtype=torch.float32)
    _backward_rotary[(slots, programs)](
        *heads, *tables[:2], dqkv, parts, tokens, dqkv.shape[1], *tables[2:], *_strides(heads),
        **constants, BIASED=biased, T=launch.rows, STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip
    return dqkv, column_sums(parts, dqkv.dtype)[0] if biased else dbias


def _arguments(packed, cos, sin, groups, size, table):
    """Tables of the rotation and their strides; constants; launch."""
    half = 0 if cos is None else cos.shape[2]
    rest = size - 2 * half
    constants = {
        "D": size, "HALF": half, "PH": triton.next_power_of_2(max(half, 1)), "PR": triton.next_power_of_2(max(rest, 1)),
        "GROUP": packed.shape[2] // size // groups - 2,
    }  # fmt: skip
    if cos is None:
        tables = (packed, packed, 0, 0)
    else:
        cos, sin = (x if x.stride(2) == 1 and x.stride() == cos.stride() else x.contiguous() for x in (cos, sin))
        tables = (cos, sin, cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0)
    return tables, constants, _launch(table, triton.next_power_of_2(size))


def _strides(heads):
    return [x.stride(axis) for axis in (2, 0, 1) for x in heads]


def _outputs(qkv, groups, size):
    S, B, X = qkv.shape
    return tuple(qkv.new_empty((S, B, heads, size)) for heads in (X // size - 2 * groups, groups, groups))


def _gradients(dq, dk, biased):
    S, B, heads, size = dq.shape
    columns = (heads + 2 * dk.shape[2]) * size
    return dq.new_empty((S, B, columns)), dq.new_empty(columns if biased else 0)


@split_rotated_forward.register_fake
def _(qkv, _bias, _cos, _sin, groups, size):
    return _outputs(qkv, groups, size)


@split_rotated_backward.register_fake
def _(dq, dk, _dv, _cos, _sin, biased):
    return _gradients(dq, dk, biased)


def _keep(ctx, inputs, output):  # noqa: ARG001 - torch names it
    _, bias, cos, sin, _, _ = inputs
    ctx.save_for_backward(cos, sin)
    ctx.biased = bias is not None


def _backward(ctx, dq, dk, dv):
    dqkv, dbias = split_rotated_backward(dq, dk, dv, *ctx.saved_tensors, ctx.biased)
    return dqkv, dbias if ctx.biased else None, None, None, None, None


split_rotated_forward.register_autograd(_backward, setup_context=_keep)
