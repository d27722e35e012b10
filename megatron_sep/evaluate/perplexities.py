"""Perplexity of files of text under what a model's cache keeps, in parts that can be gone on from."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from megatron_sep.evaluate.parts import Parts
from megatron_sep.evaluate.progress import Progress
from megatron_sep.evaluate.stretches import Stretch, Window, flow, slide, together, windows
from megatron_sep.generate.session import Session

_PASSES = 64
"""Forward passes of windows that are kept as one part."""


@dataclass(frozen=True)
class Reading:
    """How texts are read."""

    length: int
    """Tokens of a window."""
    stride: int
    """From a window to the next."""
    batch: int = 1
    """Windows in a forward pass."""
    chunk: int | None = None
    """None: windows. Else the whole text goes through one cache, so many tokens in a pass."""
    every: int = 1000
    """Tokens of a stream after which loss and retention are recorded."""


def perplexity(name: str, ids_N: Tensor, session: Session, reading: Reading, parts: Parts) -> dict[str, Any]:
    """Of a text: loss in nats a token, perplexity, tokens that were predicted and their retention; as JSON.

    A stream adds a list of what was recorded on the way. Windows that are done are kept in ``parts``; a stream is
    kept when it is through, as its cache ends with it.
    """
    if reading.chunk is None:
        return _summary(_windows(name, ids_N, session, reading, parts))
    found = parts.take(f"stream {name}", lambda: [asdict(each) for each in _stream(name, ids_N, session, reading)])
    stretches = [Stretch(**each) for each in found]
    recorded = [
        {"tokens": each.end, "loss": each.loss, "perplexity": each.perplexity, "retention": each.retention,
         "live": each.seen / each.queries}
        for each in stretches
    ]  # fmt: skip
    return _summary(stretches) | {"recorded": recorded}


def _windows(name: str, ids_N: Tensor, session: Session, reading: Reading, parts: Parts) -> list[Stretch]:
    chosen = windows(len(ids_N), reading.length, reading.stride)
    size, found, progress = reading.batch * _PASSES, [], Progress(f"windows of {name}", len(chosen))
    for start in range(0, len(chosen), size):
        group = chosen[start : start + size]
        part = f"windows {start} to {start + len(group)} of {name}"
        value = parts.take(part, lambda g=group, s=start: _slid(ids_N, session, reading, g, s, progress))  # type: ignore[misc]
        progress.update(start + len(group))
        found.append(Stretch(**value))
    return found


def _slid(
    ids_N: Tensor, session: Session, reading: Reading, group: list[Window], before: int, progress: Progress
) -> dict[str, Any]:
    stretches = []
    for stretch in slide(session.loaded.model, session.attachment, ids_N, group, reading.batch):
        stretches.append(stretch)
        progress.update(min(before + len(stretches) * reading.batch, before + len(group)))
    return asdict(together(stretches))


def _stream(name: str, ids_N: Tensor, session: Session, reading: Reading) -> Iterator[Stretch]:
    assert reading.chunk is not None
    progress = Progress(f"tokens of {name}", len(ids_N))
    progress.update(0)
    for stretch in flow(session.loaded.model, session.attachment, ids_N, chunk=reading.chunk, every=reading.every):
        progress.update(stretch.end)
        yield stretch


def _summary(stretches: list[Stretch]) -> dict[str, Any]:
    whole = together(stretches)
    return {
        "tokens": whole.tokens,
        "loss": whole.loss,
        "perplexity": whole.perplexity,
        "retention": whole.retention,
        "live": whole.seen / whole.queries,
    }
