"""Metrics say what happened and never stop the training."""

import json
from pathlib import Path

import pytest

from megatron_sep.config.schema import MetricsConfig
from megatron_sep.train.metrics import JsonLines, Metrics, make_metrics
from megatron_sep.train.written import read_jsonl


class Broken:
    def log(self, step: int, _: object) -> None:
        raise OSError(f"no space left at step {step}")

    def close(self) -> None:
        raise AssertionError("a sink that was left out is not called again")


def test_a_failing_sink_is_named_once_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second sink still gets every value."""
    metrics = Metrics([Broken(), JsonLines(tmp_path / "m.jsonl", 0)])
    for step in (1, 2):
        metrics.log(step, {"train/loss": step / 2})
    metrics.close()
    assert [line["train/loss"] for line in read_jsonl(tmp_path / "m.jsonl")] == [0.5, 1.0]
    assert capsys.readouterr().out.count("Broken failed and is left out: no space left at step 1") == 1


def test_lines_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    """After a kill and a resume at step 2 each step stands once; a half-written last line does no harm."""
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": s, "train/loss": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "tra')
    sink = JsonLines(path, start=2)
    sink.log(3, {"train/loss": 33.0})
    sink.close()
    assert [(line["step"], line["train/loss"]) for line in read_jsonl(path)] == [(1, 1), (2, 2), (3, 33.0)]


def test_a_run_that_starts_anew_leaves_no_old_line(tmp_path: Path) -> None:
    """Killed before its first checkpoint, a run validates at step 0 again; that line too stands once."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0, "valid/loss": 7.5}\n{"step": 1, "train/loss": 7.0}\n')
    JsonLines(path, start=0).close()
    assert read_jsonl(path) == []


def test_every_sink_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Console, JSON lines, TensorBoard and wandb (offline) all take the same values."""
    config = MetricsConfig(tensorboard=True, wandb="offline")
    metrics = make_metrics(config, tmp_path, {"a": 1}, start=0, steps=10)
    assert len(metrics.sinks) == 4
    metrics.log(5, {"train/loss": 3.25, "train/lr": 6e-4, "speed/tokens_per_second": 118_000.0})
    metrics.close()
    assert len(metrics.sinks) == 4
    assert "step 5/10  loss 3.250  lr 6.0e-04  118k tok/s" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["train/loss"] == 3.25
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
