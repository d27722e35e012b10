"""One decode step and the compaction of a cache, fused. README.md has the derivation.

A program owns one key head of one row (the heads of its group share the keys it reads) and one share of the slots.
``P`` is the head size D, ``GROUP`` the heads of a group, both padded; ``half`` half the rotated dimensions. Nothing
waits for the host and every launch depends on shapes alone.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
HEAD_SIZES = (16, 256)
DEAD = tl.constexpr(-2147483648)
"""An end of reach that no moment comes before."""


class Launch(NamedTuple):
    """How a step cuts its work."""

    block: int
    """Slots read at a time."""
    splits: int
    """Programs that share a row's slots; 1 needs no second kernel."""
    warps: int = 4
    stages: int = 3
    """Blocks under way at once in a program."""
    last_combines: bool = False
    """Does the share that is ready last compute the output, where it can be told, or a second kernel?"""


PROGRAMS = 2
"""Programs wanted on a multiprocessor: each has several blocks under way, which hides the memory's latency."""
FEWEST_BLOCKS = 4
"""Blocks of a full cache from which on they are shared among programs, whose shares have to be combined."""
MOST_SPLITS = 64
COMBINED = 2048
"""Sums for each warp that the last share combines at a time: 64 a thread."""


def choose_launch(
    rows: int, group: int, slots: int, size: int, bytes_an_element: int, rotary: bool, multiprocessors: int
) -> Launch:  # fmt: skip
    """The cut for ``rows`` pairs of a batch row and a key head with ``slots`` slots each.

    A tile of keys is as large as its registers allow: angles take some, so does fp32 on the ordinary units.
    """
    padded = triton.next_power_of_2(size)
    exact = bytes_an_element == 4
    elements = 4096 if group == 1 else 2048 if exact else 8192
    block = min(max(elements // (2 if rotary else 1) // padded, 16), 64)
    wanted = triton.cdiv(PROGRAMS * multiprocessors, rows)
    blocks = triton.cdiv(slots, block)
    splits = min(wanted, blocks, MOST_SPLITS) if blocks >= FEWEST_BLOCKS else 1
    queries = padded_group(group) * padded
    warps = 8 if queries > (2048 if exact else 4096) else 2 if queries <= 2048 and not exact else 4
    one_block_each = 1 < splits == blocks
    return Launch(block, splits, max(warps, 4), stages=2) if one_block_each else Launch(block, splits, warps)


def padded_group(group: int) -> int:
    """Rows of queries in a program: the matrix units take 16 or more."""
    return 1 if group == 1 else max(16, triton.next_power_of_2(group))


@triton.jit
def _share(used, splits, BLOCK: tl.constexpr):
    """Slots of a row's split: whole blocks, at least one."""
    return tl.maximum(tl.cdiv(tl.cdiv(used, splits), BLOCK), 1) * BLOCK


@triton.jit
def _angles(COS, SIN, slot, there, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin [slots, PAIRS] of a column of slots."""
    i = tl.arange(0, PAIRS)[None, :]
    mask = there & (i < HALF)
    cos = tl.load(COS + slot * HALF + i, mask=mask, other=1.0)
    sin = tl.load(SIN + slot * HALF + i, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def _turned(rows, there, cos, sin, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """The two halves of the rotated dimensions, turned; ``rows`` is a column of pointers, ``there`` which to read."""
    i = tl.arange(0, PAIRS)[None, :]
    mask = there & (i < HALF)
    one = tl.load(rows + i, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(rows + (i + HALF), mask=mask, other=0.0).to(tl.float32)
    return one * cos - two * sin, two * cos + one * sin


@triton.jit
def _combined(
    SUMS, LARGEST, TOTAL, head, d, filled, splits, D: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Dimensions ``d`` of the outputs of heads ``head`` from the shares that were not empty, in one order always."""
    s = tl.arange(0, PARTS)[:, None]
    part = head.to(tl.int64)[None, :] * splits + s
    there = s < filled
    largest = tl.load(LARGEST + part, mask=there, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(TOTAL + part, mask=there, other=0.0, cache_modifier=".cg")
    sums_at = SUMS + part[:, :, None] * D + d[None, None, :]
    sums = tl.load(sums_at, mask=there[:, :, None] & (d < D)[None, None, :], other=0.0, cache_modifier=".cg")
    weight = tl.exp2(largest - tl.max(largest, 0)[None, :])
    return tl.sum(weight[:, :, None] * sums, 0) / tl.sum(weight * total, 0)[:, None]


@triton.jit(do_not_specialize=["re_r", "C", "K", "heads_a_row"])
def _decode_kernel(
    Q, K_NEW, V_NEW, KEYS, VALUES, LENGTH, REACH_END, NOW, COS, SIN, OUT, SUMS, LARGEST, TOTAL, ARRIVED, scale,
    q_b, q_h, kn_b, kn_h, vn_b, vn_h, k_b, k_h, k_c, v_b, v_h, v_c, re_r, C, K, heads_a_row,
    G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, PAIRS: tl.constexpr, DIRECT: tl.constexpr,
    PARTS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One share of one key head's slots: the output (DIRECT), or its sums, largest scores and totals of weights.

    The share that arrives last (LAST) makes the output of them, HEADS by COLUMNS at a time.

    Of a head's D dimensions the first 2 * HALF turn, as two tiles of HALF (padded: PAIRS), and the rest is plain.
    """
    PLAIN: tl.constexpr = D > 2 * HALF
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    row = pair // heads_a_row
    b = (pair // K).to(tl.int64)
    n = (pair % K).to(tl.int64)
    c = tl.arange(0, BLOCK)
    d = tl.arange(0, P)
    g = tl.arange(0, GROUP)
    whole = d < D
    plain = (whole & (d >= 2 * HALF))[None, :]
    head = (g < G)[:, None]

    # What does not depend on the length is under way while the length is read.
    length = tl.load(LENGTH + row)
    now = tl.load(NOW + row)
    q_at = Q + b * q_b + (n * G + g.to(tl.int64))[:, None] * q_h
    kn_at = K_NEW + b * kn_b + n * kn_h
    k_new = tl.load(kn_at + d, mask=whole, other=0.0)
    v_new = tl.load(V_NEW + b * vn_b + n * vn_h + d, mask=whole, other=0.0)
    if PLAIN:
        q = tl.load(q_at + d[None, :], mask=head & plain, other=0.0)
    used = tl.maximum(tl.minimum(length, C), 0)
    share = _share(used, splits, BLOCK)
    start = split * share
    end = tl.minimum(start + share, used)
    if (split > 0) & (start >= end):
        return

    # The new token: stored by the first share alone, counted there from registers.
    reach_end_at = REACH_END + row.to(tl.int64) * re_r
    k_at = KEYS + b * k_b + n * k_h
    v_at = VALUES + b * v_b + n * v_h
    slot = length.to(tl.int64)
    stored = tl.where((length >= 0) & (length < C) & (split == 0), D, 0)
    tl.store(k_at + slot * k_c + d, k_new, mask=d < stored)
    tl.store(v_at + slot * v_c + d, v_new, mask=d < stored)

    score_new = tl.zeros([GROUP], tl.float32)
    if HALF > 0:
        column = tl.zeros([1, 1], tl.int64)
        cos_own, sin_own = _angles(COS, SIN, column + slot, (column + slot >= 0) & (column + slot < C), HALF, PAIRS)
        q_one, q_two = _turned(q_at, head, cos_own, sin_own, HALF, PAIRS)
        new_one, new_two = _turned(kn_at + column, column == 0, cos_own, sin_own, HALF, PAIRS)
        score_new += tl.sum(q_one * scale * new_one + q_two * scale * new_two, 1)
        q_one = q_one.to(Q.dtype.element_ty)
        q_two = q_two.to(Q.dtype.element_ty)
    if PLAIN:
        score_new += tl.sum(q.to(tl.float32) * scale * k_new.to(tl.float32)[None, :], 1)
    score_new = tl.where(split == 0, score_new, float("-inf"))

    # One query head: every lane of the block keeps a softmax of its own, so no step of the loop waits for other lanes.
    LANES: tl.constexpr = BLOCK if GROUP == 1 else GROUP
    largest = tl.full([LANES], -1e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    acc = tl.zeros([LANES, P], tl.float32)
    for first in tl.range(start, end, BLOCK):
        within = first + c < end
        live = tl.load(reach_end_at + first + c, mask=within, other=DEAD) > now
        at = (first + c).to(tl.int64)[:, None]
        there = within[:, None]  # dead slots are few and read along: a mask known early lets loads run ahead
        v = tl.load(v_at + at * v_c + d[None, :], mask=there & whole[None, :], other=0.0)
        v = tl.where(live[:, None], v, 0.0)
        if PLAIN:
            k = tl.load(k_at + at * k_c + d[None, :], mask=there & plain, other=0.0)
        if HALF > 0:
            cos, sin = _angles(COS, SIN, at, there, HALF, PAIRS)
            k_one, k_two = _turned(k_at + at * k_c, there, cos, sin, HALF, PAIRS)
        if GROUP == 1:
            s = tl.zeros([BLOCK], tl.float32)
            if HALF > 0:
                s += tl.sum(q_one.to(tl.float32) * k_one + q_two.to(tl.float32) * k_two, 1)
            if PLAIN:
                s += tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
            s = tl.where(live, s * scale, float("-inf"))
            new = tl.maximum(largest, s)
            p = tl.exp2(s - new)
            shrink = tl.exp2(largest - new)
            total = total * shrink + p
            acc = acc * shrink[:, None] + p[:, None] * v.to(tl.float32)
            largest = new
        else:
            s = tl.zeros([GROUP, BLOCK], tl.float32)
            if HALF > 0:
                s = tl.dot(q_one, tl.trans(k_one.to(v.dtype)), s, input_precision="ieee")
                s = tl.dot(q_two, tl.trans(k_two.to(v.dtype)), s, input_precision="ieee")
            if PLAIN:
                s = tl.dot(q, tl.trans(k), s, input_precision="ieee")
            s = tl.where(live[None, :], s * scale, float("-inf"))
            new = tl.maximum(largest, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(largest - new)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            largest = new

    if GROUP == 1:
        top = tl.max(largest[None, :], 1)
        weight = tl.exp2(largest[None, :] - top[:, None])
        total = tl.sum(weight * total[None, :], 1)
        acc = tl.sum(acc * tl.trans(weight), 0)[None, :]
        largest = top
    top = tl.maximum(largest, score_new)
    shrink = tl.exp2(largest - top)
    weight_new = tl.exp2(score_new - top)
    total = total * shrink + weight_new
    acc = acc * shrink[:, None] + weight_new[:, None] * v_new.to(tl.float32)[None, :]

    out_row = (b * K + n) * G + g.to(tl.int64)
    there = head & whole[None, :]
    if DIRECT:
        o = acc / total[:, None]
        tl.store(OUT + out_row[:, None] * D + d[None, :], o.to(OUT.dtype.element_ty), mask=there)
    else:
        part = out_row * splits + split
        tl.store(SUMS + part[:, None] * D + d[None, :], acc, mask=there)
        tl.store(LARGEST + part, top, mask=g < G)
        tl.store(TOTAL + part, total, mask=g < G)
    if LAST:
        filled = tl.maximum(tl.cdiv(used, share), 1)
        tl.debug_barrier()  # all threads have stored their part before one of them says so
        if tl.atomic_add(ARRIVED + pair, 1, sem="acq_rel") == filled - 1:
            tl.store(ARRIVED + pair, 0)
            h = tl.arange(0, HEADS)
            for first in tl.range(0, G, HEADS):
                one = pair * G + tl.minimum(first + h, G - 1)
                for begin in tl.static_range(0, P, COLUMNS):
                    i = begin + tl.arange(0, COLUMNS)
                    o = _combined(SUMS, LARGEST, TOTAL, one, i, filled, splits, D, PARTS)
                    at = OUT + one.to(tl.int64)[:, None] * D + i[None, :]
                    tl.store(at, o.to(OUT.dtype.element_ty), mask=(first + h < G)[:, None] & (i < D)[None, :])


@triton.jit(do_not_specialize=["C", "heads_a_row", "splits"])
def _combine_kernel(
    OUT, SUMS, LARGEST, TOTAL, LENGTH, C, heads_a_row, splits,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some columns of one head's output from the shares that were not empty."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    length = tl.load(LENGTH + head // G // heads_a_row)
    used = tl.maximum(tl.minimum(length, C), 0)
    filled = tl.maximum(tl.cdiv(used, _share(used, splits, BLOCK)), 1)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    one = head + tl.zeros([1], tl.int32)
    o = _combined(SUMS, LARGEST, TOTAL, one, d, filled, splits, D, PARTS)
    at = OUT + one.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, o.to(OUT.dtype.element_ty), mask=(d < D)[None, :])


@triton.jit(do_not_specialize=["s_r", "B", "C", "K", "heads_a_row"])
def _compact_kernel(
    KEYS, VALUES, SOURCE, NEW_LENGTH, DUE,
    k_l, k_b, k_h, k_c, v_l, v_b, v_h, v_c, s_r, B, C, K, heads_a_row,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move one key head's slots down, in one layer, in ascending blocks; README.md says why nothing is overrun."""
    pair = tl.program_id(0) % (B * K)
    row = pair // heads_a_row
    if tl.load(DUE + row) == 0:
        return

    layer = (tl.program_id(0) // (B * K)).to(tl.int64)
    b = (pair // K).to(tl.int64)
    n = (pair % K).to(tl.int64)
    k_at = KEYS + layer * k_l + b * k_b + n * k_h
    v_at = VALUES + layer * v_l + b * v_b + n * v_h
    source_at = SOURCE + row.to(tl.int64) * s_r
    length = tl.minimum(tl.load(NEW_LENGTH + row), C)
    c = tl.arange(0, BLOCK)
    d = tl.arange(0, P)
    source = tl.load(source_at + c, mask=c < length, other=0)
    for first in tl.range(0, length, BLOCK):
        to = first + c
        moves = (to < length) & (source > to) & (source < C)
        there = moves[:, None] & (d < D)[None, :]
        of = source.to(tl.int64)[:, None]
        to = to.to(tl.int64)[:, None]
        following = first + BLOCK + c
        source = tl.load(source_at + following, mask=following < length, other=0)
        k = tl.load(k_at + of * k_c + d[None, :], mask=there, other=0.0)
        v = tl.load(v_at + of * v_c + d[None, :], mask=there, other=0.0)
        tl.debug_barrier()
        tl.store(k_at + to * k_c + d[None, :], k, mask=there)
        tl.store(v_at + to * v_c + d[None, :], v, mask=there)


def triton_decode(
    q_BHD: Tensor, k_new_BKD: Tensor, v_new_BKD: Tensor, k_BKCD: Tensor, v_BKCD: Tensor,
    length_R: Tensor, reach_end_RC: Tensor, now_R: Tensor, scale: float, rotary: tuple[Tensor, Tensor] | None,
    arrived_BK: Tensor | None = None, dependent: bool = False,
) -> Tensor:  # fmt: skip
    """See ``sep_decode.decode_attention``. Raises ValueError for a size or type that the kernel lacks."""
    _check_size(k_BKCD)
    B, H, D = q_BHD.shape
    K, C = k_BKCD.shape[1:3]
    G, pairs = H // K, B * K
    out = q_BHD.new_empty(B, H, D)
    if not B:
        return out
    q, k_new, v_new, reach_end = (_last_contiguous(x) for x in (q_BHD, k_new_BKD, v_new_BKD, reach_end_RC))
    length, now = length_R.contiguous(), now_R.contiguous()
    cos, sin = (x.contiguous() for x in rotary or (out, out))
    half = cos.shape[1] if rotary else 0
    launch = choose_launch(pairs, G, C, D, q.element_size(), rotary is not None, _multiprocessors(q.device))
    splits = launch.splits
    last = launch.last_combines and splits > 1 and arrived_BK is not None
    sums, largest, total = out, out, out
    if splits > 1:
        sums = out.new_empty(B * H * splits * D, dtype=torch.float32)
        largest, total = out.new_empty(2, B * H * splits, dtype=torch.float32)
    heads_a_row, padded = pairs // length.shape[0], triton.next_power_of_2(D)
    parts = triton.next_power_of_2(splits)
    columns = min(padded, COMBINED * launch.warps // parts)
    together = min(triton.next_power_of_2(G), COMBINED * launch.warps // parts // columns)
    _decode_kernel[(pairs, splits)](
        q, k_new, v_new, k_BKCD, v_BKCD, length, reach_end, now, cos, sin, out, sums, largest, total,
        arrived_BK if last else out, scale * LOG2_E,
        *q.stride()[:2], *k_new.stride()[:2], *v_new.stride()[:2], *k_BKCD.stride()[:3], *v_BKCD.stride()[:3],
        reach_end.stride(0), C, K, heads_a_row,
        G=G, D=D, P=padded, GROUP=padded_group(G), BLOCK=launch.block,
        HALF=half, PAIRS=max(16, triton.next_power_of_2(half)), DIRECT=splits == 1,
        PARTS=parts if last else 1, HEADS=together if last else 1, COLUMNS=columns if last else padded, LAST=last,
        DEPENDENT=dependent, num_warps=launch.warps, num_stages=launch.stages, **_dependent(dependent),
    )  # fmt: skip
    if splits > 1 and not last:
        columns = min(padded, 64)
        _combine_kernel[(B * H, triton.cdiv(D, columns))](
            out, sums, largest, total, length, C, heads_a_row, splits,
            G=G, D=D, BLOCK=launch.block, PARTS=parts, COLUMNS=columns, DEPENDENT=dependent, num_warps=4,
            **_dependent(dependent),
        )  # fmt: skip
    return out


def _dependent(dependent: bool) -> dict[str, bool]:
    """Option of a launch beside a kernel that still runs: versions of Triton without it take all the others."""
    return {"launch_pdl": True} if dependent else {}


def triton_compact(
    k_LBKCD: Tensor, v_LBKCD: Tensor, source_RC: Tensor, new_length_R: Tensor, due_R: Tensor
) -> None:  # fmt: skip
    """See ``sep_decode.compact``. Raises ValueError for a size or type that the kernel lacks."""
    _check_size(k_LBKCD)
    L, B, K, C, D = k_LBKCD.shape
    if not k_LBKCD.numel():
        return
    source = _last_contiguous(source_RC)
    padded = triton.next_power_of_2(D)
    _compact_kernel[(L * B * K,)](
        k_LBKCD, v_LBKCD, source, new_length_R.contiguous(), due_R.contiguous().view(torch.int8),
        *k_LBKCD.stride()[:4], *v_LBKCD.stride()[:4], source.stride(0), B, C, K, B * K // new_length_R.shape[0],
        D=D, P=padded, BLOCK=compact_block(padded), num_warps=4,
    )  # fmt: skip


def compact_block(padded: int) -> int:
    """Slots moved at a time."""
    return min(max(4096 // padded, 16), 128)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_size(k: Tensor) -> None:
    least, most = HEAD_SIZES
    size = k.shape[-1]
    if size % 8 or not least <= size <= most or k.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"sep_decode: the fused kernel takes head sizes from {least} to {most} in steps of 8 in bf16, fp16 or "
            f"fp32, not {size} in {k.dtype}; pass backend='reference'"
        )


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Of the device; as many as an H200 has where the kernel is interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
