"""Separators are given as text and become token ids through the tokenizer in use."""

from collections.abc import Iterable
from typing import Protocol

PAPER_SEPARATORS = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")
"""The nine characters of arXiv 2412.12094, section 4.1."""


class SeparatorError(ValueError):
    """A separator that the tokenizer cannot name with one token."""


class Tokens(Protocol):
    """What the rules need of a tokenizer."""

    vocab_size: int
    eod_id: int
    """End-of-document token."""

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
    """Raise SeparatorError for an id that the vocabulary does not have, or that ends documents."""
    for number in ids:
        if number >= tokenizer.vocab_size:
            raise SeparatorError(
                f"attention.separator_ids: {number} is no token of a vocabulary of {tokenizer.vocab_size}"
            )
        if number == tokenizer.eod_id:
            raise SeparatorError(f"attention.separator_ids: {number} ends documents and is no separator; leave it out")
