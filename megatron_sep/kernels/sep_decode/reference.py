"""One decode step in plain torch, a row of the bookkeeping at a time: the truth that the fused kernel is held to.

Each row is gathered to exactly its live slots and computed alone, so its bits depend neither on its neighbours nor on
the number of slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sep.kernels.sep_decode import Rotary


def reference_decode(
    q_BHD: Tensor, k_new_BKD: Tensor, v_new_BKD: Tensor, k_BKCD: Tensor, v_BKCD: Tensor,
    length_R: Tensor, reach_end_RC: Tensor, now_R: Tensor, scale: float, rotary: Rotary | None,
    arrived_BK: Tensor | None = None, dependent: bool = False,
) -> Tensor:  # fmt: skip
    """See ``sep_decode.decode_attention``. Reads the lengths on the host; raises ValueError for a row that is full."""
    del arrived_BK, dependent
    B, H, D = q_BHD.shape
    K, C = k_BKCD.shape[1:3]
    heads = B * K // length_R.shape[0]
    out = q_BHD.new_empty(B, K, H // K, D)
    for row, length in enumerate(length_R.tolist()):
        if not 0 <= length < C:
            raise ValueError(f"sep_decode: row {row} has length {length} and {C} slots; compact it before this step")
        b, first = divmod(row * heads, K)
        own = slice(first, first + heads)
        k_BKCD[b, own, length] = k_new_BKD[b, own]
        v_BKCD[b, own, length] = v_new_BKD[b, own]
        live = reach_end_RC[row, : length + 1] > now_R[row]
        live[length] = True
        slots = live.nonzero()[:, 0]
        q, k, v = q_BHD[b].view(K, H // K, D)[own], k_BKCD[b, own][:, slots], v_BKCD[b, own][:, slots]
        angles = None if rotary is None else [table[at] for at in (length, slots) for table in rotary]
        out[b, own] = attend_one(q, k, v, scale, angles)
    return out.view(B, H, D)


def attend_one(
    q_KGD: Tensor, k_KED: Tensor, v_KED: Tensor, scale: float, angles: Sequence[Tensor] | None = None
) -> Tensor:  # fmt: skip
    """One query of each head to E entries: [K, G, D]. ``angles``: cos and sin of the query, then of the entries."""
    wide = torch.promote_types(q_KGD.dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (q_KGD, k_KED, v_KED))
    if angles is not None:
        q, k = rotate(q, *angles[:2]), rotate(k, *angles[2:])
    return (((q * scale) @ k.mT).softmax(-1) @ v).to(q_KGD.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + N/2) of the last axis by the angles of ``cos`` and ``sin`` [..., N/2]; the rest stays."""
    half = cos.shape[-1]
    one, two, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1)


def reference_compact(
    k_LBKCD: Tensor, v_LBKCD: Tensor, source_RC: Tensor, new_length_R: Tensor, due_R: Tensor
) -> None:  # fmt: skip
    """See ``sep_decode.compact``. Reads the lengths on the host."""
    B, K = k_LBKCD.shape[1:3]
    heads = B * K // new_length_R.shape[0]
    for row, (length, due) in enumerate(zip(new_length_R.tolist(), due_R.tolist(), strict=True)):
        if due:
            b, first = divmod(row * heads, K)
            source = source_RC[row, :length].long()
            for cache in (k_LBKCD[:, b, first : first + heads], v_LBKCD[:, b, first : first + heads]):
                cache[:, :, :length] = cache.index_select(2, source)
