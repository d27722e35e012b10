"""Thousands of prompts through a cache of some rows: a row whose text has ended takes the next prompt.

Prompts are read several at a time into a cache of their own, whose rows then move to the free rows of the one that is
decoded from. So a step always has the same rows and stores, and one CUDA graph holds it.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron_sep.data.tokenizer import Tokenizer
from megatron_sep.generate.attach import Attachment
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.decode import Decoder
from megatron_sep.generate.sampler import Sampling, padded
from megatron_sep.generate.sampling import draw_rows

PROMPT_TOKENS = 65_536
"""Tokens of prompts, padding included, that are read in one pass."""
SHARE = 16
"""A share of the rows that has to be free before prompts are read, so that several are read together."""


@dataclass(frozen=True)
class Result:
    """What became of a prompt."""

    number: int
    """Its place among the prompts, from 0."""
    prompt: str
    text: str
    tokens: int
    """That were added."""
    ended: bool
    """By the end-of-document token, which is not part of the text; else by the limit of tokens."""
    first_token_s: float
    """Seconds from the moment that it was taken up to its first token."""


@dataclass
class _Row:
    number: int
    prompt: str
    begun: float
    ids: list[int] = field(default_factory=list)
    first: float = 0.0
    ended: bool = False


class Many:
    """Continues prompts with a model that ``attach`` was called on, ``rows`` of them at a time.

    ``reserve`` is the room in tokens that each row has from the beginning: a store that grows is there twice meanwhile.
    """

    def __init__(
        self,
        attachment: Attachment,
        model: Any,
        tokenizer: Tokenizer,
        sampling: Sampling,
        rows: int,
        reserve: int = 0,
    ) -> None:
        self.attachment, self.model, self.tokenizer, self.sampling = attachment, model, tokenizer, sampling
        self.peak_bytes = 0
        """The most memory of keys and values that were held."""
        self._rows: list[_Row | None] = [None] * rows
        self._cache: SepCache = attachment.new_cache()
        self._cache.open(rows, model.device)
        self._cache.reserve(reserve)
        self._decoder = Decoder(model, self._cache)

    @torch.no_grad()
    def run(self, prompts: Iterable[tuple[int, str]]) -> Iterator[Result]:
        """Results as texts end, in any order, of prompts with their numbers.

        A text depends on its prompt, its number and the seed alone, whatever stands in the other rows.
        """
        source = iter(prompts)
        next_B1 = torch.full((len(self._rows), 1), self.tokenizer.eod_id, device=self.model.device)
        while True:
            admitted = False
            for rows, prompts_read in self._admitted(source):
                admitted = True
                logits_RV = self._read(rows, prompts_read)
                yield from self._take(rows, logits_RV, next_B1)
            busy = [index for index, row in enumerate(self._rows) if row is not None]
            if busy:
                self._rest()
                logits_BV = self._decoder.step(next_B1)
                yield from self._take(busy, logits_BV[busy], next_B1)
            elif not admitted:  # texts may end with their first token, and others still wait
                return

    def _admitted(self, source: Iterator[tuple[int, str]]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Free rows with the prompts that they take, as many as are read in one pass."""
        free = [index for index, row in enumerate(self._rows) if row is None]
        if len(free) * SHARE < len(self._rows):
            return
        taken = [(number, text, self.tokenizer.encode(text)) for number, text in islice(source, len(free))]
        chosen = sorted(taken, key=lambda each: len(each[2]))
        while chosen:
            count = _together([len(ids) for _, _, ids in chosen])
            part, chosen = chosen[:count], chosen[count:]
            rows, free = free[:count], free[count:]
            for row, (number, prompt, _) in zip(rows, part, strict=True):
                self._rows[row] = _Row(number, prompt, time.perf_counter())
            yield rows, [ids or [self.tokenizer.eod_id] for _, _, ids in part]

    def _read(self, rows: list[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts into rows: the logits after each, [R, V]."""
        ids_RT, mask_RT = padded(prompts, self.tokenizer.eod_id)
        cache, device = self.attachment.new_cache(), self.model.device
        chunk = max(2048, PROMPT_TOKENS // len(rows))
        logits_RV = Decoder(self.model, cache, graph=False).read(ids_RT.to(device), mask_RT.to(device), chunk)
        self.peak_bytes = max(self.peak_bytes, self._cache.num_bytes + cache.num_bytes)
        if self._cache.put(rows, cache):
            self._decoder.forget()
        return logits_RV

    def _take(self, rows: list[int], logits_RV: Tensor, next_B1: Tensor) -> Iterator[Result]:
        """Draw the next token of these rows, put it where the next step finds it, and end the texts that are over."""
        texts = [self._rows[row] for row in rows]
        numbers = torch.tensor([text.number for text in texts if text], device=logits_RV.device)
        counts = torch.tensor([len(text.ids) for text in texts if text], device=logits_RV.device)
        drawn_R = draw_rows(logits_RV[:, : self.tokenizer.vocab_size], self.sampling, numbers, counts)
        next_B1[torch.tensor(rows, device=drawn_R.device), 0] = drawn_R
        now = time.perf_counter()
        for row, text, token in zip(rows, texts, drawn_R.tolist(), strict=True):
            assert text is not None
            text.first = text.first or now - text.begun
            text.ended = token == self.tokenizer.eod_id
            if not text.ended:
                text.ids.append(token)
            if text.ended or len(text.ids) == self.sampling.max_tokens:
                self._rows[row] = None
                made = self.tokenizer.decode(text.ids)
                yield Result(text.number, text.prompt, made, len(text.ids), text.ended, text.first)

    def _rest(self) -> None:
        """Rows without a text hold nothing, so that what they are stepped through takes no room."""
        idle = [index for index, row in enumerate(self._rows) if row is None]
        if idle:
            self._cache.clear(idle)
        self.peak_bytes = max(self.peak_bytes, self._cache.num_bytes)


def _together(lengths: Sequence[int]) -> int:
    """How many of the first prompts, the shortest first, are read in one pass: at least one."""
    fitting = [count for count in range(1, len(lengths) + 1) if count * lengths[count - 1] <= PROMPT_TOKENS]
    return max(fitting, default=1)
