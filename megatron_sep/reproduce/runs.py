"""Runs below a folder, told apart by their settings and not by their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_sep.config import RunConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.reproduce.item import TRAIN, ReproduceError
from megatron_sep.train.written import METRICS, read_jsonl
from megatron_sep.weights.identity import short
from megatron_sep.weights.sealed import Description, describe, finished_checkpoints, seal_of

VANILLA = "Vanilla"
_DEPTH = 3
"""Folders below the first that are looked through."""
Series = tuple[list[float], list[float]]
"""Steps and values."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a run left: its settings, from its newest checkpoint, and its numbers."""

    dir: Path
    description: Description
    lines: Sequence[dict[str, float]]

    @property
    def config(self) -> RunConfig:
        """Its settings."""
        return self.description.config

    @property
    def label(self) -> str:
        """The paper's name of what was trained."""
        return variant_name(self.config)

    @property
    def seed_label(self) -> str:
        """Its label and its seed."""
        return f"{self.label}, seed {self.config.train.seed}"

    @property
    def post_trained(self) -> bool:
        """Did it start from the weights of another run?"""
        return self.config.checkpoint.init_from is not None

    @property
    def step_tokens(self) -> int:
        """Of an optimizer step."""
        return self.config.train.global_batch_size * self.config.model.sequence_length

    def series(self, name: str) -> Series:
        """One number of the run by its steps."""
        lines = [line for line in self.lines if name in line]
        return [line["step"] for line in lines], [line[name] for line in lines]

    def mean(self, name: str) -> float:
        """Of one number, over its lines. Raises ReproduceError where the run logged none."""
        values = self.series(name)[1]
        if not values:
            raise ReproduceError(
                f"{self.dir / 'metrics.jsonl'}: holds no {name}; train with metrics.every at most train.steps"
            )
        return sum(values) / len(values)

    def flops_of_step(self) -> float:
        """Operations of a step, by the pairs that were visible on average; full attention: its triangle."""
        length = self.config.model.sequence_length
        sequences = self.config.train.global_batch_size
        triangle = sequences * length * (length + 1) / 2 * self.config.model.num_layers
        size = ModelSize(self.config.model, self.description.vocab_size)
        return size.training_flops(self.step_tokens, self.mean("attention/visible") * triangle)

    @property
    def step_seconds(self) -> float:
        """Of a step: the median of its status lines, so that what is compiled in the first one does not count."""
        self.mean("speed/step_seconds")  # raises where there is none
        return median(self.series("speed/step_seconds")[1])


def variant_name(config: RunConfig) -> str:
    """Such as `SepLLM n=64, H/T`: what a token sees, in the paper's words."""
    attention = config.attention
    if attention.window is None:
        return VANILLA
    separators = bool(attention.separators or attention.separator_ids)
    kind = "SepLLM" if separators else "FixLLM" if attention.stride else "StrmLLM"
    full = sorted(layer % config.model.num_layers for layer in attention.full_layers)
    hybrids = {(): "", (0,): ", H", (0, config.model.num_layers - 1): ", H/T"}
    stride = f", every {attention.stride}th token" if attention.stride else ""
    return f"{kind} n={attention.window}{stride}" + hybrids.get(tuple(full), f", full layers {full}")


def find_runs(folder: Path) -> list[Run]:
    """Every run with a checkpoint and numbers, in the folder or below it, by name. Raises ReproduceError for none."""
    dirs = [folder] + [path for depth in range(1, _DEPTH + 1) for path in sorted(folder.glob("/".join("*" * depth)))]
    found = []
    for path in dirs:
        checkpoints = finished_checkpoints(path / "checkpoints")
        if checkpoints and (path / METRICS).is_file():
            found.append(Run(path, describe(checkpoints[-1]), read_jsonl(path / METRICS)))
    if not found:
        raise ReproduceError(f"--runs {folder}: no run with a checkpoint in it or below it; {TRAIN} makes some")
    return found


def check_weights(file: Path, weights: Any, measure: str) -> None:
    """Raise ReproduceError where a file in a run's dir was measured with others than the newest weights of the run.

    ``weights``: their sum, of ``weights_sum``. None is of a version that kept none: such a file is taken as it is, and
    so is one in a dir without checkpoints. ``measure``: what makes the file.
    """
    checkpoints = finished_checkpoints(file.parent / "checkpoints")
    if weights is None or not checkpoints:
        return
    now = seal_of(checkpoints[-1])
    if weights != now:
        raise ReproduceError(
            f"{file}: was measured with other weights, {short(weights)}, than now lie in {checkpoints[-1]}, "
            f"{short(now)}; remove it, and measure anew with `{measure}`"
        )


@dataclass(frozen=True)
class Comparison:
    """Runs from scratch that learnt from the same tokens, vanilla first."""

    vanilla: Run
    others: tuple[Run, ...]
    notes: tuple[str, ...]
    """Why runs of the folder are none of them, and which are not over."""

    @property
    def all(self) -> tuple[Run, ...]:
        """Vanilla and the others."""
        return (self.vanilla, *self.others)


def comparison(folder: Path) -> Comparison:
    """The runs of a folder beside its vanilla one. Raises ReproduceError where one of the two is missing."""
    runs = [run for run in find_runs(folder) if not run.post_trained]
    vanilla = next((run for run in runs if run.label == VANILLA), None)
    if vanilla is None:
        raise ReproduceError(f"--runs {folder}: no run from scratch with attention.window null; {TRAIN} makes one")
    others: dict[str, Run] = {}
    notes = []
    for run in (run for run in runs if run is not vanilla):
        why = _difference(run, vanilla)
        if not why and run.label in (vanilla.label, *others):
            why = f"the settings of {others.get(run.label, vanilla).dir.name}"
        if why:
            notes.append(f"{run.dir.name} left out: {why}.")
        else:
            others[run.label] = run
    unfinished = [note for run in (vanilla, *others.values()) for note in _unfinished(run)]
    if not others:
        raise ReproduceError(
            f"--runs {folder}: nothing to compare {vanilla.dir.name} with; {TRAIN} makes what is missing"
        )
    return Comparison(vanilla, tuple(sorted(others.values(), key=_in_order)), (*notes, *unfinished))


def other_seeds(found: Comparison, folder: Path) -> list[Run]:
    """The runs of a folder that differ from one of a comparison in their seed alone."""
    labels = {run.label for run in found.all}
    runs = (run for run in find_runs(folder) if not run.post_trained and run.label in labels)
    return [run for run in runs if _different(run, found.vanilla) == ["train.seed"]]


def _unfinished(run: Run) -> list[str]:
    """A sentence where a run is not over."""
    step, steps = int(max(line["step"] for line in run.lines)), run.config.train.steps
    return [f"{run.dir.name} is at step {step:,} of {steps:,}; its last loss is of that step."] if step < steps else []


def _in_order(run: Run) -> tuple[int, int, int]:
    """As the paper lists them: StreamingLLM, SepLLM by its window, then hybrids, FixLLM last."""
    kinds = ("StrmLLM", "SepLLM", "FixLLM")
    return (
        kinds.index(run.label.split()[0]),
        len(run.config.attention.full_layers),
        run.config.attention.window or 0,
    )


def _difference(run: Run, vanilla: Run) -> str:
    """What else than its attention differs from vanilla; nothing: an empty string."""
    different = _different(run, vanilla)
    return f"another {', '.join(different)} than {vanilla.dir.name}" if different else ""


def _different(run: Run, vanilla: Run) -> list[str]:
    """Settings but those of attention that two runs do not share."""
    ours, theirs = run.config, vanilla.config
    parts = {
        "model": (ours.model, theirs.model),
        "data": (run.description.contents or ours.data, vanilla.description.contents or theirs.data),
        "train.global_batch_size": (ours.train.global_batch_size, theirs.train.global_batch_size),
        "optimizer": (ours.optimizer, theirs.optimizer),
        "train.steps": (ours.train.steps, theirs.train.steps),
        "train.seed": (ours.train.seed, theirs.train.seed),
    }
    return [name for name, (a, b) in parts.items() if a != b]
