"""The loss of each token: minus the log of the probability that the logits give its label."""

from typing import Protocol

from torch import Tensor


class TokenLosses(Protocol):
    """What a row of ``cross_entropy`` names."""

    def __call__(self, labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
        """fp32 [B, T]; V is the vocabulary, or this tensor-parallel rank's part of it where the row takes a part."""
        ...
