"""Passes that are recorded as CUDA graphs learn what passes learn that are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sep.config import RunConfig
from megatron_sep.kernels.operation import BackendError
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl

pytestmark = pytest.mark.usefixtures("single_process")

NUMBERS = ("train/loss", "train/grad_norm", "valid/loss", "attention/visible")


def trained(config: RunConfig) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    """The numbers of every line, and the weights after the last step."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    run = build_run(config, topology())
    train(run)
    lines = read_jsonl(config.dir / "metrics.jsonl")
    weights = {name: weight.detach().clone() for name, weight in run.engine._weights[0].named_parameters()}
    return [tuple(line[name] for name in NUMBERS if name in line) for line in lines], weights


CASES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "one micro-batch": {"train": {"micro_batch_size": 8}},
    "documents apart": {"attention": {"document_boundaries": True}},
    "windows that shrink": {"attention": {"anneal": {"start": 32, "steps": 8}}, "train": {"steps": 16}},
    "recomputed": {"train": {"recompute": True}},
    "bf16": {"train": {"precision": "bf16"}},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_equals_one_that_is_not(
    case: str, tiny: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, norms, validation and weights, bit for bit, over 12 steps of which all but the first are replayed."""
    found = {}
    for graphs in ("on", "off"):
        sections = CASES[case] | {"dir": str(tmp_path / graphs)}
        sections["train"] = {"steps": 12, **sections.get("train", {}), "cuda_graphs": graphs}
        found[graphs] = trained(tiny(**sections))
    assert "training: recorded as a CUDA graph" in capsys.readouterr().out
    assert found["on"][0] == found["off"][0]
    for name, weight in found["off"][1].items():
        assert torch.equal(found["on"][1][name], weight), name


@pytest.mark.gpu
def test_a_recorded_run_resumes_exactly(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """12 steps at once equal 8 steps and 4 more in a process that records anew."""
    straight, weights = trained(tiny(dir=str(tmp_path / "straight"), train={"steps": 12}))
    trained(tiny(dir=str(tmp_path / "cut"), train={"steps": 8}, optimizer={"decay_steps": 12}))
    lines, resumed = trained(tiny(dir=str(tmp_path / "cut"), train={"steps": 12}, optimizer={"decay_steps": 12}))
    assert [line for line in lines if len(line) > 1] == [line for line in straight if len(line) > 1]
    for name, weight in weights.items():
        assert torch.equal(resumed[name], weight), name


@pytest.mark.gpu
def test_two_deterministic_runs_are_equal(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Full and Sep-Attention, bf16, replayed: every number and every weight has the same bits."""
    runs = [
        trained(
            tiny(
                dir=str(tmp_path / name),
                model={"num_layers": 4, "sequence_length": 512},
                attention={"full_layers": [0, -1]},
                train={"steps": 12, "precision": "bf16", "deterministic": True},
            )
        )
        for name in ("one", "other")
    ]
    torch.use_deterministic_algorithms(False)
    assert runs[0][0] == runs[1][0]
    for name, weight in runs[0][1].items():
        assert torch.equal(runs[1][1][name], weight), name


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({}, "there is no CUDA device" if not torch.cuda.is_available() else None),
        pytest.param({"train": {"precision": "fp16"}}, "the loss scale of fp16 changes", marks=pytest.mark.gpu),
        pytest.param({"model": {"hidden_dropout": 0.1}}, "dropout draws anew in each pass", marks=pytest.mark.gpu),
    ],
)
def test_what_cannot_be_recorded_says_why(
    section: dict[str, Any], reason: str | None, tiny: Callable[..., RunConfig]
) -> None:
    """``on`` is refused with the reason and the way out; ``auto`` trains without."""
    from megatron_sep.train.run import build_run

    wanted = {"train": {**section.get("train", {}), "cuda_graphs": "on"}}
    if reason is None:
        build_run(tiny(**section | wanted), topology())
        return
    with pytest.raises(BackendError, match=f"train.cuda_graphs=on: {reason}; set train.cuda_graphs=auto"):
        build_run(tiny(**section | wanted), topology())
    trained(tiny(**section))
