"""Which tokens of a tokenizer are separators, and how a text is cut by them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_sep.attention.separators import (
    PAPER_SEPARATORS,
    SeparatorError,
    Tokens,
    check_separators,
    has_separator,
    merged_separators,
    separator_ids,
)
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer

SPARSE = 0.03
"""Below this share the text has spaces before its marks, which then hide in tokens such as ` .` and ` ,`."""


@dataclass(frozen=True)
class Cut:
    """How separators cut a text."""

    tokens: int
    density: float
    """Share of the tokens that are separators."""
    coverage: float
    """Share of the tokens with a separating character in them that are in the list."""
    largest_gap: int
    """Tokens from one separator to the next, at most; the ends of the text count as separators."""


def measure(ids: Sequence[int], separators: Sequence[int], tokenizer: Tokens) -> Cut:
    """Of a text's token ids."""
    known = set(separators)
    bears = {token: has_separator(tokenizer.decode([token])) or token in known for token in set(ids)}
    places = [-1, *(i for i, token in enumerate(ids) if token in known), len(ids)]
    bearing = sum(bears[token] for token in ids)
    found = len(places) - 2
    gap = max(b - a for a, b in pairwise(places))
    return Cut(len(ids), found / max(1, len(ids)), found / max(1, bearing), gap)


def describe_separators(path: Path, text: Path | None, merged: bool, more: Sequence[int]) -> str:
    """The list in words, ready for a configuration. Raises SeparatorError for BOS, EOS, padding and unknown ids."""
    tokenizer = load_tokenizer(path)
    nine = separator_ids(PAPER_SEPARATORS, tokenizer)
    other = merged_separators(tokenizer)
    chosen = tuple(dict.fromkeys((*(other if merged else ()), *more)))
    check_separators((*nine, *chosen), tokenizer)
    named = ", ".join(f"{separator!r}" for separator in PAPER_SEPARATORS)
    lines = [f"{named}: {list(nine)}"]
    examples = ", ".join(f"{number} {spelling!r}" for number, spelling in list(other.items())[:8])
    lines.append(f"merged ones, added by --merged: {len(other)}{f' ({examples} ...)' if other else ''}")
    if chosen:
        lines.append(f"attention: {{separators: default, separator_ids: {list(chosen)}}}")
    if text is not None:
        lines += _measured(text, (*nine, *chosen), tokenizer)
    return "\n".join(lines)


def _measured(text: Path, ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SeparatorError(f"{text}: cannot be read: {error}") from error
    cut = measure(tokenizer.encode(content), ids, tokenizer)
    lines = [
        f"{text}: {cut.tokens:,} tokens, density {cut.density:.2%}, coverage {cut.coverage:.1%}, "
        f"largest gap {cut.largest_gap} tokens"
    ]
    if cut.density < SPARSE:
        lines.append(
            f"warning: fewer than {SPARSE:.0%} of the tokens are separators; the text may be space-tokenised, so that "
            "its marks are tokens such as ' .' and ' ,': detokenise it, or add those with --merged"
        )
    return lines
