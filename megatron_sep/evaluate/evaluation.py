"""`eval`: whatever was asked of one model, in an order that tells mistakes before weights are read."""

import hashlib
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sep.evaluate.needle import Haystack, cell, make_trial
from megatron_sep.evaluate.parts import Parts
from megatron_sep.evaluate.perplexities import Reading, perplexity
from megatron_sep.evaluate.progress import Progress
from megatron_sep.evaluate.stretches import check_stream, windows
from megatron_sep.evaluate.texts import EvaluationError, Known, know, read_ids
from megatron_sep.files import read_json, versions
from megatron_sep.generate.harness_tokenizer import transformers_tokenizer
from megatron_sep.generate.session import Session, open_session
from megatron_sep.weights.identity import WEIGHTS, weights_sum

_VERSIONS = ("megatron_sep", "torch", "transformers", "lm_eval")


@dataclass(frozen=True)
class Under:
    """What the model keeps: the options of ``generate``; all None is the pattern it was trained with."""

    attention: Path | None = None
    streaming: str | None = None
    positions: str | None = None
    prefill: str | None = None


@dataclass(frozen=True)
class Asked:
    """What is measured; at least one of texts, tasks and needle."""

    texts: tuple[Path, ...] = ()
    tokens: int | None = None
    """Of each text the first so many; None: all."""
    length: int | None = None
    """Of a window; None: that of training."""
    stride: int | None = None
    """None: half of a window."""
    chunk: int | None = None
    every: int = 1000
    batch: int = 1
    """Windows, or requests of a task, in a forward pass."""
    tasks: tuple[str, ...] = ()
    task_dir: Path | None = None
    fewshot: int | None = None
    limit: int | None = None
    """Documents of a task; None: all."""
    needle: Path | None = None
    haystack: Haystack | None = None

    def reading(self, trained: int) -> Reading:
        """How texts are read by a model that was trained on so many tokens. Raises EvaluationError."""
        length = self.length or trained
        if not length:
            raise EvaluationError(
                "--length: the model's files do not say how long its training sequences were; pass it"
            )
        reading = Reading(length, self.stride or max(length // 2, 1), self.batch, self.chunk, self.every)
        if self.chunk is None:
            windows(2, reading.length, reading.stride)
        else:
            check_stream(self.chunk, self.every)
        return reading


def evaluate(model: Path, asked: Asked, under: Under, out: Path | None = None) -> dict[str, Any]:
    """Measure, keep parts beside ``out`` as they are done, and write it at the end. Returns what it holds, as JSON.

    An output that is complete is returned as it is. Raises EvaluationError, and what opening the model raises.
    """
    if not (asked.texts or asked.tasks or asked.needle):
        raise EvaluationError("nothing to evaluate: pass --text FILE, --tasks NAME or --needle FILE")
    known = know(model)
    ids = {path: read_ids(path, known, asked.tokens) for path in dict.fromkeys(asked.texts)}
    reading = asked.reading(known.trained_length) if ids else None
    hay_N = None if asked.needle is None else _hay(asked, known)
    tasks = _tasks(asked)
    parts = Parts(out, _question(model, known, asked, under, [*ids.values(), *([] if hay_N is None else [hay_N])]))
    if out is not None and parts.complete:
        return dict(read_json(out))
    session = open_session(known.place, **vars(under))
    results = describe(session)
    if reading is not None:
        results["texts"] = {str(path): perplexity(str(path), ids[path], session, reading, parts) for path in ids}
    if tasks is not None:
        results["tasks"] = _run_tasks(model, session, tasks, asked, parts)
    if hay_N is not None:
        results["needle"] = _matrix(session, hay_N, asked, parts)
    parts.finish(results)
    return results


def describe(session: Session) -> dict[str, Any]:
    """What was measured with: versions, dtype, device, and the policy of each layer."""
    model, layers, first = session.loaded.model, [], 0
    for policy, alike in groupby(session.attachment.policies):
        count = len(list(alike))
        layers.append({"layers": [first, first + count - 1], "policy": repr(policy)})
        first += count
    return {
        "versions": versions(*_VERSIONS),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "pattern": layers,
    }


def _question(model: Path, known: Known, asked: Asked, under: Under, texts: list[Tensor]) -> dict[str, Any]:
    """What results depend on, down to the content of texts, of the pattern's file and of the weights."""
    pattern = None if under.attention is None else under.attention.read_text(encoding="utf-8")
    content = [hashlib.sha256(ids_N.numpy().tobytes()).hexdigest() for ids_N in texts]
    question = {"model": str(known.place), "tokenizer": str(known.tokenizer.path)} | asdict(asked) | asdict(under)
    question = {"named": str(model)} | question | {"pattern": pattern, "content": content}
    question[WEIGHTS] = weights_sum(known.place)
    return {key: value for key, value in question.items() if value not in (None, (), [])}


def _hay(asked: Asked, known: Known) -> Tensor:
    """The text of the needle test, after a look at the longest and the shortest trial."""
    assert asked.needle is not None
    assert asked.haystack is not None
    hay_N = read_ids(asked.needle, known)
    for length in (min(asked.haystack.lengths), max(asked.haystack.lengths)):
        make_trial(known.tokenizer, hay_N, asked.haystack, length, asked.haystack.depths[0], 0)
    return hay_N


def _tasks(asked: Asked) -> Any:
    if not asked.tasks:
        return None
    from megatron_sep.evaluate.harness import find_tasks

    return find_tasks(asked.tasks, asked.task_dir)


def _run_tasks(model: Path, session: Session, tasks: Any, asked: Asked, parts: Parts) -> dict[str, Any]:
    from megatron_sep.evaluate.harness import AttachedLM, run_task

    loaded, results = session.loaded, {}
    tokenizer = transformers_tokenizer(model, loaded.tokenizer)
    lm = AttachedLM(loaded.model, session.attachment, tokenizer, asked.batch, asked.length or loaded.trained_length)
    progress = Progress("tasks", len(tasks.names), seconds=0.0)
    for number, name in enumerate(tasks.names):
        progress.update(number)
        results[name] = parts.take(
            f"task {name}",
            lambda name=name: run_task(lm, tasks, name, fewshot=asked.fewshot, limit=asked.limit),  # type: ignore[misc]
        )
    return results


def _matrix(session: Session, hay_N: Tensor, asked: Asked, parts: Parts) -> list[dict[str, float]]:
    """A cell for each length and depth."""
    haystack, loaded, cells = asked.haystack, session.loaded, []
    assert haystack is not None
    wanted = list(product(haystack.lengths, haystack.depths))
    progress = Progress("needle", len(wanted))
    progress.update(0)
    for number, (length, depth) in enumerate(wanted, 1):
        found = parts.take(
            f"needle {length} {depth}",
            lambda length=length, depth=depth: cell(  # type: ignore[misc]
                loaded.model, session.attachment, loaded.tokenizer, hay_N, haystack, length, depth
            ),
        )
        progress.update(number)
        cells.append(found)
    return cells
