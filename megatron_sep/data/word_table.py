"""Byte-level BPE through a table of words: the ids of a text are those of its words, and most words came before.

A tokenizer of GPT-2's kind splits a text into words by one regular expression and encodes each word on its own. Here
Python's ``re`` splits, and the library encodes each distinct word once. Only text is taken whose characters every
version of Unicode treats alike (see ``_SAFE``); the rest is the library's.
"""

import re
import unicodedata
from collections.abc import Callable
from itertools import chain
from typing import Any

_RANGES = ((0x09, 0x0D), (0x20, 0x7E), (0xA1, 0x024F), (0x2010, 0x2027), (0x2030, 0x205E), (0x20AC, 0x20AC))
_SAFE = "".join(chr(code) for first, last in _RANGES for code in range(first, last + 1))
"""Latin letters, digits, common punctuation and ASCII white space: long assigned, in NFC, and none is combined."""
_LIMIT = 500_000
"""Words kept; about 100 MB."""

Ids = tuple[int, ...]


def _class(initial: str) -> str:
    return "".join(re.escape(c) for c in _SAFE if unicodedata.category(c).startswith(initial))


_LETTERS, _NUMBERS, _SPACES = _class("L"), _class("N"), r"\t\n\v\f\r "
_WORDS = re.compile(
    rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{_LETTERS}]+| ?[{_NUMBERS}]+| ?[^{_SPACES}{_LETTERS}{_NUMBERS}]+"
    rf"|[{_SPACES}]+(?![^{_SPACES}])|[{_SPACES}]+"
)
"""GPT-2's expression for the safe characters."""
_ALL_SAFE = re.compile(f"[{re.escape(_SAFE)}]*")


class WordTable:
    """The ids of words and of whole texts."""

    def __init__(self, encode: Callable[[str], list[int]], added: list[dict[str, Any]]) -> None:
        """``encode`` is the library's, of a text; ``added`` the tokens that it cuts out before it splits words."""
        self._words = _Words(encode)
        self._added = {token["content"]: (int(token["id"]),) for token in added}
        self._words.update(self._added)
        normalized = ([t["content"] for t in added if t["normalized"] == flag] for flag in (False, True))
        self._cuts = [_splitter(tokens) for tokens in normalized if tokens]

    def encode(self, text: str) -> list[int] | None:
        """The ids of ``text``, or None where it has a character that is the library's business."""
        if _ALL_SAFE.fullmatch(text) is None:
            return None
        if len(self._words) > _LIMIT:
            self._words.clear()
            self._words.update(self._added)
        words: list[str] = []
        self._split(text, 0, words)
        return list(chain.from_iterable(map(self._words.__getitem__, words)))

    def _split(self, text: str, level: int, words: list[str]) -> None:
        """Append the words of ``text``; added tokens are cut out first, level by level."""
        if level == len(self._cuts):
            words += _WORDS.findall(text)
            return
        for number, piece in enumerate(self._cuts[level].split(text)):
            if number % 2:
                words.append(piece)
            elif piece:
                self._split(piece, level + 1, words)


class _Words(dict[str, Ids]):
    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> Ids:
        ids = self[word] = tuple(self._encode(word))
        return ids


def _splitter(tokens: list[str]) -> re.Pattern[str]:
    """Cuts out these tokens, the longest first; every second piece of a split is one."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")
