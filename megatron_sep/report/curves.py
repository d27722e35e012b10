"""Loss curves of runs, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sep.report.picture import PictureError, check_format, labelled, pyplot, save
from megatron_sep.train.metrics import read_jsonl

Curve = tuple[list[float], list[float]]
LOSS = "loss (nats per token)"


def curve(run_dir: Path, name: str) -> Curve:
    """Steps and values of one metric of a run. Raises PictureError where the run has logged nothing yet."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise PictureError(f"{path}: no such file; name the dir of a run that has begun to train")
    lines = [line for line in read_jsonl(path) if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def plot_losses(run_dirs: Sequence[Path], path: Path) -> None:
    """Draw train and validation loss of each run against its step.

    Raises PictureError for another suffix than a picture's and for a run that logged neither.
    """
    check_format(path)
    figure, axes = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    for number, run_dir in enumerate(run_dirs):
        train, valid = curve(run_dir, "train/loss"), curve(run_dir, "valid/loss")
        if not train[0] and not valid[0]:
            raise PictureError(
                f"{run_dir / 'metrics.jsonl'}: holds no loss; train with metrics.every at most train.steps"
            )
        axes.plot(*train, color=f"C{number}", alpha=0.4, linewidth=1, label=f"{run_dir.name}, training")
        axes.plot(*valid, color=f"C{number}", marker="o", markersize=4, label=f"{run_dir.name}, validation")
    labelled(axes, "step", LOSS)
    save(figure, path, dpi=150)
