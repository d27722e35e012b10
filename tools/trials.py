"""Runs of the same configuration under other settings, and what is compared of them."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sep.train.written import read_jsonl


def trained(config: str, folder: Path, settings: Sequence[str], gpus: Sequence[int] = (0,)) -> Path:
    """The directory of a run that `train` made, on these of the visible GPUs; what it said is in `said.txt`.

    Raises CalledProcessError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(gpus))] if len(gpus) > 1 else []
    command = [sys.executable, *ranks, "-m", "megatron_sep", "train", config, f"dir={folder}", *settings]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [visible[gpu] if len(visible) > gpu and visible[gpu] else str(gpu) for gpu in gpus]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(names)}
    with (folder / "said.txt").open("w") as said:
        subprocess.run(command, check=True, env=environment, stdout=said, stderr=subprocess.STDOUT)
    return folder


def losses(run: Path) -> dict[int, float]:
    """Training losses by step, as logged."""
    return {int(line["step"]): line["train/loss"] for line in read_jsonl(run / "metrics.jsonl") if "train/loss" in line}


def differences(one: dict[int, float], other: dict[int, float]) -> dict[str, float]:
    """Of the losses of the same steps, in nats: the largest, the mean, and the mean of the last fifth."""
    assert one.keys() == other.keys(), (len(one), len(other))
    gaps = [other[step] - one[step] for step in sorted(one)]
    last = gaps[-max(1, len(gaps) // 5) :]
    return {
        "largest": max(abs(gap) for gap in gaps),
        "mean": statistics.fmean(gaps),
        "mean of the last fifth": statistics.fmean(last),
    }


def rates(run: Path) -> dict[str, float]:
    """Medians of the second half of a run's lines: tokens/s, ms a step; GiB that the fullest process took at most."""
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "speed/step_seconds" in line]
    late = lines[len(lines) // 2 :]
    return {
        "tokens/s": statistics.median(line["speed/tokens_per_second"] for line in late),
        "ms": statistics.median(line["speed/step_seconds"] for line in late) * 1e3,
        "GiB": late[-1].get("memory/peak_gib", float("nan")),
    }


def write(path: Path | None, found: Any) -> None:
    """As JSON, where a path was given."""
    if path:
        path.write_text(json.dumps(found, indent=1))
