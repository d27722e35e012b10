"""Needle in a haystack: is a fact that stands somewhere in a long text still known at its end?

Needles are sentences "The number of NAME is DIGITS." put between others of the text, whose end asks for one of them.
Two things are measured of the same pass: whether the right digits are likelier than nine other numbers, those of the
other needles first (``choice``, which small models can show; chance is 10 %), and whether greedy decoding writes them
(``exact``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_sep.data.tokenizer import Tokenizer
from megatron_sep.evaluate.texts import EvaluationError
from megatron_sep.generate.architecture import cache_name
from megatron_sep.generate.attach import Attachment
from megatron_sep.generate.cache import Retention
from megatron_sep.generate.decode import Decoder

NAMES = ("Lisbon", "Oslo", "Cairo", "Quito", "Hanoi", "Dublin", "Vienna", "Athens", "Havana", "Riga", "Turin", "Sofia",
         "Lagos", "Osaka", "Perth", "Dakar")  # fmt: skip
"""What needles are about."""
_CHOICES = 10


@dataclass(frozen=True)
class Haystack:
    """What is asked: a matrix of ``lengths`` in tokens by ``depths``, 0 the text's begin and 1 its end."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    keys: int = 1
    """Needles in a text; the one that is asked for stands at the depth, the others anywhere."""
    samples: int = 5
    """Texts for each length and depth."""
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [f"depth {depth:g}: must be from 0 to 1" for depth in self.depths if not 0 <= depth <= 1]
        if not 1 <= self.keys <= _CHOICES:
            wrong.append(f"keys {self.keys}: must be from 1 to {_CHOICES}")
        wrong += [f"length {length}: must be at least 1" for length in self.lengths if length < 1]
        if self.samples < 1 or not self.lengths or not self.depths:
            wrong.append("pass at least one length, one depth and one sample")
        if wrong:
            raise EvaluationError(f"needle: {'; '.join(wrong)}")


def haystack_of(lengths: str, depths: str, keys: int, samples: int, seed: int) -> Haystack:
    """Of the words of a command line, lengths and depths with commas between them. Raises EvaluationError."""
    try:
        return Haystack(
            tuple(int(part) for part in lengths.split(",")), tuple(float(part) for part in depths.split(",")),
            keys, samples, seed,
        )  # fmt: skip
    except EvaluationError:
        raise
    except ValueError as error:
        raise EvaluationError(
            f"needle: lengths {lengths} and depths {depths}: pass numbers with commas: {error}"
        ) from error


@dataclass(frozen=True)
class Trial:
    """A text with its needles, whose end asks for a number."""

    prompt: list[int]
    candidates: list[list[int]]
    """Ids of the numbers to choose from: the right one, those of the other needles, and made-up ones."""


def make_trial(tokenizer: Tokenizer, hay_N: Tensor, asked: Haystack, length: int, depth: float, sample: int) -> Trial:
    """A text of exactly ``length`` tokens, needles and question included, cut from anywhere in the hay [N].

    It depends on its arguments alone. Raises EvaluationError for hay that is too short, or a length without room.
    """
    random = Random(f"{asked.seed} {length} {depth} {sample}")
    names = random.sample(NAMES, asked.keys)
    numbers = [str(number) for number in random.sample(range(100_000, 1_000_000), _CHOICES)]
    needles = [tokenizer.encode(f" The number of {n} is {v}.") for n, v in zip(names, numbers, strict=False)]
    question = tokenizer.encode(f" The number of {names[0]} is")
    room = length - len(question) - sum(map(len, needles))
    if room < 1:
        raise EvaluationError(
            f"needle: length {length}: has no room for {asked.keys} needles; pass {length - room + 1}"
        )
    if len(hay_N) < room:
        raise EvaluationError(f"needle: length {length}: needs {room:,} tokens of text, there are {len(hay_N):,}")
    start = random.randrange(len(hay_N) - room + 1)
    hay = hay_N[start : start + room].tolist()
    places = [depth, *(random.random() for _ in needles[1:])]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        at = round(place * room)
        hay[at:at] = needle
    return Trial(hay + question, [tokenizer.encode(f" {number}") for number in numbers])


@dataclass(frozen=True)
class Found:
    """What a model made of a trial."""

    choice: bool
    """Are the right digits the likeliest?"""
    exact: bool
    """Does greedy decoding write them?"""
    retention: Retention
    """Of the text up to the question's end."""


@torch.no_grad()
def try_trial(model: Any, attachment: Attachment, trial: Trial) -> Found:
    """Read the text into a cache once, and the candidates behind it side by side."""
    device = model.device
    decoder = Decoder(model, attachment.new_cache(), graph=False)
    first_1V = decoder.read(torch.tensor([trial.prompt], device=device))
    kept = decoder.cache.retention()
    rows = len(trial.candidates)
    decoder.cache.batch_repeat_interleave(rows)
    longest = max(map(len, trial.candidates))
    ids_RT = torch.tensor([each + [each[-1]] * (longest - len(each)) for each in trial.candidates], device=device)
    real_RT = torch.tensor([[t < len(each) for t in range(longest)] for each in trial.candidates], device=device)
    logits_RTV = first_1V[:, None].expand(rows, 1, -1)
    if longest > 1:
        behind_RTV = model(ids_RT[:, :-1], **{cache_name(model): decoder.cache}).logits
        logits_RTV = torch.cat([logits_RTV, behind_RTV], dim=1)
    loss_RT = cross_entropy(logits_RTV.flatten(0, 1).float(), ids_RT.flatten(), reduction="none").view_as(ids_RT)
    nats_R = (loss_RT * real_RT).sum(1)
    written_T = (logits_RTV[0].argmax(-1) == ids_RT[0]) | ~real_RT[0]
    return Found(bool(nats_R[0] < nats_R[1:].min()), bool(written_T.all()), kept)


def cell(
    model: Any, attachment: Attachment, tokenizer: Tokenizer, hay_N: Tensor, asked: Haystack, length: int, depth: float
) -> dict[str, float]:
    """Shares of the samples of a length and depth: ``choice``, ``exact``, and the mean ``retention``."""
    trials = [make_trial(tokenizer, hay_N, asked, length, depth, sample) for sample in range(asked.samples)]
    found = [try_trial(model, attachment, trial) for trial in trials]
    return {"length": length, "depth": depth} | {
        "choice": _mean([each.choice for each in found]),
        "exact": _mean([each.exact for each in found]),
        "retention": _mean([each.retention.share for each in found]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
