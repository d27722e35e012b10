"""What attention pays to which kind of key: first tokens, separators, neighbours, or the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.attention.separators import Tokens, chosen_separators
from megatron_sep.config.schema import AttentionConfig

KINDS = ("first", "separators", "window", "rest")
_FIRST, _SEPARATOR, _NEAR, _REST = range(len(KINDS))


@dataclass(frozen=True)
class KeyKinds:
    """A key is of the first kind that it fits: the first ``sinks`` of its document, a separator, one of the last
    ``window`` before the query (itself included), or of the rest."""

    sinks: int
    window: int

    def counts(self, place_BT: Tensor) -> Tensor:
        """Which queries are counted, by their places in their documents: those behind the first and near keys."""
        return place_BT >= self.sinks + self.window

    def paid(self, weights_BHQT: Tensor, place_BT: Tensor, separator_BT: Tensor, queries: range) -> Tensor:
        """What the counted queries pay to each kind, summed over rows, heads and queries, and how many those are.

        ``queries``: where they stand among the T keys; fp64 [5].
        """
        behind_BQ = self.counts(place_BT[:, queries.start : queries.stop])
        paid_BQT = weights_BHQT.sum(1, dtype=torch.float64) * behind_BQ[:, :, None]
        kind_BQT = self._kinds(place_BT, separator_BT, queries)
        sums = [(paid_BQT * (kind_BQT == kind)).sum() for kind in range(len(KINDS))]
        return torch.stack([*sums, behind_BQ.sum().double() * weights_BHQT.shape[1]])

    def _kinds(self, place_BT: Tensor, separator_BT: Tensor, queries: range) -> Tensor:
        """int64 [B, Q, T], for keys that a query sees."""
        kind_BT = torch.where(place_BT < self.sinks, _FIRST, torch.where(separator_BT, _SEPARATOR, _REST))
        key_T = torch.arange(place_BT.shape[1], device=place_BT.device)
        near_QT = key_T[queries.start : queries.stop, None] - key_T < self.window
        return torch.where(near_QT & (kind_BT == _REST)[:, None], _NEAR, kind_BT[:, None])


def counted_separators(attention: AttentionConfig, tokenizer: Tokens) -> tuple[int, ...]:
    """The ids of a run's separators, or of the paper's where it has none. Raises SeparatorError."""
    own = chosen_separators(attention, tokenizer)
    return own or chosen_separators(AttentionConfig(separators="default"), tokenizer)
