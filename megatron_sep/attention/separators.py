"""Separators are given as text and become token ids through the tokenizer in use."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from megatron_sep.errors import UserError

PAPER_SEPARATORS = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")
"""The nine characters of arXiv 2412.12094, section 4.1."""


class SeparatorError(UserError):
    """A separator that the tokenizer cannot name with one token."""


class Tokens(Protocol):
    """What the rules need of a tokenizer."""

    vocab_size: int
    eod_id: int
    """End-of-document token."""
    special_ids: frozenset[int]
    """Tokens that begin, end or fill up texts."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""
        ...

    def token_ids(self, text: str) -> list[int]:
        """The ids of ``text`` alone, with no special tokens and no space put before it."""
        ...


def separator_ids(separators: Iterable[str], tokenizer: Tokens) -> tuple[int, ...]:
    """The token id of each separator, in the order given. Raises SeparatorError, naming every one that has no id."""
    found = {text: tokenizer.token_ids(text) for text in dict.fromkeys(separators)}
    missing = [f"{text!r} is {len(ids)} tokens" for text, ids in found.items() if len(ids) != 1]
    if missing:
        raise SeparatorError(
            f"attention.separators: {', '.join(missing)} of this tokenizer; each must be exactly one. "
            "Leave it out of attention.separators, or use a tokenizer that has it"
        )
    return tuple(ids[0] for ids in found.values())


def check_separators(ids: Iterable[int], tokenizer: Tokens) -> None:
    """Raise SeparatorError for an id that the vocabulary does not have, or that begins, ends or fills up texts."""
    for number in ids:
        if not 0 <= number < tokenizer.vocab_size:
            raise SeparatorError(
                f"attention.separator_ids: {number} is no token of a vocabulary of {tokenizer.vocab_size}"
            )
        if number in tokenizer.special_ids:
            raise SeparatorError(
                f"attention.separator_ids: {number} is {tokenizer.decode([number])!r}, which begins, ends or fills up "
                "texts and is no separator; leave it out"
            )


_CLOSING = frozenset("\"'`)]}>»\u201d\u2019")
"""What a tokenizer merges with the separator before or after it."""


def merged_separators(tokenizer: Tokens) -> dict[int, str]:
    """Tokens of separators, quotes and brackets alone that are not among the nine: `."`, `,"`, newline runs, ` .`."""
    nine = {ids[0] for ids in map(tokenizer.token_ids, PAPER_SEPARATORS) if len(ids) == 1}
    found = {}
    for number in range(tokenizer.vocab_size):
        text = "" if number in nine | tokenizer.special_ids else tokenizer.decode([number])
        if has_separator(text) and all(char in PAPER_SEPARATORS or char in _CLOSING for char in text):
            found[number] = text
    return found


def has_separator(text: str) -> bool:
    """Whether one of the nine characters ends a part of the text: the space before a word does not count."""
    return any(separator in text for separator in PAPER_SEPARATORS[:6] + PAPER_SEPARATORS[7:]) or (
        bool(text) and not text.strip(" ")
    )
