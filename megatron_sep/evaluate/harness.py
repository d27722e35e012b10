"""Tasks of lm-eval on an attached model: its harness, its Hugging Face class, and beside each task what was kept."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sep.data.extras import needs_extra
from megatron_sep.evaluate.texts import EvaluationError
from megatron_sep.generate.architecture import cache_name
from megatron_sep.generate.attach import Attachment
from megatron_sep.generate.cache import Retention

with needs_extra("lm_eval", "eval"), needs_extra("accelerate", "eval"):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

PAPER = (
    "arc_challenge", "arc_easy", "lambada_openai", "logiqa", "piqa", "sciq", "winogrande", "wsc", "wikitext", "mmlu",
    "gsm8k_cot",
)  # fmt: skip
"""The authors' tasks (arXiv 2412.12094, section 4), by the name ``paper``."""


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data were found."""

    names: tuple[str, ...]
    manager: Any
    """lm-eval's, which knows the local ones too."""


def find_tasks(asked: Sequence[str], folder: Path | None = None) -> Tasks:
    """Look tasks up and open their data, before a model is loaded; ``paper`` stands for the authors' list.

    ``folder`` has YAML of tasks, with JSON lines beside them where the hub is out of reach. Raises EvaluationError for
    a name that is unknown, and for data that cannot be had.
    """
    if folder is not None and not folder.is_dir():
        raise EvaluationError(f"--task-dir {folder}: no such directory; pass one with YAML of lm-eval's tasks")
    names = tuple(dict.fromkeys(task for name in asked for task in (PAPER if name == "paper" else (name,))))
    manager = _manager(names, folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise EvaluationError(
            f"--tasks {', '.join(unknown)}: no task of lm-eval {lm_eval.__version__}"
            f"{'' if folder is None else f' or of {folder}'}; `lm_eval ls tasks` lists them, and --task-dir adds yours"
        )
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # of the hub, of datasets, of the task's own code
            raise EvaluationError(
                f"--tasks {name}: its data cannot be had: {type(error).__name__}: {error}; without the hub, describe "
                "it with local files in --task-dir"
            ) from error
    return Tasks(names, manager)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """Of the local tasks alone where they are all that is asked for: looking through lm-eval's own takes seconds."""
    if folder is None:
        return TaskManager()
    local = TaskManager(include_path=str(folder), include_defaults=False)
    return local if set(names) <= set(local.all_subtasks) else TaskManager(include_path=str(folder))


class AttachedLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face class for a model that ``attach`` was called on.

    Log-likelihoods are of whole texts under the policy, generation goes through its cache. ``max_length``: tokens of
    the longest text, what is longer loses its begin. What the caches kept sums up in ``retention``; in a batch of
    log-likelihoods the fill behind shorter texts counts too, so it is exact with ``batch_size`` 1.
    """

    def __init__(
        self, model: Any, attachment: Attachment, tokenizer: Any, batch_size: int, max_length: int | None
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self.attachment = attachment
        self.retention = Retention(0.0, 0.0, 0.0, 0)

    @torch.no_grad()
    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        assert attn_mask is None
        assert labels is None
        cache = self.attachment.new_cache()
        logits = self.model(inps, **{cache_name(self.model): cache}).logits
        self._count(cache.retention())
        return logits

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        cache = self.attachment.new_cache()
        generation_kwargs[cache_name(self.model)] = cache
        made = super()._model_generate(context, max_length, stop, **generation_kwargs)
        self._count(cache.retention())
        return made

    def _count(self, kept: Retention) -> None:
        now = self.retention
        self.retention = Retention(now.seen + kept.seen, now.all + kept.all, now.queries + kept.queries, kept.num_bytes)


def run_task(
    lm: AttachedLM, tasks: Tasks, name: str, *, fewshot: int | None, limit: int | None, log_samples: bool = False
) -> dict[str, Any]:
    """What lm-eval measures of a task, or of each task of a group, and the retention; as JSON.

    ``samples``, if asked for, are lm-eval's own: a row for each document, with the log-likelihoods.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm.retention = Retention(0.0, 0.0, 0.0, 0)
    found = lm_eval.simple_evaluate(
        lm,
        tasks=[name],
        num_fewshot=fewshot,
        limit=limit,
        task_manager=tasks.manager,
        log_samples=log_samples,
        batch_size=lm.batch_size,
    )
    counts = {task: samples["effective"] for task, samples in found["n-samples"].items()}
    result: dict[str, Any] = {
        "metrics": {task: _numbers(values) for task, values in found["results"].items()},
        "samples": counts,
    }
    result |= {"fewshot": dict(found["n-shot"]), "versions": dict(found["versions"])}
    result |= {"retention": lm.retention.share, "live": lm.retention.live}
    return result | ({"rows": found["samples"]} if log_samples else {})


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Metrics by name, without the name of lm-eval's filter where it is ``none``."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }
