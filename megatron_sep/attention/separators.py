"""Separators are given as text, or as a list of the authors', and become token ids through the tokenizer in use."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from megatron_sep.attention.separator_lists import LISTS
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.config.separators import ListName, SeparatorsConfig
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


def list_ids(name: ListName, tokenizer: Tokens) -> tuple[int, ...]:
    """The ids of a list of the authors' code. Raises SeparatorError for a tokenizer in which they are other texts."""
    named = LISTS[name]
    for number, text in named.texts.items():
        found = repr(tokenizer.decode([number])) if number < tokenizer.vocab_size else "no token"
        if found != repr(text):
            raise SeparatorError(
                f"attention.separators={name}: is a list for {named.tokenizer}'s tokenizer, whose token {number} is "
                f"{text!r}; in this one it is {found}. Set attention.separators={{texts: default, merged: true}}"
            )
    return tuple(named.texts)


def chosen_separators(attention: AttentionConfig, tokenizer: Tokens) -> tuple[int, ...]:
    """The ids of the separators of a configuration, each once. Raises SeparatorError.

    What begins, ends or fills up texts is refused, but for that which a list of the authors' has.
    """
    asked = attention.separators
    if isinstance(asked, str) and asked != "default":
        check_separators(attention.separator_ids, tokenizer)
        return tuple(dict.fromkeys((*list_ids(asked, tokenizer), *attention.separator_ids)))
    texts = separator_texts(attention)
    merged = merged_separators(tokenizer, texts) if isinstance(asked, SeparatorsConfig) and asked.merged else ()
    ids = tuple(dict.fromkeys((*separator_ids(texts, tokenizer), *merged, *attention.separator_ids)))
    check_separators(ids, tokenizer)
    return ids


def separator_texts(attention: AttentionConfig) -> tuple[str, ...]:
    """What separates, as text: the nine where the configuration names a list; none where it has ids alone."""
    asked = attention.separators
    texts = asked.texts if isinstance(asked, SeparatorsConfig) else asked
    return PAPER_SEPARATORS if isinstance(texts, str) else texts


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


def merged_separators(tokenizer: Tokens, texts: Sequence[str] = PAPER_SEPARATORS) -> dict[int, str]:
    """Tokens of separators, quotes and brackets alone that hold one of ``texts`` and are none: `."`, newline runs."""
    others = {ids[0] for ids in map(tokenizer.token_ids, texts) if len(ids) == 1} | tokenizer.special_ids
    beside = _CLOSING.union(PAPER_SEPARATORS, *texts)
    found = {}
    for number in range(tokenizer.vocab_size):
        text = "" if number in others else tokenizer.decode([number])
        if num_separators(text, texts) and beside.issuperset(text):
            found[number] = text
    return found


def num_separators(text: str, texts: Sequence[str] = PAPER_SEPARATORS) -> int:
    """How many of ``texts`` stand in the text of a token: the space before a word is none, a run of spaces is one."""
    if not text.strip(" "):
        return int(bool(text) and " " in texts)
    return sum(text.count(separator) for separator in texts if separator != " ")
