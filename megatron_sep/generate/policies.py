"""Policies that keep the tokens which drew the most attention: the baselines that Sep-Attention is measured against.

They look at the attention of their own layer, so that each layer and each of its key heads keeps other tokens. Where
query heads share a key head, the mean over them counts. Of equal scores the older token stays. Kept keys stay rotated
by their positions in the text.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d


@dataclass(frozen=True)
class H2O:
    """Heavy hitters (arXiv 2306.14048, algorithm 1), token by token.

    The score of a token is the sum of what all queries so far paid to it, its own included. After each token the
    ``recent`` newest stay and, of the others, the ``heavy`` of the largest scores; a token that left does not return.
    The next query sees these and itself, one more than ``budget``.
    """

    heavy: int
    recent: int
    positions: ClassVar[Literal["text"]] = "text"

    def __post_init__(self) -> None:
        for name, value in (("heavy", self.heavy), ("recent", self.recent)):
            if value < 0:
                raise ValueError(f"{name}={value}: must be at least 0")
        if self.budget == 0:
            raise ValueError("heavy=0, recent=0: a cache of no tokens; pass at least one of them")

    @property
    def budget(self) -> int:
        """Tokens that stay."""
        return self.heavy + self.recent

    def leaving(self, score_BKC: Tensor, place_BKC: Tensor, newest_B: Tensor) -> Tensor:
        """Which token each key head drops after the token at text position ``newest_B``: bool [B, K, C].

        ``place`` is the text position of what is in a slot, -1 where nothing is.
        """
        due_BK1 = (place_BKC >= 0).sum(-1, keepdim=True) > self.budget
        old_BKC = (place_BKC >= 0) & (place_BKC <= newest_B[:, None, None] - self.recent)
        lowest_BK1 = score_BKC.masked_fill(~old_BKC, torch.inf).amin(-1, keepdim=True)
        lowest_place_BKC = place_BKC.masked_fill(~old_BKC | (score_BKC > lowest_BK1), -1)
        return due_BK1 & old_BKC & (lowest_place_BKC == lowest_place_BKC.amax(-1, keepdim=True))


@dataclass(frozen=True)
class SnapKV:
    """What the end of the prompt looks at (arXiv 2404.14469): at most ``budget`` tokens of the prompt stay.

    The last ``window`` queries of the prompt vote with their attention for each token before them: the mean over the
    queries, then pooled over ``kernel`` neighbouring tokens, then the mean over the query heads of a key head. The
    ``budget - window`` tokens of most votes stay, and the window. Every later token stays too.

    The prompt is a text's first pass through the model and all further passes up to the first with a single token,
    which finds it compressed; cut into chunks it is the same prompt. So a text that is fed token by token has a prompt
    of one token, and a last chunk of one token is no longer part of the prompt.
    """

    budget: int
    window: int
    kernel: int
    pooling: Literal["mean", "max"] = "mean"
    positions: ClassVar[Literal["text"]] = "text"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1, or no query votes")
        if self.budget < self.window:
            raise ValueError(
                f"budget={self.budget}: must be at least window={self.window}, which always stays; "
                "pass a larger budget or a smaller window"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"kernel={self.kernel}: must be odd, so that a token stands in the middle of its neighbours"
            )
        if self.pooling not in ("mean", "max"):
            raise ValueError(f"pooling={self.pooling!r}: choose 'mean' or 'max'")

    def votes(self, q_HWD: Tensor, k_KND: Tensor, scale: float) -> Tensor:
        """Votes of the last W queries of a prompt of N tokens for the tokens before them: [K, N - W]."""
        window, length = q_HWD.shape[1], k_KND.shape[1]
        past = length - window
        q_KGWD = q_HWD.reshape(len(k_KND), -1, *q_HWD.shape[1:])
        scores_KGWN = (q_KGWD @ k_KND[:, None].mT) * scale
        ahead_WN = torch.ones(window, length, dtype=torch.bool, device=q_HWD.device).triu(past + 1)
        weights_KGWN = softmax(scores_KGWN.masked_fill(ahead_WN, -torch.inf))
        votes_KGP = weights_KGWN[..., :past].mean(2)
        pool = avg_pool1d if self.pooling == "mean" else max_pool1d  # beyond the ends there are no votes
        return pool(votes_KGP, self.kernel, stride=1, padding=self.kernel // 2).mean(1)

    def kept(self, votes_KP: Tensor) -> Tensor:
        """Which of P + window tokens each key head keeps: indices in the order of the text, int64 [K, budget]."""
        most_KE = votes_KP.sort(dim=1, descending=True, stable=True).indices[:, : self.budget - self.window]
        past = votes_KP.shape[1]
        window = torch.arange(past, past + self.window, device=votes_KP.device)
        return torch.cat([most_KE.sort(dim=1).values, window.expand(len(votes_KP), -1)], dim=1)


ScorePolicy = H2O | SnapKV
"""What decides from the attention that tokens drew which of them stay."""


def pyramid_kv(
    budget: int,
    window: int,
    kernel: int,
    beta: float,
    num_layers: int,
    pooling: Literal["mean", "max"] = "mean",
) -> list[SnapKV]:
    """PyramidKV (arXiv 2406.02069, section 4.2): SnapKV with ``budget`` tokens a layer in the mean, with the window.

    The window is the same in all layers. What goes beyond it, n = budget - window in the mean, falls linearly from
    2 n - n / beta tokens in the first layer to n / beta in the last. Rounding leaves the sum as it is.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers}: must be at least 1")
    if beta < 1:
        raise ValueError(f"beta={beta}: must be at least 1, or the pyramid stands on its head; 1 is SnapKV")
    mean = SnapKV(budget, window, kernel, pooling).budget - window
    last = mean / Fraction(beta)
    step = 2 * (mean - last) / (num_layers - 1) if num_layers > 1 else Fraction(0)
    first = mean + step * (num_layers - 1) / 2
    return [SnapKV(window + round(first - layer * step), window, kernel, pooling) for layer in range(num_layers)]


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis, in fp32 at least."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
