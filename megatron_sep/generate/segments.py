"""The counts of bilevel positions that a cache keeps of its texts."""

from collections.abc import Sequence

from torch import Tensor

from megatron_sep.attention.bilevel import Bilevel, Counts
from megatron_sep.generate.layout import Layout


class Segments:
    """What the next token of each text will have; a step counts on the device, so that a CUDA graph can hold it."""

    def __init__(self, bilevel: Bilevel, document_end: int | None) -> None:
        self.bilevel, self._document_end = bilevel, document_end
        self.places_BT: Tensor | None = None
        """int64: places in their segments of the tokens of the pass that runs."""
        self._counts: tuple[Counts, Counts] | None = None
        """Before the pass that runs, and after it."""

    def begin(self, ids_BT: Tensor, layout: Layout) -> Tensor:
        """The numbers of the segments of new tokens, int64 [B, T]; a pass that began before and failed is forgotten."""
        if self._counts is None:
            batch, device = len(ids_BT), ids_BT.device
            self._counts = Counts.start(batch, device), Counts.start(batch, device)
        before, after = self._counts
        ends_BT = None if self._document_end is None else ids_BT == self._document_end
        positions_2BT, counted = self.bilevel.counted(ids_BT, before, ends_BT, layout.starts_BT, layout.real_BT)
        after.take(counted)
        self.places_BT = positions_2BT[1]
        return positions_2BT[0]

    def end(self) -> None:
        """The pass counts."""
        if self._counts is not None:
            before, after = self._counts
            before.take(after)

    def put(self, rows: Sequence[int], texts: "Segments", batch: int) -> None:
        """In the place of the texts at ``rows`` of ``batch`` those of others, in their order."""
        if texts._counts is None:
            return
        device = texts._counts[0].segment_B.device
        if self._counts is None:
            self._counts = Counts.start(batch, device), Counts.start(batch, device)
        for own, other in zip(self._counts, texts._counts, strict=True):
            own.segment_B[list(rows)], own.place_B[list(rows)] = other.segment_B, other.place_B

    def select(self, rows_B: Tensor) -> None:
        """Make the texts those at these indices."""
        if self._counts is not None:
            before, after = self._counts
            self._counts = before.of(rows_B), after.of(rows_B)

    def reset(self) -> None:
        """Forget all texts."""
        self._counts = self.places_BT = None
