"""Text from a model, one token at a time, for a batch of prompts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sep.data.tokenizer import Tokenizer
from megatron_sep.errors import UserError
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.decode import Decoder


class SamplingError(UserError):
    """Sampling settings out of range."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0: the likeliest."""

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    """Draw from the k likeliest; 0: from all."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens whose probabilities reach p."""
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (
                0 <= self.temperature < math.inf,
                "a finite number of at least 0, where 0 is the likeliest",
            ),
            "top_k": (self.top_k >= 0, "at least 0, where 0 draws from all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        }
        wrong = [f"{name}={getattr(self, name)}: must be {way}" for name, (right, way) in bounds.items() if not right]
        if wrong:
            raise SamplingError("; ".join(wrong))


@dataclass
class Continuation:
    """One text of a batch as it grows. A token is decoded with the last few alone, however long the text is."""

    tokenizer: Tokenizer
    random: torch.Generator
    ids: list[int] = field(default_factory=list)
    shown: str = ""
    done: bool = False
    _before: int = 0
    """Tokens before those that the next piece is decoded with."""
    _complete: int = 0
    """Tokens whose text was given."""

    def add(self, token: int) -> str:
        """Take a token; returns the text that is new with it. The end-of-document token ends the text."""
        if self.done or token == self.tokenizer.eod_id:
            self.done = True
            return ""
        self.ids.append(token)
        known = self.tokenizer.decode(self.ids[self._before : self._complete])
        text = self.tokenizer.decode(self.ids[self._before :])
        if text.endswith("\ufffd") or len(text) <= len(known):  # half of a character
            return ""
        self._before, self._complete = self._complete, len(self.ids)
        new = text[len(known) :]
        self.shown += new
        return new


@torch.no_grad()
def stream(
    decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """The continuations of the prompts, as pairs of a prompt's number and the next piece of its text.

    A prompt's continuation depends on it and the seed alone, whatever stands beside it in the batch.
    """
    ids_BT, mask_BT = padded([tokenizer.encode(prompt) or [tokenizer.eod_id] for prompt in prompts], tokenizer.eod_id)
    device = decoder.model.device
    texts = [Continuation(tokenizer, torch.Generator().manual_seed(sampling.seed)) for _ in prompts]
    logits_BV = decoder.read(ids_BT.to(device), mask_BT.to(device))
    for number in range(sampling.max_tokens):
        rows = logits_BV[:, : tokenizer.vocab_size].float().cpu()
        tokens = [
            tokenizer.eod_id if text.done else draw(row, sampling, text.random)
            for row, text in zip(rows, texts, strict=True)
        ]
        for index, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            piece = text.add(token)
            if piece:
                yield index, piece
        if all(text.done for text in texts) or number + 1 == sampling.max_tokens:
            return
        logits_BV = decoder.step(torch.tensor(tokens, device=device)[:, None])


def draw(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """A token from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, token = (logits / sampling.temperature).softmax(0).sort(descending=True)
    before = ordered.cumsum(0) - ordered
    keep = before < sampling.top_p
    if sampling.top_k:
        keep[sampling.top_k :] = False
    return int(token[torch.multinomial(ordered * keep, 1, generator=random)])


def cache_lines(cache: SepCache, formula: float | None) -> str:
    """What the cache holds, by block, and what it held on average; ``formula``: the paper's mean size in tokens."""
    kept, lines = cache.retention(), []
    for layers, blocks in cache.blocks():
        parts = " + ".join(f"{name} {count:,.0f}" for name, count in blocks.items() if count)
        lines.append(f"cache of {layers} layers: {parts or 'nothing'} of {cache.seen:,.0f} tokens")
    mean = f"on average a token saw {kept.live:,.1f} of {kept.full:,.1f} ({kept.share:.1%})"
    mean += f"; {kept.num_bytes / 2**20:,.1f} MiB"
    lines.append(mean if formula is None else f"{mean}; (a+s+w+c)/2 = {formula:,.1f}")
    return "\n".join(lines)


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] of texts of unequal length, padded on the left."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[fill] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
