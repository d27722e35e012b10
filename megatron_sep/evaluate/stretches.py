"""Loss of a long text, in one of two ways: window by window, or as a stream through one cache.

Both give the text as stretches of tokens, each with its loss and what the cache kept while it was read, so that any
number of tokens is measured in bounded memory. No token before the second can be predicted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_sep.evaluate.texts import EvaluationError
from megatron_sep.generate.architecture import cache_name
from megatron_sep.generate.attach import Attachment
from megatron_sep.generate.cache import Retention, SepCache


@dataclass(frozen=True)
class Stretch:
    """Tokens that were predicted, and what their queries saw."""

    end: int
    """Tokens of the text up to here."""
    tokens: int
    """That were predicted."""
    nats: float
    """Sum of their losses."""
    seen: float
    """Keys that queries saw, summed; a mean over layers. The queries that gave context count too."""
    all: float
    """The same with everything kept."""
    queries: float

    @property
    def loss(self) -> float:
        """Mean, nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def retention(self) -> float:
        """Share of the keys so far that a query saw."""
        return self.seen / self.all if self.all else 1.0


def together(stretches: Sequence[Stretch]) -> Stretch:
    """All of them as one. Raises ValueError for none."""
    if not stretches:
        raise ValueError("no stretches: nothing was predicted")
    return Stretch(
        max(each.end for each in stretches),
        sum(each.tokens for each in stretches),
        math.fsum(each.nats for each in stretches),
        math.fsum(each.seen for each in stretches),
        math.fsum(each.all for each in stretches),
        math.fsum(each.queries for each in stretches),
    )


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of a text are read at once, and of them those from ``first`` on are predicted."""

    begin: int
    end: int
    first: int


def windows(tokens: int, length: int, stride: int) -> list[Window]:
    """Windows of ``length`` tokens, each ``stride`` after the one before; the last one may be shorter.

    Every token but the first is predicted once, from at least ``length - stride`` tokens where the text has them.
    Raises EvaluationError for a length below 2, or a stride that is not from 1 to ``length - 1``.
    """
    if length < 2:
        raise EvaluationError(f"--length {length}: a window needs 2 tokens at least, one to predict the other")
    if not 0 < stride < length:
        raise EvaluationError(f"--stride {stride}: must be from 1 to {length - 1}, with windows of {length} tokens")
    found, first = [], 1
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        found.append(Window(begin, end, first))
        first = end
        if end == tokens:
            return found
    return found


def slide(
    model: torch.nn.Module, attachment: Attachment, ids_N: Tensor, chosen: Sequence[Window], batch: int
) -> Iterator[Stretch]:
    """The windows of a text [N], ``batch`` of them in a forward pass: a stretch each pass, in order.

    Windows of unequal length are never padded: they go through one after the other.
    """
    for _, alike in groupby(chosen, key=lambda window: window.end - window.begin):
        group = list(alike)
        for start in range(0, len(group), batch):
            yield _pass(model, attachment, ids_N, group[start : start + batch])


@torch.no_grad()
def _pass(model: torch.nn.Module, attachment: Attachment, ids_N: Tensor, rows: Sequence[Window]) -> Stretch:
    device = next(model.parameters()).device
    ids_BT = torch.stack([ids_N[row.begin : row.end] for row in rows]).to(device)
    cache = attachment.new_cache()
    logits_BTV = model(ids_BT, **{cache_name(model): cache}).logits
    counted_BT = torch.stack([torch.arange(row.begin + 1, row.end) >= row.first for row in rows]).to(device)
    loss_BT = _losses(logits_BTV[:, :-1], ids_BT[:, 1:])
    return _stretch(cache.retention(), rows[-1].end, int(counted_BT.sum()), float(loss_BT[counted_BT].sum()))


@torch.no_grad()
def flow(model: torch.nn.Module, attachment: Attachment, ids_N: Tensor, *, chunk: int, every: int) -> Iterator[Stretch]:
    """A text [N] through one cache, ``chunk`` tokens a pass: a stretch each ``every`` tokens, a multiple of ``chunk``.

    ``chunk`` 1 is how the model decodes; more is faster and keeps the same tokens. Raises EvaluationError.
    """
    check_stream(chunk, every)
    device = next(model.parameters()).device
    cache: SepCache = attachment.new_cache()
    before = Retention(0.0, 0.0, 0.0, 0)
    for begin in range(0, len(ids_N) - 1, every):
        end = min(begin + every, len(ids_N) - 1)
        nats = torch.zeros((), dtype=torch.float64, device=device)
        for at in range(begin, end, chunk):
            ids_1T = ids_N[None, at : min(at + chunk, end) + 1].to(device)
            nats += _losses(model(ids_1T[:, :-1], **{cache_name(model): cache}).logits, ids_1T[:, 1:]).sum()
        now = cache.retention()
        yield _stretch(now.since(before), end + 1, end - begin, float(nats))
        before = now


def check_stream(chunk: int, every: int) -> None:
    """Raises EvaluationError where ``every`` is no multiple of ``chunk``."""
    if chunk < 1 or every < 1 or every % chunk:
        raise EvaluationError(f"--every {every}: must be a multiple of --chunk {chunk}, both at least 1")


def _losses(logits_BTV: Tensor, next_BT: Tensor) -> Tensor:
    """Nats of each token, float64 [B, T]."""
    return (
        cross_entropy(logits_BTV.flatten(0, 1).float(), next_BT.flatten(), reduction="none").double().view_as(next_BT)
    )


def _stretch(kept: Retention, end: int, tokens: int, nats: float) -> Stretch:
    return Stretch(end, tokens, nats, kept.seen, kept.all, kept.queries)
