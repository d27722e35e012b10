"""A plan is held to what was measured; it needs no torch, and says what does not fit and why."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.measured import SEPARATOR_SHARE, VOCAB, Measured, measured_steps

from megatron_sep.config.gpus import find_gpu
from megatron_sep.config.load import Sketch
from megatron_sep.config.needs import Needs
from megatron_sep.config.schema import RunConfig
from megatron_sep.config.speeds import speeds_of
from megatron_sep.config.step_time import StepTime
from megatron_sep.report.plan import Machines, PlanError, plan
from megatron_sep.report.plan_layouts import choices, fastest

MEASURED = list(measured_steps())
CONFIGS = Path(__file__).parents[2] / "configs"


def run(**sections: Any) -> RunConfig:
    """A 160m run with no place for its data."""
    tree = {"dir": "run", "tokenizer": {"path": "none"}, "data": {"path": "none"}, "model": {"vocab_size": 50304}}
    return RunConfig.model_validate(tree | sections)


def said(config: RunConfig, gpus: int = 1, kind: str = "h100", **more: Any) -> list[str]:
    return list(plan(Sketch(config, {}), Machines(gpus, kind, more.get("price"), more.get("share", 0.15))))


@pytest.mark.parametrize("step", [step for step in MEASURED if step.gib], ids=str)
def test_memory_is_within_a_tenth_of_what_was_measured(step: Measured) -> None:
    """Weights, gradients, optimizer and what the passes keep, tensor by tensor."""
    assert Needs(step.config, VOCAB, 1).device_bytes / 2**30 == pytest.approx(step.gib, rel=0.10)


@pytest.mark.parametrize("step", MEASURED, ids=str)
def test_a_step_is_within_15_percent_of_what_was_measured(step: Measured) -> None:
    """From the measured speeds of its parts."""
    needs = Needs(step.config, VOCAB, 1)
    time = StepTime(needs, find_gpu(step.kind), speeds_of(step.kind), SEPARATOR_SHARE)
    assert time.seconds * 1e3 == pytest.approx(step.milliseconds, rel=0.15)
    assert time.seconds == pytest.approx(sum(time.parts.values()))


def test_six_steps_at_least_were_measured() -> None:
    """In time; in memory four."""
    assert len(MEASURED) >= 6
    assert sum(step.gib is not None for step in MEASURED) >= 4


def test_no_torch_is_needed(tmp_path: Path) -> None:
    """On a login node where it cannot be imported, and without data, tokenizer or a place to write to."""
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['megatron_sep', *sys.argv[1:]];"
        "from megatron_sep.cli import main; main()"
    )
    words = ["plan", CONFIGS / "runs" / "pythia-160m-sep-n64.yaml", "--gpus", "8", "--price", "2"]
    found = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    for text in ("162,322,944 parameters", "GPU-hours; at 2 an hour", "suggested: parallel.tensor=1", "of the full"):
        assert text in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_marked_and_a_layout_that_does_is_suggested() -> None:
    """12 billion weights on 8 GPUs of 80 GB: not whole on each, but split."""
    model = {"num_layers": 36, "hidden_size": 5120, "num_attention_heads": 40, "vocab_size": 50688}
    lines = said(run(model=model), 8)
    assert [line for line in lines if line.startswith("!")] == [
        "! does not fit: 92% of a GPU can be filled; a layout that fits stands below, if there is one"
    ]
    assert any(line.startswith("  parallel.tensor=1 parallel.pipeline=1: does not fit: takes ") for line in lines)
    (suggested,) = [line for line in lines if line.startswith("suggested: ")]
    tree = {"dir": "run", "tokenizer": {"path": "none"}, "data": {"path": "none"}, "model": model}
    for word in suggested.removeprefix("suggested: ").split():
        place, _, value = word.partition("=")
        section, name = place.split(".")
        tree.setdefault(section, {})[name] = json.loads(value)
    again = said(RunConfig.model_validate(tree), 8)
    assert not any(line.startswith("!") for line in again)


def test_a_layout_that_does_not_divide_the_job_is_marked() -> None:
    """With the words of the trainer itself."""
    lines = said(run(parallel={"tensor": 4}), 6)
    assert any(line.startswith("! parallel.tensor=4 x parallel.context=1") for line in lines)
    assert not any(line.startswith("memory") for line in lines)
    assert "! no layout can be: change what does not divide, or take another number of GPUs" in said(run(), 7)


def test_what_is_configured_is_among_the_layouts() -> None:
    """Three stages and micro-batches of three, which are no powers of two."""
    train = {"global_batch_size": 99, "micro_batch_size": 3}
    lines = said(run(parallel={"pipeline": 3}, train=train), 3)
    assert any(line.startswith("  parallel.tensor=1 parallel.pipeline=3 train.micro_batch_size=") for line in lines)


def test_less_memory_is_planned_for_where_less_is_kept() -> None:
    """Recomputation, a chunked loss, a smaller micro-batch, ZeRO's stages and tensor parallelism, one by one."""
    whole = run(attention={"window": 64, "separators": "default"})
    base = Needs(whole, 50304, 8)
    changes: list[dict[str, Any]] = [
        {"train": {"recompute": "selective"}},
        {"train": {"recompute": True}},
        {"train": {"loss_chunk": 1024}},
        {"train": {"micro_batch_size": 8}},
        {"parallel": {"engine": "deepspeed", "zero_stage": 3}},
        {"parallel": {"tensor": 2}},
        {"attention": {"window": 64, "sinks": 3}},
    ]
    for change in changes:
        sections = {"attention": {"window": 64, "separators": "default"}} | change
        assert Needs(run(**sections), 50304, 8).device_bytes < base.device_bytes, change


def test_a_slower_layout_takes_longer() -> None:
    """A bubble, layers computed twice, and sequences that others must send: each is a part of the time."""
    gpu, speeds = find_gpu("h100"), speeds_of("h100")

    def parts(gpus: int, **sections: Any) -> dict[str, float]:
        return StepTime(Needs(run(**sections), 50304, gpus), gpu, speeds, 0.15).parts

    alone = parts(1)
    assert set(alone) == {"matrix products", "attention", "norms, activation, loss", "optimizer"}
    assert parts(1, train={"recompute": True})["matrix products"] > 1.2 * alone["matrix products"]
    assert parts(4, parallel={"pipeline": 4})["pipeline bubble"] > 0
    full, sep = (parts(8, parallel={"context": 8}, attention=a) for a in ({}, {"window": 64, "sinks": 3}))
    assert full["communication"] > sep["communication"] > 0
    one, three = (parts(8, parallel={"engine": "deepspeed", "zero_stage": stage}) for stage in (1, 3))
    assert three["communication"] > one["communication"] > 0


def test_no_layout_fits_where_one_sequence_is_too_long() -> None:
    """It says so, and what would help."""
    large = {"num_layers": 96, "hidden_size": 12288, "num_attention_heads": 96, "vocab_size": 50304}
    lines = said(run(model=large))
    assert "! no layout fits: take more GPUs, or a smaller model or sequence" in lines
    needs = Needs(run(model=large), 50304, 1)
    assert fastest(choices(needs, find_gpu("l40s"), speeds_of("l40s"), 0.15)) is None


def test_what_cannot_be_planned_is_refused() -> None:
    """A vocabulary that nobody knows, no GPU, a share that is none; of fp32 no time is told."""
    with pytest.raises(PlanError, match=r"tokenizer.path=none is not there; set model.vocab_size"):
        said(run(model={}))
    with pytest.raises(PlanError, match=r"--gpus 0: is no number of GPUs"):
        said(run(), 0)
    with pytest.raises(PlanError, match=r"--separator-share 1.5: is no share between 0 and 1"):
        said(run(), share=1.5)
    assert any(line.startswith("time: not known") for line in said(run(train={"precision": "fp32"})))
