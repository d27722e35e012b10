"""Tables 4 to 8 on a model of one's own: perplexity and time of one long text under bounded caches."""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.data.tokenizer import Tokenizer
from megatron_sep.evaluate.parts import Parts
from megatron_sep.evaluate.perplexity import Score, score
from megatron_sep.evaluate.progress import Progress
from megatron_sep.evaluate.texts import know
from megatron_sep.generate.decode import compile_layers
from megatron_sep.generate.load import Loaded, load
from megatron_sep.parallel.device import current_device
from megatron_sep.reproduce.attention_mass import separators_of, sources
from megatron_sep.reproduce.cache_sizes import sep
from megatron_sep.reproduce.item import Inputs, Make, ReproduceError, Result, Row, Table
from megatron_sep.weights.identity import weights_sum

QUARTERS = (0.25, 0.5, 0.75, 1.0)
_OTHER = "another model and text"
_FIRST = 8
"""Tokens of the steps before the time is taken; no text is shorter."""
_CHARACTERS = 16
"""Of a token, at most, on average: no more of a text is read than this asks for."""


@dataclass(frozen=True)
class Stream:
    """A row of such a table."""

    name: str
    policy: AttentionPattern | StreamingPattern
    papers: tuple[float | None, ...] = (None,) * 4
    """The paper's perplexity after each quarter of its text."""
    seconds: float | None = None
    """The paper's, of the whole text."""

    def of(self, separator_ids: tuple[int, ...]) -> AttentionPattern | StreamingPattern:
        """The policy with the separators of a model, where it keeps any."""
        return replace(self.policy, separator_ids=separator_ids) if self.policy.separator_ids else self.policy


@dataclass(frozen=True)
class Measured:
    """A text under a policy."""

    perplexities: tuple[float, ...]
    """After each quarter."""
    seconds: float
    live: float
    """Tokens in the cache, on average."""


def read_tokens(path: Path | None, tokenizer: Tokenizer, tokens: int, item: str) -> Tensor:
    """The first ``tokens`` of a file, or of the *.txt of a folder one after another: int64 [1, tokens].

    Raises ReproduceError where there are fewer, or no text was named.
    """
    if path is None:
        raise ReproduceError(f"{item}: reads a long text; pass --text FILE, or a folder of *.txt such as books of PG19")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    ids: list[int] = []
    for file in files:
        ids += tokenizer.encode(_text(file)[: _CHARACTERS * (tokens - len(ids))])
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]])
    raise ReproduceError(
        f"--text {path}: has {len(ids):,} tokens, {tokens:,} are asked for; name more, or lower --tokens"
    )


def side_by_side(ids_1T: Tensor, rows: int) -> Tensor:
    """Consecutive parts of a text as rows [rows, T / rows]. Raises ReproduceError where they would differ in length."""
    tokens = ids_1T.shape[1]
    if tokens % rows or tokens // rows < 2 * len(QUARTERS):
        least = 2 * len(QUARTERS)
        raise ReproduceError(
            f"--streams {rows}: {tokens:,} tokens cannot be cut into so many of one length, each {least} or more; "
            f"pass --tokens {max(least, tokens // rows) * rows}"
        )
    return ids_1T.view(rows, -1)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ReproduceError(f"--text {file}: is no UTF-8 text: {error}") from error


def measure(model: Any, policy: AttentionPattern | StreamingPattern, ids_RT: Tensor) -> Measured:
    """Feed R texts side by side, token by token, each through a cache of its own; compilation is not timed."""
    score(model, policy, ids_RT[:, :_FIRST], 1)
    begun = time.perf_counter()
    found = score(model, policy, ids_RT, 1)
    seconds = time.perf_counter() - begun  # the losses are on the host: the device is done
    perplexities = tuple(_perplexity(found, len(ids_RT), quarter) for quarter in QUARTERS)
    return Measured(perplexities, seconds, found.retention.live - 1)


def _perplexity(found: Score, rows: int, quarter: float) -> float:
    loss_TR = found.loss_N.view(-1, rows)
    return math.exp(float(loss_TR[: max(1, round(quarter * len(loss_TR)))].mean()))


def streamed(streams: Sequence[Stream], item: str, exact: Make | None = None) -> Make:
    """Makes a table of streams on every model that is given; ``exact``: what it has without a text."""

    def make(inputs: Inputs) -> Result:
        result = Result() if exact is None else exact(inputs)
        if exact is not None and inputs.text is None:
            return result
        tables = [table for path, name in sources(inputs, item) for table in _tables(path, name, streams, inputs, item)]
        paper = "The paper's perplexities are after the same quarters of its text."
        manner = f"{_manner(inputs.streams)}; {str(_dtype()).removeprefix('torch.')}"
        note = f"Perplexity over the first {inputs.tokens:,} tokens of {inputs.text}, {manner}."
        return Result((*result.tables, *tables), (*result.notes, note, paper))

    return make


def _dtype() -> torch.dtype:
    """Of weights and caches: on a GPU that of training, where a text of millions of tokens would take twice as long."""
    return torch.bfloat16 if current_device().type == "cuda" else torch.float32


def _manner(rows: int) -> str:
    if rows == 1:
        return "one after another"
    return f"cut into {rows} streams of equal length that are read side by side, each through a cache of its own"


def _tables(path: Path, name: str, streams: Sequence[Stream], inputs: Inputs, item: str) -> list[Table]:
    place = know(path).place
    weights, loaded = weights_sum(place), load(place, current_device(), _dtype())
    ids_RT = side_by_side(read_tokens(inputs.text, loaded.tokenizer, inputs.tokens, item), inputs.streams)
    if loaded.model.device.type == "cuda":
        compile_layers(loaded.model)
    found = _all(loaded, str(path), weights, streams, ids_RT.to(loaded.model.device), inputs, item)
    tables = []
    for i, quarter in enumerate(QUARTERS):
        rows = tuple(Row(s.name, m.perplexities[i], s.papers[i], _OTHER if s.papers[i] else "") for s, m in found)
        tables.append(Table(f"{name}: perplexity after {round(quarter * inputs.tokens):,} tokens", rows))
    sizes = tuple(Row(s.name, m.live) for s, m in found)
    times = tuple(Row(s.name, m.seconds, s.seconds, "another model and GPU" if s.seconds else "") for s, m in found)
    return [*tables, Table(f"{name}: mean tokens in the cache", sizes, 1), Table(f"{name}: time (s)", times, 1)]


def _all(
    loaded: Loaded, path: str, weights: str, streams: Sequence[Stream], ids_RT: Tensor, inputs: Inputs, item: str
) -> list[tuple[Stream, Measured]]:
    """Every stream, each kept as soon as it is done: a killed call goes on with them."""
    text = hashlib.sha256(ids_RT.cpu().numpy().tobytes()).hexdigest()
    which = f"{weights}, {text}, {len(ids_RT)} side by side, {loaded.model.dtype}"
    parts = Parts(None if inputs.out is None else inputs.out / item, {"item": item})
    progress, found = Progress(f"{item} of {path}", len(streams)), []
    for number, stream in enumerate(streams, 1):
        found.append((stream, _kept(parts, which, loaded, stream, ids_RT)))
        progress.update(number)
    return found


def _kept(parts: Parts, which: str, loaded: Loaded, stream: Stream, ids_RT: Tensor) -> Measured:
    policy = stream.of(separators_of(loaded))
    value = parts.take(f"{which}, {policy}", lambda: asdict(measure(loaded.model, policy, ids_RT)))
    return Measured(**value | {"perplexities": tuple(value["perplexities"])})


def _strm(capacity: int, *papers: float, sinks: int = 4) -> Stream:
    return Stream(f"StrmLLM c={capacity}", StreamingPattern.streaming_llm(sinks, capacity - sinks), papers)


def _sep(separators: int, window: int, capacity: int, *papers: float) -> Stream:
    return Stream(f"SepLLM s={separators} w={window} c={capacity}", sep(4, separators, window, capacity), papers)


TABLE_4 = (
    _strm(324, 39.5, 38.3, 36.4, 36.1),
    _sep(32, 224, 324, 37.7, 36.6, 34.9, 34.5),
    _sep(64, 224, 324, 37.1, 36.1, 34.3, 33.9),
)
"""After 1, 2, 3 and 4 million tokens."""
TABLE_5 = (
    Stream("Vanilla", AttentionPattern(), (None, None, None, 302.6), 523.8),
    Stream("StrmLLM c=800", StreamingPattern.streaming_llm(4, 796), (None, None, None, 31.5), 341.2),
    Stream("SepLLM s=64 w=256 c=800", sep(4, 64, 256, 800), (None, None, None, 28.3), 325.8),
)
"""After 20K tokens."""
TABLE_6 = (
    _sep(32, 224, 324, 13.11, 11.31, 8.74, 8.79),
    _sep(48, 224, 324, 13.03, 11.26, 8.70, 8.76),
    _sep(64, 224, 324, 13.01, 11.17, 8.67, 8.72),
)
"""After 5K, 10K, 15K and 20K tokens, as in Tables 7 and 8."""
TABLE_7 = (
    _strm(324, 13.18, 11.51, 8.85, 8.91),
    _strm(516, 12.87, 11.37, 8.74, 8.78),
    _strm(800, 11.96, 11.01, 8.67, 8.72),
    _sep(64, 224, 324, 13.01, 11.17, 8.67, 8.72),
    _sep(64, 320, 516, 12.91, 11.26, 8.67, 8.72),
    _sep(64, 512, 800, 12.09, 11.03, 8.56, 8.62),
)


def _ablated(sinks: int, shift: bool, strm: tuple[float, ...], sepllm: tuple[float, ...]) -> tuple[Stream, Stream]:
    """Both methods with or without first tokens, positions in the cache or frozen as keys came in."""
    name = f"{'with' if sinks else 'no'} first tokens, {'positions in the cache' if shift else 'no shift'}"
    both = (StreamingPattern.streaming_llm(sinks, 324 - sinks), sep(sinks, 32, 224, 324))
    kinds = [policy if shift else replace(policy, positions="frozen") for policy in both]
    return Stream(f"StrmLLM, {name}", kinds[0], strm), Stream(f"SepLLM, {name}", kinds[1], sepllm)


TABLE_8 = (
    *_ablated(4, True, (13.2, 11.5, 8.9, 8.9), (13.1, 11.3, 8.7, 8.8)),
    *_ablated(0, True, (14.6, 13.2, 10.8, 10.9), (14.9, 14.3, 12.4, 12.5)),
    *_ablated(4, False, (425.5, 513.1, 509.5, 506.8), (192.7, 214.6, 175.0, 174.4)),
    *_ablated(0, False, (409.4, 540.5, 527.5, 558.2), (226.4, 264.7, 227.5, 228.8)),
)
