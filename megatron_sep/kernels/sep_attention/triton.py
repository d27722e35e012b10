"""Sep-Attention fused, forward and backward, at a cost that follows the visible pairs. README.md has the derivation.

Shapes: B rows of S keys and R queries, which stand at the positions from FIRST on of the keys; H query heads in groups
that share one of N key heads, head size D, padded to P. ``seen`` and ``sorted`` are the plan's KeyIndex; ``reach`` and
``start`` its tensors. A tile is a block of queries by a block of keys. No atomics, so the result is the same bits every
time; nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.kernels.sep_attention.index import GAP, KeyIndex
from megatron_sep.kernels.sep_attention.scores import DistanceBias
from megatron_sep.kernels.sep_attention.tiles import Tile, Tiles, choose_tiles

LOG2_E = 1.4426950408889634
HEAD_SIZES = (32, 64, 128, 256)
PACKED_HEADS = 8
"""At most this many heads of a group share one block of query rows."""


@triton.jit
def _tile(X, base, stride, b, h, row, end, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr):
    """Rows [row, row + ROWS) of one head, zero past the end: through a descriptor, or a pointer and a row stride."""
    if TMA:
        tile = X.load([b, h, row, 0]).reshape(ROWS, P)
    else:
        r = tl.arange(0, ROWS)
        d = tl.arange(0, P)
        mask = (row + r < end)[:, None]
        if D != P:
            mask = mask & (d < D)[None, :]
        at = (tl.zeros([], tl.int64) + row) * stride + r[:, None] * stride + d[None, :]
        tile = tl.load(X + base + at, mask=mask, other=0.0)
    return tile


@triton.jit
def _sees(distance, reach):
    """0 <= distance < reach in one unsigned comparison."""
    return distance.to(tl.uint32, bitcast=True) < reach.to(tl.uint32, bitcast=True)


@triton.jit
def _stands(POSITION, b, S, j, there, BIAS: tl.constexpr):
    """Where tokens at indices j of row b stand for distances: at j (BIAS 1), or where POSITION says (BIAS 2)."""
    return tl.load(POSITION + b * S + j, mask=there, other=0) if BIAS == 2 else j


@triton.jit
def _slopes(SLOPES, h):
    """How steeply the scores of heads fall, to the base 2."""
    return tl.load(SLOPES + h) * 1.4426950408889634


@triton.jit
def _seen_before(SEEN, b, position, S):
    """Landmarks of row b before a position."""
    return tl.load(SEEN + b * S + position - 1, mask=position > 0, other=0)


@triton.jit
def _spans(
    SEEN, SORTED, START, b, first_query, past_query, B, S, window, GAP,
    POSITIONS: tl.constexpr, KEYS: tl.constexpr, INNER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The key tiles of a block of queries.

    left .. full: tiles at the window's left edge; full .. diagonal: tiles of which every query sees every key;
    diagonal .. end: tiles that hold the queries themselves; landmark .. landmark_end: the compacted rows of the
    landmarks before ``left``, which the queries before ``document_end`` see, all of them.
    """
    left = (tl.maximum(first_query - window + 1, 0) // KEYS) * KEYS
    landmark = 0
    document_end = S
    if PACKED:
        start = tl.load(START + b * S + first_query)
        left = tl.maximum(left, (start // KEYS) * KEYS)
        landmark = _seen_before(SEEN, b, start, S)
        slot = b * (S + GAP) + landmark
        document_end = tl.load(SORTED + slot) + tl.load(SORTED + B * (S + GAP) + slot)
    landmark_end = tl.maximum(_seen_before(SEEN, b, left, S), landmark)
    diagonal = (first_query // KEYS) * KEYS
    full = diagonal
    if INNER:
        full = tl.minimum(tl.cdiv(tl.maximum(first_query + POSITIONS - window, 0), KEYS) * KEYS, diagonal)
    end = tl.minimum(first_query + POSITIONS, past_query)
    return left, full, diagonal, end, landmark, landmark_end, document_end


@triton.jit
def _masked_tile(
    K, V, KC, VC, REACH, SORTED, POSITION, k_at, k_s, v_at, v_s, c_at, b, n, t, tiles, edge, left, diagonal, landmark,
    landmark_end, document_end, S, GAP, max_landmarks, i,
    D: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Tile t of those that need a mask: the window's two ends, then landmarks. Keys, values, who sees them, and, with a
    bias, where the keys stand.

    A landmark of the compacted rows is seen by every query before its document's end: as if it stood at 0 and reached
    that far.
    """
    c = tl.arange(0, KEYS)
    in_window = t < tiles
    row = tl.where(t < edge, left + t * KEYS, diagonal + (t - edge) * KEYS)
    row = tl.where(in_window, row, landmark + (t - tiles) * KEYS)
    if TMA:
        if in_window:
            k_rows = K
            v_rows = V
        else:
            k_rows = KC
            v_rows = VC
        k = _tile(k_rows, k_at, k_s, b, n, row, S, D, P, KEYS, TMA)
        v = _tile(v_rows, v_at, v_s, b, n, row, S, D, P, KEYS, TMA)
    else:
        rows = tl.where(in_window, S, max_landmarks)
        k = _tile(
            tl.where(in_window, K + k_at, KC + c_at), 0, tl.where(in_window, k_s, D), b, n, row, rows, D, P, KEYS, TMA
        )
        v = _tile(
            tl.where(in_window, V + v_at, VC + c_at), 0, tl.where(in_window, v_s, D), b, n, row, rows, D, P, KEYS, TMA
        )
    reach = tl.load(REACH + b * S + row + c, mask=row + c < tl.where(in_window, S, 0), other=0)
    reach = tl.where(in_window, reach, tl.where(row + c < landmark_end, document_end, 0))
    position = tl.where(in_window, row + c, 0)
    stands = position
    if BIAS:
        there = row + c < tl.where(in_window, S, landmark_end)
        j = tl.load(SORTED + b * (S + GAP) + row + c, mask=row + c < tl.where(in_window, 0, landmark_end), other=0)
        stands = _stands(POSITION, b, S, tl.where(in_window, row + c, j), there, BIAS)
    return k, v, _sees(i[:, None] - position[None, :], reach[None, :]), stands


@triton.jit(do_not_specialize=["N", "max_landmarks"])
def _compact_kernel(
    K, V, KC, VC, SEEN, SORTED,
    k_b, k_h, k_s, v_b, v_h, v_s, S, N, max_landmarks,
    D: tl.constexpr, P: tl.constexpr, GAP: tl.constexpr,
):  # fmt: skip
    """Copy the landmarks' keys and values to consecutive rows, followed by at least GAP rows of zeros."""
    first = tl.program_id(0) * GAP
    b = tl.program_id(1) // N
    h = tl.program_id(1) % N
    total = tl.load(SEEN + b * S + S - 1)
    if first < total + GAP:
        row = first + tl.arange(0, GAP)
        d = tl.arange(0, P)
        position = tl.load(SORTED + b * (S + GAP) + row, mask=row < total, other=0).to(tl.int64)[:, None]
        there = (row < total)[:, None] & (d < D)[None, :]
        k = tl.load(
            K + b.to(tl.int64) * k_b + h.to(tl.int64) * k_h + position * k_s + d[None, :], mask=there, other=0.0
        )
        v = tl.load(
            V + b.to(tl.int64) * v_b + h.to(tl.int64) * v_h + position * v_s + d[None, :], mask=there, other=0.0
        )
        to = (tl.program_id(1).to(tl.int64) * max_landmarks + row[:, None]) * D + d[None, :]
        inside = (row < max_landmarks)[:, None] & (d < D)[None, :]
        tl.store(KC + to, k, mask=inside)
        tl.store(VC + to, v, mask=inside)


@triton.jit
def _attend(
    q, k, v, acc, largest, total, scale, visible, slope, i_stands, j_stands, MASKED: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """One tile of softmax: the accumulated values, the largest score (base 2) and the sum of weights.

    ``largest`` starts finite, so that a query that sees nothing of its first tiles gets weights of 0, not NaN.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if BIAS:
        s = s * scale + slope[:, None] * (j_stands[None, :] - i_stands[:, None]).to(tl.float32)
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    if BIAS:
        new = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
    else:
        new = tl.maximum(largest, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(largest - new)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new, total


@triton.jit(do_not_specialize=["FIRST", "window", "H", "N", "GROUP", "max_landmarks", "GAP"])
def _forward_kernel(
    Q, K, V, KC, VC, REACH, SEEN, SORTED, START, SLOPES, POSITION, OUT, LSE, scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    S, R, FIRST, window, H, N, GROUP, max_landmarks, GAP,
    D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    INNER: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The output and log-sum-exp of one block of queries."""
    POSITIONS: tl.constexpr = QUERIES // HEADS
    blocks = tl.cdiv(R, POSITIONS)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * POSITIONS
    b = (tl.program_id(0) // blocks) // (H // HEADS)
    h0 = (tl.program_id(0) // blocks) % (H // HEADS) * HEADS
    n = h0 // GROUP
    r = tl.arange(0, QUERIES)
    d = tl.arange(0, P)
    row = first_row + r // HEADS
    i = FIRST + row
    h = h0 + r % HEADS
    inside = (row < R)[:, None]
    if D != P:
        inside = inside & (d < D)[None, :]
    at = b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + row.to(tl.int64) * q_s
    q = tl.load(Q + at[:, None] + d[None, :], mask=inside, other=0.0)
    overflow = tl.load(SEEN + b * S + S - 1) > max_landmarks
    k_at = b.to(tl.int64) * k_b + n.to(tl.int64) * k_h
    v_at = b.to(tl.int64) * v_b + n.to(tl.int64) * v_h
    c_at = (b * N + n).to(tl.int64) * max_landmarks * D
    c = tl.arange(0, KEYS)
    slope = 0.0
    i_stands = i
    if BIAS:
        slope = _slopes(SLOPES, h)
        i_stands = _stands(POSITION, b, S, i, i < S, BIAS)

    B = tl.num_programs(0) // blocks // (H // HEADS)
    left, full, diagonal, end, landmark, landmark_end, document_end = _spans(
        SEEN, SORTED, START, b, FIRST + first_row, FIRST + R, B, S, window, GAP, POSITIONS, KEYS, INNER, PACKED
    )
    whole = 0 if PACKED else (landmark_end - landmark) // KEYS
    masked_landmark = landmark + whole * KEYS
    edge = (full - left) // KEYS
    tiles = edge + tl.cdiv(end - diagonal, KEYS)
    largest = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, P], tl.float32)
    for t in tl.range(0, tiles + tl.cdiv(landmark_end - masked_landmark, KEYS)):
        k, v, visible, j_stands = _masked_tile(
            K, V, KC, VC, REACH, SORTED, POSITION, k_at, k_s, v_at, v_s, c_at, b, n, t, tiles, edge, left, diagonal,
            masked_landmark, landmark_end, document_end, S, GAP, max_landmarks, i, D, P, KEYS, TMA, BIAS,
        )  # fmt: skip
        acc, largest, total = _attend(
            q, k, v, acc, largest, total, scale, visible, slope, i_stands, j_stands, True, BIAS
        )
    if INNER:
        for key in tl.range(full, diagonal, KEYS):
            k = _tile(K, k_at, k_s, b, n, key, S, D, P, KEYS, TMA)
            v = _tile(V, v_at, v_s, b, n, key, S, D, P, KEYS, TMA)
            j_stands = _stands(POSITION, b, S, key + c, key + c < S, BIAS)
            acc, largest, total = _attend(
                q, k, v, acc, largest, total, scale, 0, slope, i_stands, j_stands, False, BIAS
            )
    if not PACKED:
        for t in tl.range(0, whole):
            k = _tile(KC, c_at, D, b, n, t * KEYS, max_landmarks, D, P, KEYS, TMA)
            v = _tile(VC, c_at, D, b, n, t * KEYS, max_landmarks, D, P, KEYS, TMA)
            j_stands = c
            if BIAS:
                j = tl.load(SORTED + b * (S + GAP) + t * KEYS + c)
                j_stands = _stands(POSITION, b, S, j, j < S, BIAS)
            acc, largest, total = _attend(
                q, k, v, acc, largest, total, scale, 0, slope, i_stands, j_stands, False, BIAS
            )

    o = tl.where(overflow, float("nan"), acc / total[:, None])
    o_at = b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + row.to(tl.int64) * o_s
    tl.store(OUT + o_at[:, None] + d[None, :], o.to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + (b * H + h).to(tl.int64) * R + row, largest + tl.log2(total), mask=row < R)


@triton.jit
def _query_gradient(
    q, do, k, v, lse, delta, acc, scale, visible, slope, i_stands, j_stands, MASKED: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """One tile's share of dQ, before the scale."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    s = s * scale
    if BIAS:
        s += slope[:, None] * (j_stands[None, :] - i_stands[:, None]).to(tl.float32)
    p = tl.exp2(s - lse[:, None])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["FIRST", "window", "H", "N", "GROUP", "max_landmarks", "GAP"])
def _query_gradient_kernel(
    Q, K, V, KC, VC, REACH, SEEN, SORTED, START, SLOPES, POSITION, OUT, DO, LSE, DELTA, DQ, scale, dq_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
    S, R, FIRST, window, H, N, GROUP, max_landmarks, GAP,
    D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    INNER: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries, and delta = rowsum(O * dO) for the keys' kernel. The tiles are the forward's."""
    POSITIONS: tl.constexpr = QUERIES // HEADS
    blocks = tl.cdiv(R, POSITIONS)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * POSITIONS
    b = (tl.program_id(0) // blocks) // (H // HEADS)
    h0 = (tl.program_id(0) // blocks) % (H // HEADS) * HEADS
    n = h0 // GROUP
    r = tl.arange(0, QUERIES)
    d = tl.arange(0, P)
    row = first_row + r // HEADS
    i = FIRST + row
    h = h0 + r % HEADS
    inside = (row < R)[:, None]
    if D != P:
        inside = inside & (d < D)[None, :]
    do_at = b.to(tl.int64) * do_b + h.to(tl.int64) * do_h + row.to(tl.int64) * do_s
    do = tl.load(DO + do_at[:, None] + d[None, :], mask=inside, other=0.0)
    o_at = b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + row.to(tl.int64) * o_s
    o = tl.load(OUT + o_at[:, None] + d[None, :], mask=inside, other=0.0)
    q_at = b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + row.to(tl.int64) * q_s
    q = tl.load(Q + q_at[:, None] + d[None, :], mask=inside, other=0.0)
    row_at = (b * H + h).to(tl.int64) * R + row
    lse = tl.load(LSE + row_at, mask=row < R, other=0.0)
    k_at = b.to(tl.int64) * k_b + n.to(tl.int64) * k_h
    v_at = b.to(tl.int64) * v_b + n.to(tl.int64) * v_h
    c_at = (b * N + n).to(tl.int64) * max_landmarks * D
    c = tl.arange(0, KEYS)
    slope = 0.0
    i_stands = i
    if BIAS:
        slope = _slopes(SLOPES, h)
        i_stands = _stands(POSITION, b, S, i, i < S, BIAS)

    B = tl.num_programs(0) // blocks // (H // HEADS)
    left, full, diagonal, end, landmark, landmark_end, document_end = _spans(
        SEEN, SORTED, START, b, FIRST + first_row, FIRST + R, B, S, window, GAP, POSITIONS, KEYS, INNER, PACKED
    )
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + row_at, delta, mask=row < R)
    whole = 0 if PACKED else (landmark_end - landmark) // KEYS
    masked_landmark = landmark + whole * KEYS
    edge = (full - left) // KEYS
    tiles = edge + tl.cdiv(end - diagonal, KEYS)
    acc = tl.zeros([QUERIES, P], tl.float32)
    for t in tl.range(0, tiles + tl.cdiv(landmark_end - masked_landmark, KEYS)):
        k, v, visible, j_stands = _masked_tile(
            K, V, KC, VC, REACH, SORTED, POSITION, k_at, k_s, v_at, v_s, c_at, b, n, t, tiles, edge, left, diagonal,
            masked_landmark, landmark_end, document_end, S, GAP, max_landmarks, i, D, P, KEYS, TMA, BIAS,
        )  # fmt: skip
        acc = _query_gradient(q, do, k, v, lse, delta, acc, scale, visible, slope, i_stands, j_stands, True, BIAS)
    if INNER:
        for key in tl.range(full, diagonal, KEYS):
            k = _tile(K, k_at, k_s, b, n, key, S, D, P, KEYS, TMA)
            v = _tile(V, v_at, v_s, b, n, key, S, D, P, KEYS, TMA)
            j_stands = _stands(POSITION, b, S, key + c, key + c < S, BIAS)
            acc = _query_gradient(q, do, k, v, lse, delta, acc, scale, 0, slope, i_stands, j_stands, False, BIAS)
    if not PACKED:
        for t in tl.range(0, whole):
            k = _tile(KC, c_at, D, b, n, t * KEYS, max_landmarks, D, P, KEYS, TMA)
            v = _tile(VC, c_at, D, b, n, t * KEYS, max_landmarks, D, P, KEYS, TMA)
            j_stands = c
            if BIAS:
                j = tl.load(SORTED + b * (S + GAP) + t * KEYS + c)
                j_stands = _stands(POSITION, b, S, j, j < S, BIAS)
            acc = _query_gradient(q, do, k, v, lse, delta, acc, scale, 0, slope, i_stands, j_stands, False, BIAS)

    dq_at = b.to(tl.int64) * dq_b + h.to(tl.int64) * dq_h + row.to(tl.int64) * dq_s
    tl.store(DQ + dq_at[:, None] + d[None, :], (acc * dq_scale).to(DQ.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["FIRST", "H", "N", "blocks", "GAP"])
def _key_gradient_kernel(
    Q, K, V, SORTED, SLOPES, POSITION, DO, LSE, DELTA, DK, DV, scale, dk_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    S, R, FIRST, H, N, blocks, GAP,
    D: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TMA: tl.constexpr, BIAS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys: consecutive landmarks, or consecutive other keys, in the plan's order.

    Either way each key's queries are ``key <= i < key + reach``, a range that moves right with the key, so the block's
    queries run from its first key to the furthest end of a reach, as far as there are any, and one comparison masks
    the rest. Without a SPAN of queries they are all of the keys' positions, which saves registers.
    """
    if not SPAN:
        FIRST = 0
        R = S
    b = tl.program_id(0) // blocks // N
    n = tl.program_id(0) // blocks % N
    B = tl.num_programs(0) // blocks // N
    slot = b * (S + GAP) + tl.program_id(0) % blocks * KEYS
    c = tl.arange(0, KEYS)
    there = tl.program_id(0) % blocks * KEYS + c < S + GAP
    j = tl.load(SORTED + slot + c, mask=there, other=0)
    reach = tl.load(SORTED + B * (S + GAP) + slot + c, mask=there, other=0)
    first_query = tl.maximum(tl.load(SORTED + slot), FIRST)
    past_query = tl.max(j + reach)
    if past_query > 0:
        d = tl.arange(0, P)
        r = tl.arange(0, QUERIES)
        inside = (reach > 0)[:, None]
        if D != P:
            inside = inside & (d < D)[None, :]
        k_at = b.to(tl.int64) * k_b + n.to(tl.int64) * k_h + j.to(tl.int64) * k_s
        v_at = b.to(tl.int64) * v_b + n.to(tl.int64) * v_h + j.to(tl.int64) * v_s
        k = tl.load(K + k_at[:, None] + d[None, :], mask=inside, other=0.0)
        v = tl.load(V + v_at[:, None] + d[None, :], mask=inside, other=0.0)
        j_stands = _stands(POSITION, b, S, j, reach > 0, BIAS)
        tiles = tl.cdiv(tl.maximum(tl.minimum(past_query, FIRST + R) - first_query, 0), QUERIES)
        dk = tl.zeros([KEYS, P], tl.float32)
        dv = tl.zeros([KEYS, P], tl.float32)
        for step in tl.range(0, tiles * GROUP):
            h = n * GROUP
            row = first_query - FIRST + step * QUERIES
            if GROUP > 1:
                h += step // tiles
                row = first_query - FIRST + step % tiles * QUERIES
            q = _tile(Q, b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, q_s, b, h, row, R, D, P, QUERIES, TMA)
            do = _tile(DO, b.to(tl.int64) * do_b + h.to(tl.int64) * do_h, do_s, b, h, row, R, D, P, QUERIES, TMA)
            row_at = (b * H + h).to(tl.int64) * R + row
            lse = tl.load(LSE + row_at + r, mask=row + r < R, other=0.0)
            delta = tl.load(DELTA + row_at + r, mask=row + r < R, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            s = s * scale
            if BIAS:
                i_stands = _stands(POSITION, b, S, FIRST + row + r, row + r < R, BIAS)
                slope = _slopes(SLOPES, h)
                s += slope * (j_stands[:, None] - i_stands[None, :]).to(tl.float32)
            p = tl.exp2(s - lse[None, :])
            p = tl.where(_sees((FIRST + row + r)[None, :] - j[:, None], reach[:, None]), p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        dk_at = b.to(tl.int64) * dk_b + n.to(tl.int64) * dk_h + j.to(tl.int64) * dk_s
        dv_at = b.to(tl.int64) * dv_b + n.to(tl.int64) * dv_h + j.to(tl.int64) * dv_s
        tl.store(DK + dk_at[:, None] + d[None, :], (dk * dk_scale).to(DK.dtype.element_ty), mask=inside)
        tl.store(DV + dv_at[:, None] + d[None, :], dv.to(DV.dtype.element_ty), mask=inside)


def triton_attention(
    q_BHRD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, plan: MaskPlan, scale: float, *, bias: DistanceBias | None = None
) -> Tensor:
    """The fused kernel: [B, H, R, D], laid out in memory like the queries; a plan without an index gets one here.

    Raises ValueError for a size that it lacks, and for a plan that is not even.
    """
    if not plan.even:
        raise ValueError(
            "sep_attention: the fused kernel takes plans whose keys are seen by a window of queries or by all later "
            "ones of their document; pass backend='auto' or 'reference'"
        )
    size = q_BHRD.shape[3]
    if size > HEAD_SIZES[-1] or q_BHRD.dtype not in (torch.bfloat16, torch.float16, torch.float32) or scale <= 0:
        raise ValueError(
            f"sep_attention: the fused kernel takes head sizes to {HEAD_SIZES[-1]}, bf16, fp16 or fp32 and a positive "
            f"scale, not {size}, {q_BHRD.dtype}, {scale}; pass backend='reference'"
        )
    index = KeyIndex.of(plan) if plan.index is None else plan.index
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BHRD, k_BHSD, v_BHSD))
    max_landmarks = plan.num_keys if plan.max_landmarks is None else plan.max_landmarks
    slopes, position = (None, None) if bias is None else (bias.slopes_H, bias.position_BT)
    return sep_attention_forward(
        q, k, v, plan.reach_BT, index.seen_BT, index.sorted_2BG, plan.start_BT,
        plan.queries.start, plan.window, max_landmarks, scale, slopes, position,
    )[0]  # fmt: skip


@torch.library.custom_op("megatron_sep::sep_attention_forward", mutates_args=())
def sep_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, reach: Tensor, seen: Tensor, order: Tensor, start: Tensor | None,
    first: int, window: int, max_landmarks: int, scale: float,
    slopes: Tensor | None = None, position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the log-sum-exp (base 2) [B, H, R], and the landmarks' keys and values [B, N, max_landmarks, D]."""
    o, lse, kc, vc = _forward_outputs(q, k, v, window, max_landmarks)
    if kc.shape[2]:
        run_compact(k, v, seen, order, kc, vc)
    run_forward(
        q, k, v, kc, vc, reach, seen, order, start,
        first, window, max_landmarks, scale, o, lse, _tiles(q, k, window).forward, slopes, position,
    )  # fmt: skip
    return o, lse, kc, vc


@torch.library.custom_op("megatron_sep::sep_attention_backward", mutates_args=())
def sep_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, kc: Tensor, vc: Tensor,
    reach: Tensor, seen: Tensor, order: Tensor, start: Tensor | None, slopes: Tensor | None, position: Tensor | None,
    first: int, window: int, max_landmarks: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the queries, keys and values."""
    if do.stride(3) != 1:
        do = do.contiguous()
    tiles = _tiles(q, k, window)
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    run_query_gradient(
        q, k, v, kc, vc, reach, seen, order, start,
        first, window, max_landmarks, scale, o, do, lse, delta, dq, tiles.query_gradient, slopes, position,
    )  # fmt: skip
    run_key_gradient(q, k, v, order, first, scale, do, lse, delta, dk, dv, tiles.key_gradient, slopes, position)
    return dq, dk, dv


def _forward_outputs(q: Tensor, k: Tensor, v: Tensor, window: int, max_landmarks: int) -> tuple[Tensor, ...]:
    """Uninitialised outputs; a window as long as the sequence never needs a landmark from outside it."""
    rows = max_landmarks if window < k.shape[2] else 0
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    shape = (*k.shape[:2], rows, k.shape[3])
    return torch.empty_like(q), lse, k.new_empty(shape), v.new_empty(shape)


@sep_attention_forward.register_fake
def _(q, k, v, _reach, _seen, _order, _start, _first, window, max_landmarks, _scale, _slopes=None, _position=None):
    return _forward_outputs(q, k, v, window, max_landmarks)


@sep_attention_backward.register_fake
def _(_do, q, k, v, *_rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs, output):
    q, k, v, reach, seen, order, start, *numbers, slopes, position = inputs
    o, lse, kc, vc = output
    ctx.save_for_backward(q, k, v, o, lse, kc, vc, reach, seen, order, start, slopes, position)
    ctx.numbers = numbers
    ctx.mark_non_differentiable(lse, kc, vc)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, *_unused):
    gradients = sep_attention_backward(do, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *[None] * 10)


sep_attention_forward.register_autograd(_backward, setup_context=_keep)


def run_compact(k: Tensor, v: Tensor, seen: Tensor, order: Tensor, kc: Tensor, vc: Tensor) -> None:
    """Fill the compacted keys and values."""
    B, N, S, D = k.shape
    max_landmarks = kc.shape[2]
    _compact_kernel[(triton.cdiv(max_landmarks, GAP), B * N)](
        k, v, kc, vc, seen, order, *k.stride()[:3], *v.stride()[:3], S, N, max_landmarks,
        D=D, P=_padded(D), GAP=GAP, num_warps=8,
    )  # fmt: skip


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor,
    reach: Tensor, seen: Tensor, order: Tensor, start: Tensor | None,
    first: int, window: int, max_landmarks: int, scale: float, o: Tensor, lse: Tensor, tile: Tile,
    slopes: Tensor | None = None, position: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``o`` and ``lse``."""
    told, bias = _bias(reach, slopes, position)
    descriptors, grid, constants, options = _query_block_arguments(q, k, v, kc, vc, start, window, tile)
    _forward_kernel[grid](
        q, *descriptors, reach, seen, order, reach if start is None else start, *told, o, lse, scale * LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        k.shape[2], q.shape[2], first, window, q.shape[1], k.shape[1], q.shape[1] // k.shape[1], max_landmarks, GAP,
        **constants, **bias, **options,
    )  # fmt: skip


def run_query_gradient(
    q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor,
    reach: Tensor, seen: Tensor, order: Tensor, start: Tensor | None,
    first: int, window: int, max_landmarks: int, scale: float,
    o: Tensor, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, tile: Tile,
    slopes: Tensor | None = None, position: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``dq`` and ``delta``."""
    told, bias = _bias(reach, slopes, position)
    descriptors, grid, constants, options = _query_block_arguments(q, k, v, kc, vc, start, window, tile)
    _query_gradient_kernel[grid](
        q, *descriptors, reach, seen, order, reach if start is None else start, *told, o, do, lse, delta, dq,
        scale * LOG2_E, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *do.stride()[:3], *dq.stride()[:3],
        k.shape[2], q.shape[2], first, window, q.shape[1], k.shape[1], q.shape[1] // k.shape[1], max_landmarks, GAP,
        **constants, **bias, **options,
    )  # fmt: skip


def run_key_gradient(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, first: int, scale: float,
    do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, tile: Tile,
    slopes: Tensor | None = None, position: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``dk`` and ``dv``."""
    B, H, R, D = q.shape
    N, S = k.shape[1:3]
    tma = tile.descriptors and all(map(_describable, (q, do)))
    q_rows, do_rows = (_descriptor(x, tile.queries) for x in (q, do)) if tma else (q, do)
    blocks = triton.cdiv(S + GAP - 1, tile.keys)
    told, bias = _bias(order, slopes, position)
    _key_gradient_kernel[(B * N * blocks,)](
        q_rows, k, v, order, *told, do_rows, lse, delta, dk, dv, scale * LOG2_E, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        S, R, first, H, N, blocks, GAP,
        D=D, P=_padded(D), GROUP=H // N, QUERIES=tile.queries, KEYS=tile.keys, TMA=tma, SPAN=R != S, **bias,
        **_options(tile),
    )  # fmt: skip


def _query_block_arguments(
    q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, start: Tensor | None, window: int, tile: Tile
) -> tuple:
    """What the two kernels that own blocks of queries share: key tiles, grid, constants, launch options."""
    B, H, R, D = q.shape
    heads = _packed_heads(H // k.shape[1])
    if not kc.numel():
        kc, vc = k, v
    tensors = (k, v, kc, vc)
    tma = tile.descriptors and all(map(_describable, tensors))
    keys = [_descriptor(x, tile.keys) for x in tensors] if tma else tensors
    positions = tile.queries // heads
    constants = {
        "D": D, "P": _padded(D), "HEADS": heads, "QUERIES": tile.queries, "KEYS": tile.keys,
        "INNER": start is None and window >= positions + tile.keys, "PACKED": start is not None, "TMA": tma,
    }  # fmt: skip
    return keys, (triton.cdiv(R, positions) * B * (H // heads),), constants, _options(tile)


def _bias(unused: Tensor, slopes: Tensor | None, position: Tensor | None) -> tuple[tuple[Tensor, Tensor], dict]:
    """The two tensors of a bias, ``unused`` in the place of one that is not there, and which of them there are."""
    if slopes is None:
        return (unused, unused), {"BIAS": 0}
    return (slopes.contiguous(), unused if position is None else position.contiguous()), {
        "BIAS": 1 + (position is not None)
    }


def _options(tile: Tile) -> dict[str, int]:
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return options if tile.max_registers is None else {**options, "maxnreg": tile.max_registers}


def _tiles(q: Tensor, k: Tensor, window: int) -> Tiles:
    gpu = torch.cuda.get_device_name(q.device) if q.is_cuda else "cpu"
    return choose_tiles(gpu, _padded(q.shape[3]), k.shape[2], window, q.element_size())


def _padded(size: int) -> int:
    return next(padded for padded in HEAD_SIZES if size <= padded)


def _packed_heads(group: int) -> int:
    """Heads of a group that share a block of query rows: the largest power of two that divides the group."""
    return min(group & -group, PACKED_HEADS)


def _describable(x: Tensor) -> bool:
    """Can the tensor-memory unit read it? It wants Hopper, and addresses and strides in units of 16 bytes."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        return False
    strides = (stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1)
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe tiles of ``rows`` rows of one head; the stride of an axis of length 1 is never used, so any will do."""
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, _padded(x.shape[3])])
