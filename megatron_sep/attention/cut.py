"""How separators cut texts, and what they miss of what separates."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_sep.attention.separators import PAPER_SEPARATORS, Tokens, num_separators


@dataclass(frozen=True)
class Cut:
    tokens: int
    density: float
    """Share of the tokens that are separators."""
    coverage: float
    """Share of the separating characters that stand in a token that is a separator; 1 where there are none."""
    largest_gap: int
    """Tokens from one separator to the next, at most; the ends of a text count as separators."""
    missed: tuple[int, ...]
    """The tokens that hold separating characters and are no separators, those that hold the most first."""


def measure(
    documents: Iterable[Sequence[int]],
    separators: Iterable[int],
    tokenizer: Tokens,
    texts: Sequence[str] = PAPER_SEPARATORS,
) -> Cut:
    """Of the token ids of some documents; ``texts`` are what separates, as ``num_separators`` counts it."""
    known, counts, gap = frozenset(separators), Counter[int](), 0
    for ids in documents:
        counts.update(ids)
        places = [-1, *(place for place, token in enumerate(ids) if token in known), len(ids)]
        gap = max(gap, *(after - before for before, after in pairwise(places)))
    held = Counter({t: count * num_separators(tokenizer.decode([t]), texts) for t, count in counts.items()})
    missed = Counter({token: count for token, count in held.items() if count and token not in known})
    return Cut(
        tokens=counts.total(),
        density=sum(counts[token] for token in known) / max(1, counts.total()),
        coverage=1 - missed.total() / max(1, held.total()),
        largest_gap=gap,
        missed=tuple(token for token, _ in missed.most_common()),
    )
