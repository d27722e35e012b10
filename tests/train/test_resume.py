"""A run that was killed goes on as if nothing had happened, bit for bit."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import forked
from support.saved import newest_tensors

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl

EXACT = ("train/loss", "train/lr", "train/grad_norm", "train/consumed", "train/loss_scale", "valid/loss")


def train_here(config: RunConfig) -> None:
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    train(build_run(config, topology()))


def start(config: RunConfig, path: Path) -> forked.Process:
    path.write_text(to_yaml(config))
    return forked.start("-m", "megatron_sep", "train", path, out=path.with_suffix(".log"))


def numbers(run_dir: Path) -> list[dict[str, float]]:
    return [
        {key: line[key] for key in ("step", *EXACT) if key in line} for line in read_jsonl(run_dir / "metrics.jsonl")
    ]


def assert_same_tensors(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    assert any("exp_avg_sq" in key for key in first)
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key


@pytest.mark.usefixtures("single_process")
def test_kill_and_resume_equals_one_run(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """16 steps in one run equal: some steps, SIGKILL in the middle of a step or a save, and the rest; with dropout."""
    long = {
        "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        "train": {"steps": 16},
        "checkpoint": {"every": 3},
    }
    straight, cut = tiny(**long, dir=str(tmp_path / "straight")), tiny(**long, dir=str(tmp_path / "cut"))
    assert start(straight, tmp_path / "straight.yaml").wait(timeout=120) == 0

    victim = start(cut, tmp_path / "cut.yaml")
    while len(read_jsonl(cut.dir / "metrics.jsonl")) < 10 and victim.poll() is None:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    killed_at = read_jsonl(cut.dir / "metrics.jsonl")[-1]["step"]
    assert killed_at < 16
    assert start(cut, tmp_path / "cut.yaml").wait(timeout=120) == 0

    assert numbers(cut.dir) == numbers(straight.dir)
    assert_same_tensors(newest_tensors(straight.dir), newest_tensors(cut.dir))


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopping_and_starting_changes_nothing(
    tiny: Callable[..., RunConfig], tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every precision, 6 steps at once equal 3 steps, a new start, and 3 more; fp16 with its loss scale moving."""
    from megatron_sep.train.run import Run, build_run

    train = {"steps": 6, "precision": precision, "loss_scale": {"initial": 4.0, "growth_interval": 2}}
    straight = tiny(train=train, dir=str(tmp_path / "straight"), checkpoint={"every": 3})
    train_here(straight)

    class PoweredOffError(Exception):
        pass

    def stop(run: Run) -> None:
        begin_save(run)
        run.saves.finish()
        raise PoweredOffError

    cut = straight.model_copy(update={"dir": tmp_path / "cut"})
    run = build_run(cut, topology())
    begin_save = Run.begin_save
    monkeypatch.setattr(Run, "begin_save", stop)
    from megatron_sep.train.loop import train as loop

    with pytest.raises(PoweredOffError):
        loop(run)
    monkeypatch.undo()
    train_here(cut)

    assert numbers(cut.dir) == numbers(straight.dir)
    assert_same_tensors(newest_tensors(straight.dir), newest_tensors(cut.dir))
    scales = {line["train/loss_scale"] for line in numbers(cut.dir) if "train/loss_scale" in line}
    assert (len(scales) > 1) == (precision == "fp16")
