"""The doctor names what is missing, what is taken, what does not fit, and which rank is sick."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support.cases import full_run

from megatron_sep.config import RunConfig
from megatron_sep.config.needs import Needs
from megatron_sep.config.size import ModelSize
from megatron_sep.parallel.groups import topology
from megatron_sep.report import doctor_ranks
from megatron_sep.report.doctor import doctor
from megatron_sep.report.doctor_ranks import Finding, SickRankError, WrongResultError, complaints, examine

pytestmark = pytest.mark.usefixtures("single_process")


def test_a_machine_is_told_line_by_line(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is missing comes with its extra, each row with why not, a fit run with no !."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    lines = list(doctor(tiny()))
    assert any(line.startswith("wandb: not installed") and "megatron_sep[log]" in line for line in lines)
    assert any(line.startswith("transformers: 5.") for line in lines)
    assert f"megatron-core: {metadata.version('megatron-core')}" in lines
    assert "  cross_entropy: torch" in lines
    assert any(line.startswith("    apex: it needs CUDA") or line.startswith("    apex: apex") for line in lines)
    assert [line for line in lines if line.startswith("!")] == []


def test_a_split_vocabulary_is_taken_by_another_row(tiny: Callable[..., RunConfig]) -> None:
    """The rows are those of the configuration's own calls."""
    lines = list(doctor(tiny(parallel={"tensor": 2})))
    assert "  cross_entropy: megatron" in lines
    assert any("the vocabulary is split over 2 ranks" in line for line in lines)


def test_positions_and_softmax_of_the_configuration_count(tiny: Callable[..., RunConfig]) -> None:
    """Rows without a self-adjusting softmax say so, and only where the configuration has one."""
    plain, adjusting = ("\n".join(doctor(tiny(model=model))) for model in ({}, {"self_adjusting_softmax": {}}))
    assert "self-adjusting" not in plain
    assert "self-adjusting" in adjusting


def test_what_does_not_fit_is_marked_with_a_way_out(tiny: Callable[..., RunConfig]) -> None:
    """A batch beyond any memory, and checkpoints beyond any disk."""
    large = {"hidden_size": 65536, "num_layers": 96, "sequence_length": 65536}
    train = {"steps": 1000, "micro_batch_size": 4096, "global_batch_size": 4096}
    lines = [line for line in doctor(tiny(model=large, train=train)) if line.startswith("!")]
    assert len(lines) == 2
    assert "lower train.micro_batch_size" in lines[0]
    assert "set checkpoint.keep" in lines[1]


@pytest.mark.parametrize(
    ("parallel", "precision", "bytes_of_a_weight"),
    [
        ({}, "bf16", 2 + 4 + 12 / 8),
        ({}, "fp32", 4 + 4 + 8 / 8),
        ({"engine": "deepspeed", "zero_stage": 2}, "bf16", 2 + 16 / 8),
        ({"engine": "deepspeed", "zero_stage": 3}, "bf16", 18 / 8),
        ({"engine": "deepspeed", "zero_stage": 3}, "fp32", 20 / 8),
    ],
)
def test_the_state_of_a_rank_is_what_its_engine_splits(
    tiny: Callable[..., RunConfig], parallel: dict[str, Any], precision: str, bytes_of_a_weight: float
) -> None:
    """Weights, gradients, fp32 weights and moments over 8 data-parallel ranks."""
    config = tiny(parallel=parallel, train={"precision": precision})
    weights = ModelSize(config.model, 384).parameters
    assert Needs(config, 384, 8).state_bytes == pytest.approx(weights * bytes_of_a_weight, rel=1e-6)


def test_tensor_and_pipeline_parallelism_leave_a_rank_its_part(tiny: Callable[..., RunConfig]) -> None:
    """A quarter of the layers and half of one table, in 2 x 2 of 8 ranks."""
    config = tiny(parallel={"tensor": 2, "pipeline": 2})
    size = ModelSize(config.model, 384)
    layers = size.parameters - size.embedding_parameters
    needs = Needs(config, 384, 8)
    assert needs.data_ranks == 2
    assert needs.weights == -(-(layers // 2 + 384 * 64) // 2)


def test_a_healthy_rank_passes() -> None:
    """One rank: a line a check, nothing to complain of."""
    lines = list(examine(topology()))
    assert len(lines) == len(doctor_ranks.CHECKS)
    assert all("on 1 rank(s)" in line for line in lines)


def test_a_wrong_result_names_the_rank_and_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other checks are still made."""

    def wrong(_: object) -> Callable[[], None]:
        def run() -> None:
            raise WrongResultError("attention's dk is 3.0e-01 off the reference")

        return run

    monkeypatch.setitem(doctor_ranks.CHECKS, "attention against its reference", wrong)
    lines: list[str] = []
    with pytest.raises(SickRankError, match=r"rank 0 on .* fails at attention against its reference: .*dk is 3.0e-01"):
        lines.extend(examine(topology()))
    assert len(list(doctor_ranks.CHECKS)) == 3


def test_a_slow_rank_is_one_beyond_the_others() -> None:
    """1.5 times the median, and more than a millisecond: it is named with its host."""
    findings = [Finding("a", 0.010), Finding("b", 0.011), Finding("c", 0.017), Finding("d", 0.0, "is broken")]
    found = list(complaints("matrix product", findings))
    assert found == [
        "rank 2 on c takes 17.0 ms for matrix product, the median is 11.0",
        "rank 3 on d fails at matrix product: is broken",
    ]
    assert list(complaints("x", [Finding("a", 0.0001), Finding("b", 0.0009)])) == []


@pytest.mark.skipif(not full_run(), reason="two processes; run with --full")
def test_of_two_ranks_the_sick_one_is_named(tmp_path: Path) -> None:
    """Rank 1 computes wrongly and is slow at attention; rank 0 is well."""
    script = str(Path(__file__).with_name("doctor_two_processes.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*torchrun, script, str(tmp_path / "out")], check=True, timeout=300, env=environment)
    said = (tmp_path / "out").read_text().splitlines()[-1]
    assert "rank 1 on" in said
    assert "fails at matrix product" in said
    assert "for attention against its reference" in said
    assert "rank 0" not in said
