"""A checkpoint of one layout and engine is taken up by any other: every tensor of it, and the run goes on."""

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from parallel.resharding import MORE, STEPS, turn
from support.cases import full_run
from support.forked import run_job
from support.saved import saved_tensors
from torch import Tensor

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.config.schema import ParallelConfig
from megatron_sep.parallel.groups import set_layout
from megatron_sep.train.written import read_jsonl
from megatron_sep.weights.sealed import newest_verified

pytestmark = pytest.mark.usefixtures("single_process")

LAYOUTS = {
    "one": (1, ""),
    "data2": (2, ""),
    "tensor2": (2, "parallel.tensor=2"),
    "sequence2": (2, "parallel.tensor=2 parallel.sequence_parallel=true"),
    "pipeline2": (2, "parallel.pipeline=2"),
    "interleaved2": (2, "parallel.pipeline=2 parallel.virtual_pipeline=2"),
    "context2": (2, "parallel.context=2"),
    "tensor2-data2": (4, "parallel.tensor=2"),
    "tensor2-pipeline2": (4, "parallel.tensor=2 parallel.pipeline=2"),
    **{
        f"zero{stage}-of-{ranks}": (ranks, f"parallel.engine=deepspeed parallel.zero_stage={stage}")
        for stage in (1, 2, 3)
        for ranks in (1, 2, 4)
    },
    "muon-one": (1, "optimizer.kind=muon"),
    "muon-data2": (2, "optimizer.kind=muon"),
    "muon-tensor2": (2, "optimizer.kind=muon parallel.tensor=2"),
    "muon-pipeline2": (2, "optimizer.kind=muon parallel.pipeline=2"),
}
"""Processes, and settings."""
GATE = (
    *("one>zero2-of-2", "tensor2>zero3-of-2", "zero3-of-2>pipeline2", "zero3-of-2>one", "tensor2>zero1-of-1"),
    "muon-tensor2>muon-one",
)
FULL = (
    *("data2>zero1-of-2", "zero1-of-2>tensor2", "zero2-of-2>data2", "pipeline2>zero3-of-2", "sequence2>zero2-of-2"),
    *("zero3-of-2>zero1-of-2", "pipeline2>tensor2", "one>zero3-of-4", "zero3-of-4>zero3-of-2"),
    *("tensor2-data2>zero2-of-2", "zero3-of-2>tensor2-pipeline2", "tensor2-pipeline2>zero1-of-4", "zero2-of-4>one"),
    *("interleaved2>zero2-of-2", "zero1-of-2>interleaved2", "context2>zero3-of-2", "interleaved2>context2"),
    *("muon-one>muon-data2", "muon-data2>muon-pipeline2", "muon-pipeline2>muon-tensor2"),
)
HERE = importlib.util.find_spec("deepspeed") is not None
PAIRS = [pair for pair in (*GATE, *(FULL if full_run() else ())) if HERE or "zero" not in pair]
"""What wrote a checkpoint, and what takes it up."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resharding")


@pytest.fixture
def runs(folder: Path, tiny: Callable[..., RunConfig]) -> Path:
    """A directory with every source, every pair, and "straight", one process that never stopped; made once."""
    if not (folder / "run.yaml").exists():
        model = {"activation": "swiglu", "num_key_value_heads": 2, "num_layers": 4}
        train = {"eval_every": 0, "compile": "off"}
        schedule = {"decay_steps": STEPS + MORE}
        config = tiny(model=model, train=train, optimizer=schedule, checkpoint={"every": 99})
        (folder / "run.yaml").write_text(to_yaml(config))
        for name, settings in (("straight", []), ("muon-straight", ["optimizer.kind=muon"])):
            to_the_end = [f"train.steps={STEPS + MORE}", *settings]
            turn(folder, folder / "run.yaml", name, to_the_end, set_layout(ParallelConfig(), 1234))
        sources = dict.fromkeys(pair.partition(">")[0] for pair in PAIRS)
        for ranks in (4, 2, 1):
            start(folder, ranks, sources)
        for ranks in (4, 2, 1):
            start(folder, ranks, PAIRS)
    return folder


def start(folder: Path, ranks: int, names: Iterable[str]) -> None:
    """Those of the names that are of so many ranks, in one job; of one rank in this process."""
    mine = [name for name in names if LAYOUTS[name.rpartition(">")[2]][0] == ranks]
    words = {name: LAYOUTS[name.rpartition(">")[2]][1].split() for name in mine}
    if ranks == 1:
        for name in mine:
            turn(folder, folder / "run.yaml", name, words[name], set_layout(ParallelConfig(), 1234))
    elif mine:
        arguments = [word for name in mine for word in ("--", name, *words[name])]
        script = Path(__file__).with_name("resharding.py")
        run_job(ranks, script, folder, folder / "run.yaml", *arguments[1:], folder=folder, timeout=1200)


def content(run: Path) -> tuple[dict[str, Tensor], float]:
    """Every tensor of a run's newest checkpoint, and how often its optimizer was applied."""
    newest = newest_verified(run / "checkpoints")
    assert newest is not None
    common = torch.load(newest / "common.pt", weights_only=True)
    (step,) = {group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]}
    return saved_tensors(newest), step


@pytest.mark.parametrize("pair", PAIRS)
def test_every_tensor_is_taken_up_as_it_was(runs: Path, pair: str) -> None:
    """Saved again at once: weights, fp32 weights, both moments and the step, bit for bit, of another layout."""
    before, after = content(runs / pair.partition(">")[0]), content(runs / f"{pair} at once")
    assert after[1] == before[1] == STEPS
    assert after[0].keys() == before[0].keys()
    assert sum(".exp_avg_sq." in key or ".momentum_buffer." in key for key in before[0]) == 12 + 4
    for key, tensor in before[0].items():
        assert torch.equal(after[0][key], tensor), key


@pytest.mark.parametrize("pair", PAIRS)
def test_the_run_goes_on_with_the_same_losses(runs: Path, pair: str) -> None:
    """Losses and gradient norms of the steps after it are those of one process that never stopped, within 1e-5.

    Muon multiplies in bf16: there within 1e-3.
    """
    end, tolerance = ("muon-straight", 1e-3) if pair.startswith("muon") else ("straight", 1e-5)
    straight, found = (
        [line for line in read_jsonl(runs / name / "metrics.jsonl") if "train/loss" in line and line["step"] > STEPS]
        for name in (end, pair)
    )
    assert [line["step"] for line in found] == [STEPS + 1, STEPS + MORE]
    for expected, line in zip(straight, found, strict=True):
        for key in ("train/loss", "train/grad_norm", "train/consumed", "train/lr"):
            assert line[key] == pytest.approx(expected[key], rel=tolerance), key
