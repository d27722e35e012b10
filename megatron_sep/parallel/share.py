"""Which tokens of a sequence a context-parallel rank holds."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Two chunks of a sequence of ``length`` tokens, cut into 2 x ``size``: one from the left and its mirror image.

    Later queries see more keys; an early and a late chunk together make the causal work of all ranks equal (the zigzag
    or head-tail order, megatron-core's too).
    """

    rank: int
    size: int
    length: int
    """Tokens of the whole sequence, a multiple of 2 x ``size``."""

    @property
    def spans(self) -> tuple[range, range]:
        """The positions of the two chunks in the sequence."""
        chunk = self.length // (2 * self.size)
        late = 2 * self.size - 1 - self.rank
        return range(self.rank * chunk, (self.rank + 1) * chunk), range(late * chunk, (late + 1) * chunk)

    def of_rank(self, rank: int) -> "Share":
        """The part of another rank of the same sequence."""
        return replace(self, rank=rank)

    def take(self, values_BT: Tensor) -> Tensor:
        """This rank's part of [B, T, ...], in the order of the text: [B, T / size, ...]."""
        return torch.cat([values_BT[:, span.start : span.stop] for span in self.spans], 1)
