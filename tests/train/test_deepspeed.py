"""DeepSpeed's ZeRO trains what megatron-core's optimizer trains, and each goes on from the other's checkpoints."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.cases import full_run
from support.saved import newest_tensors
from torch import Tensor

from megatron_sep.config import RunConfig
from megatron_sep.data.extras import MissingLibraryError
from megatron_sep.parallel.groups import topology
from megatron_sep.train.engine import engine_class
from megatron_sep.train.written import read_jsonl
from megatron_sep.weights.open_source import open_source

pytestmark = pytest.mark.usefixtures("single_process")

LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "biases": False,
    "parallel_residual": False,
    "tie_embeddings": True,
    "num_key_value_heads": 2,
}
ZERO = {f"{precision}, ZeRO {stage}": (precision, stage) for precision in ("fp32", "bf16") for stage in (1, 2, 3)}


@pytest.fixture
def zero(tiny: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """Configurations of 4 steps that train with DeepSpeed; the first argument is the stage."""
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")

    def make(stage: int, **sections: Any) -> RunConfig:
        short = {"steps": 4, "eval_every": 2, "compile": "off"} | sections.pop("train", {})
        schedule = {"decay_steps": 4, "weight_decay": 0.1}
        engine = {"engine": "deepspeed", "zero_stage": stage} if stage else {}
        return tiny(train=short, optimizer=schedule, parallel=engine, **{"checkpoint": {"every": 99}} | sections)

    return make


def train(config: RunConfig) -> list[dict[str, float]]:
    """The lines of its steps and validations, without times."""
    from megatron_sep.train.loop import train as loop
    from megatron_sep.train.run import build_run

    loop(build_run(config, topology()))
    keys = ("step", "train/loss", "train/grad_norm", "train/lr", "valid/loss", "train/skipped")
    lines = [line for line in read_jsonl(config.dir / "metrics.jsonl") if "time/save" not in line]
    return [{key: line[key] for key in keys if key in line} for line in lines]


LEARNS = ZERO if full_run() else ("fp32, ZeRO 1", "fp32, ZeRO 3", "bf16, ZeRO 2")
RESUMES = ZERO if full_run() else ("fp32, ZeRO 3", "bf16, ZeRO 1")


@pytest.mark.parametrize("name", LEARNS)
def test_it_learns_what_the_other_engine_learns(zero: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    """Losses, gradient norms and every moment of 4 steps of a tied Llama: within 1e-5 in fp32, 1e-3 in bf16."""
    precision, stage = ZERO[name]
    settings = {"model": LLAMA, "train": {"precision": precision}}
    expected = train(zero(0, dir=str(tmp_path / "megatron"), **settings))
    found = train(zero(stage, dir=str(tmp_path / "zero"), **settings))
    tolerance = {"fp32": 1e-5, "bf16": 1e-3}[precision]
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=tolerance)
    one, two = newest_tensors(tmp_path / "megatron"), newest_tensors(tmp_path / "zero")
    assert one.keys() == two.keys()
    assert {two[key].dtype for key in two if not key.startswith("optimizer.")} == {
        {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    }
    for key in (key for key in one if ".exp_avg." in key):
        assert float((one[key] - two[key]).norm() / one[key].norm()) < 10 * tolerance, key


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_learns_the_same_on_a_gpu(zero: Callable[..., RunConfig], tmp_path: Path, stage: int) -> None:
    """With the fused kernels, in bf16: losses of 4 steps within 1e-3 of the other engine's."""
    settings = {"model": {"hidden_size": 128, "num_attention_heads": 2}, "train": {"precision": "bf16"}}
    expected = train(zero(0, dir=str(tmp_path / "megatron"), **settings))
    found = train(zero(stage, dir=str(tmp_path / "zero"), **settings))
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert b.get("train/loss", b.get("valid/loss")) == pytest.approx(
            a.get("train/loss", a.get("valid/loss")), rel=1e-3
        )


@pytest.mark.parametrize("name", RESUMES)
def test_stopping_and_starting_changes_nothing(zero: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    """4 steps at once equal 2, a new start and 2 more: every number and every tensor, bit for bit."""
    precision, stage = ZERO[name]
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    settings = {"model": dropout, "train": {"precision": precision}}
    straight = train(zero(stage, dir=str(tmp_path / "straight"), **settings))
    train(zero(stage, dir=str(tmp_path / "cut"), model=dropout, train={"precision": precision, "steps": 2}))
    assert train(zero(stage, dir=str(tmp_path / "cut"), **settings)) == straight
    one, two = newest_tensors(tmp_path / "straight"), newest_tensors(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_is_skipped(
    zero: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """The second step of four changes no weight and no moment, and the third is finite again."""
    from megatron_sep.train.deepspeed_engine import DeepSpeedEngine
    from megatron_sep.train.run import build_run

    run = build_run(zero(stage), topology())
    engine = run.engine
    assert isinstance(engine, DeepSpeedEngine)
    states, applied = [], []
    loss = DeepSpeedEngine._loss
    for step in (1, 2, 3):
        factor = math.inf if step == 2 else 1.0
        monkeypatch.setattr(DeepSpeedEngine, "_loss", lambda self, batch, by=factor: loss(self, batch) * by)
        engine.forward_backward(run.train_data.take(step, 8 * (step - 1)), run.train_data.num_microbatches)
        result = engine.step(1e-3)
        applied.append(math.isfinite(float(result.grad_norm)))
        states.append([partition.clone() for partition in _flat(engine)])
    assert applied == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))


def _flat(engine: Any) -> list[Tensor]:
    partitions = engine._partitions()
    moments = [engine._zero.optimizer.state[part][key] for part in partitions for key in ("exp_avg", "exp_avg_sq")]
    return [*partitions, *moments]


def test_its_weights_are_read_without_it(zero: Callable[..., RunConfig]) -> None:
    """`convert` and `generate` open its checkpoints: every weight is the bf16 of the fp32 one beside it."""
    config = zero(2, model=LLAMA, train={"steps": 2, "precision": "bf16"})
    train(config)
    saved = newest_tensors(config.dir)
    source = open_source(config.dir)
    weight = source.weight("decoder.layers.1.mlp.linear_fc1.weight")
    assert torch.equal(weight, saved["optimizer.state.param.decoder.layers.mlp.linear_fc1.weight"][1].bfloat16())
    assert sum(len(group) for group in source) == 2 * 6 + 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"engine": "deepspeed", "tensor": 2}}, "is data-parallel alone: set tensor=2 to 1"),
        ({"parallel": {"zero_stage": 3}}, "zero_stage=3 needs engine=deepspeed"),
        ({"parallel": {"engine": "zero"}}, "no such engine; choose megatron, deepspeed"),
        (
            {"parallel": {"engine": "fsdp"}},
            "Megatron-FSDP is no setting here: its checkpoints have a format of their own",
        ),
        ({"parallel": {"engine": "deepspeed"}, "train": {"precision": "fp16"}}, "trains in bf16 or fp32"),
        (
            {"parallel": {"engine": "deepspeed"}, "train": {"cuda_graphs": "on"}},
            "train.cuda_graphs=on needs parallel.engine=megatron",
        ),
        (
            {"parallel": {"engine": "deepspeed", "zero_stage": 3}, "train": {"compile": "on"}},
            "set train.compile=off or a lower zero_stage",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(tiny: Callable[..., RunConfig], sections: Any, message: str) -> None:
    """Before anything is built, with the setting that stands in the way."""
    with pytest.raises(ValidationError, match=message):
        tiny(**sections)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that asks for it says what to install."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.delitem(sys.modules, "megatron_sep.train.deepspeed_engine", raising=False)
    with pytest.raises(MissingLibraryError, match=r"deepspeed is not installed; pip install megatron_sep\[deepspeed\]"):
        engine_class("deepspeed")
