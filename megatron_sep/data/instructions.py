"""Instruction data: prompts and responses packed into rows, the loss on the responses alone.

JSON lines with a prompt and a response each. An example is prompt, response and the end-of-document token; a row holds
as many whole examples as fit and is filled up with end-of-document tokens. Rows are filled in the order of the file
and read in an order drawn from the seed.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sep.config.schema import InstructionsConfig
from megatron_sep.data.samples import DataError, InOrder, Order, Rows, Shuffled, SourceShare, Split
from megatron_sep.data.tokenizer import Tokenizer
from megatron_sep.files import parse_json


@dataclass(frozen=True)
class Example:
    """Tokens of one example, from its first on."""

    path: Path
    line: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"

    def record(self) -> dict[str, Any]:
        return {"path": str(self.path), "line": self.line, "tokens": self.tokens}


class Instructions:
    """Rows of packed examples, as samples of ``sequence_length`` + 1 tokens. Raises DataError, naming file and line."""

    def __init__(
        self,
        config: InstructionsConfig,
        tokenizer: Tokenizer,
        sequence_length: int,
        *,
        seed: int,
        shuffle: bool,
        part: slice = slice(0, None),
    ) -> None:
        self.name, self._eod, self._width = config.path.stem, tokenizer.eod_id, sequence_length + 1
        self._path = config.path
        self.dropped = 0
        """Examples longer than a row."""
        examples = list(self._examples(config, tokenizer, part))
        self._rows = list(_pack([len(ids) for _, ids, _ in examples], self._width))
        self._lines = [line for line, _, _ in examples]
        self._tokens = [ids for _, ids, _ in examples]
        self._prompts = [prompt for _, _, prompt in examples]
        self.num_samples = len(self._rows)
        if not self._rows:
            raise DataError(f"{config.path}: no example that fits into {sequence_length} tokens in this split")
        self._order: Order = Shuffled(self.num_samples, seed) if shuffle else InOrder(self.num_samples)

    def take(self, first_sample: int, count: int, batch: range | None = None) -> Rows:
        """Samples [first_sample, first_sample + count); prompts and what fills a row up have no weight."""
        ids = np.full((count, self._width), self._eod, np.int64)
        for row, start, number in self._placed(first_sample, count):
            ids[row, start : start + len(self._tokens[number])] = self._tokens[number]
        whole = range(first_sample, first_sample + count) if batch is None else batch
        share = max(float(self._learnt(whole.start, len(whole))[:, 1:].mean()), 1e-9)  # no example: nothing is learnt
        return Rows(ids, self._learnt(first_sample, count) / np.float32(share))

    @property
    def num_distinct(self) -> int:
        """All of an epoch."""
        return self.num_samples

    def labels(self, batch: range) -> int:
        """Tokens of the responses and the ends of their documents."""
        return int(self._learnt(batch.start, len(batch))[:, 1:].sum())

    def notes(self) -> list[str]:
        """Examples, tokens and rows, and how many examples were left out; none is ever cut."""
        tokens = sum(map(len, self._tokens))
        learnt = tokens - sum(self._prompts)
        return [
            f"{self._path}: {len(self._tokens):,} examples of {tokens:,} tokens, {learnt:,} of them learnt, in "
            f"{self.num_samples:,} sequences; {self.dropped:,} dropped as longer than a sequence, none cut"
        ]

    def _learnt(self, first_sample: int, count: int) -> npt.NDArray[np.float32]:
        """1 at the tokens to be learnt, else 0: [count, T + 1]."""
        learnt = np.zeros((count, self._width), np.float32)
        for row, start, number in self._placed(first_sample, count):
            learnt[row, start + self._prompts[number] : start + len(self._tokens[number])] = 1
        return learnt

    def shares(self, consumed: int) -> list[SourceShare]:
        """All of the samples are from this file."""
        return [SourceShare(self.name, 1.0, 1.0, consumed, consumed / self.num_samples)]

    def origins(self, index: int) -> list[Example]:
        """The examples of the first T tokens of sample ``index``; what fills the row up is from none."""
        return [
            Example(self._path, self._lines[number], min(len(self._tokens[number]), self._width - 1 - start))
            for _, start, number in self._placed(index, 1)
        ]

    def _placed(self, first_sample: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Row, offset in it and number of each example of some samples."""
        places = self._order(np.arange(first_sample, first_sample + count, dtype=np.int64))
        for row, place in enumerate(places.tolist()):
            start = 0
            for number in self._rows[place]:
                yield row, start, number
                start += len(self._tokens[number])

    def _examples(
        self, config: InstructionsConfig, tokenizer: Tokenizer, part: slice
    ) -> Iterator[tuple[int, npt.NDArray[np.int32], int]]:
        """The line of each example, its ids, and how many of them are the prompt."""
        for number, prompt, response in islice(_records(config), part.start, part.stop):
            question, answer = _encoded(config, tokenizer, prompt, response)
            ids = [*question, *answer, tokenizer.eod_id]
            if config.special_tokens == "text" and tokenizer.eod_id in answer:
                raise DataError(
                    f"{config.path}, line {number}: its response has the end-of-document token in it, which this "
                    "tokenizer does not take for special; take it out, or set data.instructions.special_tokens: tokens"
                )
            if len(ids) <= self._width:
                yield number, np.array(ids, np.int32), len(question)
            elif config.on_long == "drop":
                self.dropped += 1
            else:
                raise DataError(
                    f"{config.path}, line {number}: {len(ids)} tokens do not fit into a sequence of {self._width - 1}; "
                    "raise model.sequence_length, or set data.instructions.on_long: drop"
                )


def _encoded(
    config: InstructionsConfig, tokenizer: Tokenizer, prompt: str, response: str
) -> tuple[list[int], list[int]]:
    """The ids of the prompt in its template, and of the response. The template's own special tokens are tokens."""
    if config.special_tokens == "tokens":
        return tokenizer.encode(config.template.replace("{prompt}", prompt)), tokenizer.encode(response)
    question: list[int] = []
    for piece in _cut_at(config.template, tokenizer.special_texts):
        if piece in tokenizer.special_texts:
            question.append(tokenizer.special_texts[piece])
        else:
            question += tokenizer.encode_plain(piece.replace("{prompt}", prompt))
    return question, tokenizer.encode_plain(response)


def _cut_at(text: str, marks: Iterable[str]) -> list[str]:
    """The text in pieces, each mark a piece of its own."""
    longest_first = sorted(marks, key=len, reverse=True)
    if not longest_first:
        return [text]
    return [piece for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if piece]


def instructions_of(
    config: InstructionsConfig, split: Split, sequence_length: int, tokenizer: Tokenizer, seed: int, shuffle: bool
) -> Instructions:
    """The examples of one split; validation is the end of the file, read in order. Raises DataError."""
    total = sum(1 for _ in _records(config))
    first = total - math.ceil(total * config.valid)
    part = slice(first, None) if split == "valid" else slice(0, first)
    return Instructions(config, tokenizer, sequence_length, seed=seed, shuffle=shuffle and split == "train", part=part)


def _records(config: InstructionsConfig) -> Iterator[tuple[int, str, str]]:
    try:
        with config.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, *_texts(config, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{config.path}: cannot be read: {error}") from error


def _texts(config: InstructionsConfig, number: int, line: str) -> tuple[str, str]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise DataError(f"{config.path}, line {number}: is no JSON: {error}") from error
    found = []
    for key in (config.prompt, config.response):
        text = record.get(key) if isinstance(record, dict) else None
        if not isinstance(text, str) or not text:
            raise DataError(f"{config.path}, line {number}: has no text under {key!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\ud800" in JSON is half of a character
            raise DataError(f"{config.path}, line {number}: {key!r} is no valid Unicode: {error.reason}") from error
        found.append(text)
    return found[0], found[1]


def _pack(lengths: list[int], width: int) -> Iterator[list[int]]:
    """Numbers of the examples of each row, in order."""
    row: list[int] = []
    used = 0
    for number, length in enumerate(lengths):
        if row and used + length > width:
            yield row
            row, used = [], 0
        row.append(number)
        used += length
    if row:
        yield row
