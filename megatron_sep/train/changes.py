"""What a run that goes on does differently from when its checkpoint was written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sep.config.schema import RunConfig
from megatron_sep.config.section import leaves
from megatron_sep.data.content import contents
from megatron_sep.errors import UserError

_NO_MATTER = (
    "dir",
    "metrics.",
    "parallel.",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.background",
    "checkpoint.export_every",
    "checkpoint.init_from",
    "checkpoint.init_optimizer",
    "model.init",
    "model.output_init",
    "train.steps",
    "train.eval_",
    "train.compile",
    "train.cuda_graphs",
    "train.deterministic",
    "train.recompute",
    "train.operations",
    "train.loss_chunk",
    "train.micro_batch_size",
    "train.max_skipped_steps",
    "attention.backend",
    "data.cache",
)
"""Settings that no weight of a later step depends on, by how they begin."""


class ChangedError(UserError):
    """A run that goes on with settings that it was not begun with."""


@dataclass(frozen=True)
class Began:
    """What a run was begun with, or goes on with."""

    config: RunConfig
    contents: Mapping[str, str] | None
    """Of its data, by the settings that name them; None: not written down then."""


def check_changes(then: Began, now: Began, allowed: Sequence[str]) -> list[str]:
    """The settings that change what is learnt, as `section.key: before, now after`.

    Data and tokenizer may have moved: what counts is their content. ``allowed`` are keys or sections. Raises
    ChangedError for a change that is not allowed, and for a word in ``allowed`` that is no setting.
    """
    before, after = (dict(leaves(began.config.model_dump(mode="json"))) for began in (then, now))
    strange = [word for word in allowed if not any(_covers(word, key) for key in after)]
    if strange:
        raise ChangedError(f"--allow-change {strange[0]}: no such setting or section")
    same, other = _compared(then, now)
    changes = {key: (before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys())}
    said = {
        key: f"{key}: {old}, now {new}"
        for key, (old, new) in changes.items()
        if old != new and key not in same and not key.startswith(_NO_MATTER) and not _filled_in(key, old)
    }
    said = {key: f"{key}: {after[key]} holds something else than then" for key in other if key not in said} | said
    refused = [key for key in said if not any(_covers(word, key) for word in allowed)]
    if refused:
        words = " ".join(f"--allow-change {key}" for key in refused)
        raise ChangedError(
            f"{now.config.dir}: was begun with other settings ({'; '.join(said.values())}). Set them as they were, "
            f"give another dir, or pass {words}"
        )
    return list(said.values())


def _compared(then: Began, now: Began) -> tuple[set[str], set[str]]:
    """Settings whose files hold the same as then, and those whose files hold something else."""
    before, after = then.contents, now.contents or {}
    if before is None:
        before = _contents_there(then.config)
    both = before.keys() & after.keys()
    same = {key for key in both if before[key] == after[key]}
    return same, both - same


def _contents_there(config: RunConfig) -> Mapping[str, str]:
    """Of files that a run of an older version was begun with, as far as they are where they were."""
    try:
        return contents(config.data, config.tokenizer)
    except (OSError, UserError):
        return {}


def _covers(word: str, key: str) -> bool:
    return key == word or key.startswith(f"{word}.")


def _filled_in(key: str, old: Any) -> bool:
    """Older checkpoints left the steps of the schedule to train.steps."""
    return key == "optimizer.decay_steps" and old is None
