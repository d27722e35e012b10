"""Bilevel positions (BiPE, arXiv 2401.16421): the number of a token's segment, and its place in the segment.

Separators cut a document into segments, and each belongs to the segment that it ends. A document's first token has
segment 0 and place 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.attention.pattern import is_separator


@dataclass(frozen=True, eq=False)
class Counts:
    """What the next token of each text would have: int64 [B] each."""

    segment_B: Tensor
    place_B: Tensor

    @classmethod
    def start(cls, batch: int, device: torch.device) -> "Counts":
        """Of texts that have not begun."""
        return cls(*torch.zeros(2, batch, dtype=torch.int64, device=device))

    def take(self, other: "Counts") -> None:
        """Become what ``other`` is, in the same memory: a CUDA graph may hold it."""
        self.segment_B.copy_(other.segment_B)
        self.place_B.copy_(other.place_B)

    def of(self, rows_B: Tensor) -> "Counts":
        """Of the texts at these indices."""
        rows_B = rows_B.to(self.segment_B.device)
        return Counts(self.segment_B[rows_B], self.place_B[rows_B])


@dataclass(frozen=True)
class Bilevel:
    """How the tokens of a model are counted."""

    separator_ids: tuple[int, ...]
    """What ends a segment."""
    length: int
    """Learned places: a token beyond the last one has the last one."""

    def positions(self, ids_BT: Tensor, document_end: int | None = None) -> Tensor:
        """Segments and places of whole rows: int64 [2, B, T]. Both begin again after ``document_end``."""
        ends_BT = None if document_end is None else ids_BT == document_end
        return self.counted(ids_BT, Counts.start(len(ids_BT), ids_BT.device), ends_BT)[0]

    def counted(
        self,
        ids_BT: Tensor,
        before: Counts,
        ends_BT: Tensor | None = None,
        starts_BT: Tensor | None = None,
        real_BT: Tensor | None = None,
    ) -> tuple[Tensor, Counts]:
        """``positions`` of the tokens that follow those counted ``before``, and the counts after them.

        bool [B, T]: ``ends`` where a document ends, ``starts`` where one begins, ``real`` where there is no padding,
        which counts for nothing. Nothing waits for the host.
        """
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if real_BT is None else real_BT
        none_BT = torch.zeros_like(real_BT)
        separator_BT = is_separator(ids_BT, self.separator_ids) & real_BT
        ends_BT = none_BT if ends_BT is None else ends_BT & real_BT
        starts_BT = none_BT if starts_BT is None else starts_BT & real_BT
        segment_BT, segment_B = _since(separator_BT, ends_BT, starts_BT, before.segment_B)
        place_BT, place_B = _since(real_BT, ends_BT | separator_BT, starts_BT, before.place_B)
        return torch.stack([segment_BT, place_BT.clamp(max=self.length - 1)]), Counts(segment_B, place_B)


def _since(counted_BT: Tensor, resets_BT: Tensor, starts_BT: Tensor, before_B: Tensor) -> tuple[Tensor, Tensor]:
    """How many are counted before each token: since the last reset before it, or the last start up to it; [B, T], [B].

    ``before``: counted before the first token. The second result is that of the token after the last one.
    """
    before_B1 = -before_B[:, None]
    after_BT = counted_BT.cumsum(1)
    so_far_BT = after_BT - counted_BT.long()
    reset_BT = torch.where(resets_BT, after_BT, before_B1)
    base_BT = torch.cat([before_B1, reset_BT[:, :-1]], 1)
    base_BT = torch.maximum(base_BT, torch.where(starts_BT, so_far_BT, before_B1)).cummax(1).values
    last_B = torch.maximum(base_BT[:, -1], reset_BT[:, -1])
    return so_far_BT - base_BT, after_BT[:, -1] - last_B
