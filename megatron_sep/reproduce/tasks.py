"""Table 2's tasks, of what `megatron_sep eval --tasks` left in the dirs of runs."""

from collections.abc import Sequence

from megatron_sep.files import parse_json
from megatron_sep.reproduce.item import ReproduceError, Row, Table
from megatron_sep.reproduce.runs import Run, check_weights
from megatron_sep.weights.identity import WEIGHTS

FILE = "tasks.json"
MEASURE = f"megatron_sep eval RUN --tasks NAMES --task-dir configs/reproduce/tasks --out RUN/{FILE}"
"""What makes the file of a run."""
COLUMNS = {
    "ARC-c": ("arc_challenge", "acc"),
    "ARC-e": ("arc_easy", "acc"),
    "LBD-ppl": ("lambada_openai", "perplexity"),
    "LBD-acc": ("lambada_openai", "acc"),
    "LogiQA": ("logiqa", "acc"),
    "PIQA": ("piqa", "acc"),
    "SciQ": ("sciq", "acc"),
}
"""Task and metric of lm-eval by the paper's name of the column."""
_NUMBERS = {
    "Vanilla": (20.14, 46.80, 34.83, 33.28, 23.81, 62.84, 81.50),
    "StrmLLM n=64": (20.65, 47.39, 44.03, 26.74, 21.97, 63.82, 75.80),
    "SepLLM n=64": (19.62, 46.46, 40.08, 28.97, 26.42, 63.82, 80.10),
    "SepLLM n=128": (19.97, 47.35, 30.16, 33.18, 22.73, 64.64, 82.60),
    "SepLLM n=64, H": (20.73, 48.44, 36.54, 30.45, 25.35, 64.36, 80.60),
    "SepLLM n=64, H/T": (21.42, 47.26, 33.41, 32.80, 22.73, 63.98, 81.20),
}
PUBLISHED = {model: dict(zip(COLUMNS, numbers, strict=True)) for model, numbers in _NUMBERS.items()}
"""Table 2's numbers by model and column."""
_LOCAL = "_local"
"""Ends the name of a task of ``configs/reproduce/tasks``."""
Measured = dict[str, dict[str, float]]
"""Metrics by task."""


def tables_of(runs: Sequence[Run], other_seeds: Sequence[Run] = ()) -> tuple[Table, ...]:
    """A table for each column that one of the runs was measured in; none where none was."""
    named = [(run.label, run) for run in runs] + [(run.seed_label, run) for run in other_seeds]
    measured = [(name, run, found) for name, run in named if (found := metrics_of(run)) is not None]
    tables = []
    for column, (task, metric) in COLUMNS.items():
        rows = tuple(
            _row(name, run, found[task], metric, column)
            for name, run, found in measured
            if metric in found.get(task, {})
        )
        if rows:
            unit = "perplexity" if metric == "perplexity" else "%"
            tables.append(Table(f"{column}: {task} ({unit})", rows))
    return tuple(tables)


def metrics_of(run: Run) -> Measured | None:
    """What was measured of a run; None: nothing. Raises ReproduceError for a file of something else, or of others of
    its weights than the newest."""
    path = run.dir / FILE
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        weights = found.get("question", {}).get(WEIGHTS)
        metrics = {
            task.removesuffix(_LOCAL): {metric: float(value) for metric, value in values.items()}
            for each in found["tasks"].values()
            for task, values in each["metrics"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReproduceError(f"{path}: is no file of `{MEASURE}`: {error!r}") from error
    check_weights(path, weights, MEASURE)
    return metrics


def _row(name: str, run: Run, metrics: dict[str, float], metric: str, column: str) -> Row:
    scale = 1 if metric == "perplexity" else 100
    paper = PUBLISHED.get(run.label, {}).get(column)
    error = metrics.get(f"{metric}_stderr")
    why = "300 B tokens there" + ("" if error is None else f"; standard error {scale * error:.2f}")
    return Row(name, scale * metrics[metric], paper, why)
