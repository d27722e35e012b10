"""Texts that come into the rows of slots and leave them, while the other rows go on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sep.generate.slots import Slots

_TABLES = ("place_RC", "reach_end_RC", "landmark_RC")
_COUNTERS = ("length_R", "seen_R", "document_R", "live_R", "full_R")


def put_texts(slots: Slots, rows: Sequence[int], texts: Slots) -> bool:
    """In the place of the texts at ``rows`` those of other slots, in their order; were stores replaced to have room?"""
    length = int(texts.length_R.max())
    replaced = slots.make_room(length) or slots.keys_LBKCD is None
    row_R, text_B = _rows_of(slots, rows), torch.tensor(rows, device=slots.device)
    for name in _TABLES:
        getattr(slots, name)[row_R, :length] = getattr(texts, name)[:, :length]
    for name in _COUNTERS:
        getattr(slots, name)[row_R] = getattr(texts, name)
    assert texts.keys_LBKCD is not None
    assert texts.values_LBKCD is not None
    if slots.keys_LBKCD is None or slots.values_LBKCD is None:
        layers, _, heads, _, size = texts.keys_LBKCD.shape
        shape = (layers, slots.batch, heads, slots.num_slots, size)
        slots.keys_LBKCD, slots.values_LBKCD = texts.keys_LBKCD.new_zeros(shape), texts.values_LBKCD.new_zeros(shape)
    for own, other in ((slots.keys_LBKCD, texts.keys_LBKCD), (slots.values_LBKCD, texts.values_LBKCD)):
        for layer in range(len(own)):
            own[layer, text_B, :, :length] = other[layer, :, :, :length]
    return replaced


def clear_texts(slots: Slots, rows: Sequence[int]) -> None:
    """Nothing in the place of the texts at ``rows``."""
    row_R = _rows_of(slots, rows)
    for name in _COUNTERS:
        getattr(slots, name)[row_R] = 0


def _rows_of(slots: Slots, texts: Sequence[int]) -> Tensor:
    """Rows of bookkeeping of these texts: int64."""
    heads = len(slots.policies)
    text_B1 = torch.tensor(texts, device=slots.device)[:, None]
    return (text_B1 * heads + torch.arange(heads, device=slots.device)).flatten()
