"""Two processes train the model that one process trains, whatever is split between them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.forked import run_job
from support.saved import newest_tensors

from megatron_sep.config import RunConfig, load_config, to_yaml
from megatron_sep.convert.convert import convert
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl
from megatron_sep.weights.open_source import open_source

pytestmark = pytest.mark.usefixtures("single_process")

LAYOUTS = {
    "data": [],
    "data, pass by pass": [],
    "sequence, pass by pass": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "tensor": ["parallel.tensor=2", "checkpoint.export_every=1"],
    "sequence": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "pipeline": ["parallel.pipeline=2"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "context": ["parallel.context=2", "metrics.attention_mass_every=null"],
    "context-recompute": ["parallel.context=2", "train.recompute=selective", "metrics.attention_mass_every=null"],
    "pipeline-recompute": ["parallel.pipeline=2", "train.recompute=true"],
}
SOURCES = ("one", "export")
"""Weights of `one`: its own checkpoint, and what `convert` makes of it for transformers."""
STARTS = {f"{layout} from {source}": (layout, source) for layout in ("tensor", "pipeline") for source in SOURCES}
MUON = ["optimizer.kind=muon", "optimizer.lr=0.01"]
MUONS = {"muon, data": MUON, "muon, tensor": [*MUON, *LAYOUTS["sequence"]]}
SECTIONS = {
    "model": {"num_layers": 4, "num_attention_heads": 4},
    "attention": {"full_layers": [0, -1], "document_boundaries": True},
    "train": {"steps": 4, "eval_every": 2, "compile": "off"},
    "metrics": {"attention_mass_every": 4},
}
LOOKED = [name for name, words in LAYOUTS.items() if "metrics.attention_mass_every=null" not in words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture
def runs(folder: Path, tiny: Callable[..., RunConfig]) -> Path:
    """A directory with a run of each layout and of one process ("one"), and of each start; made once for the module."""
    if not (folder / "run.yaml").exists():
        (folder / "run.yaml").write_text(to_yaml(tiny(**SECTIONS)))
        train_here(folder, "one")
        convert(folder / "one", folder / "export")
        for source in SOURCES:
            train_here(folder, f"one from {source}", *start(folder, source))
        train_here(folder, "muon, one", *MUON)
        starts = {name: [*LAYOUTS[layout], *start(folder, source)] for name, (layout, source) in STARTS.items()}
        words = [word for name, overrides in (LAYOUTS | MUONS | starts).items() for word in ("--", name, *overrides)]
        script = Path(__file__).with_name("train_layouts.py")
        run_job(2, script, folder, folder / "run.yaml", *words[1:], folder=folder)
    return folder


def start(folder: Path, source: str) -> list[str]:
    """Overrides of two steps from a source's weights; SepLLM's window is half of what they were trained with."""
    return [f"checkpoint.init_from={folder / source}", "checkpoint.init_step=4", "train.steps=6", "attention.window=4"]


def train_here(folder: Path, name: str, *overrides: str) -> None:
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    train(build_run(load_config(folder / "run.yaml", [f"dir={folder / name}", *overrides]), topology()))


def lines(run: Path, looks: bool) -> list[dict[str, float]]:
    """What a run has logged of looks at its attention, or of all else."""
    return [line for line in read_jsonl(run / "metrics.jsonl") if ("time/attention_mass" in line) == looks]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_equal_those_of_one_process(runs: Path, layout: str) -> None:
    """Training loss, validation loss and gradient norm of each step agree within 1e-5; so does the visible share."""
    one, two = (lines(runs / name, looks=False) for name in ("one", layout))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for expected, found in zip(one, two, strict=True):
        for key in ("train/loss", "valid/loss", "train/grad_norm", "attention/visible", "train/consumed"):
            assert (key in expected) == (key in found)
            if key in expected:
                assert found[key] == pytest.approx(expected[key], rel=1e-5), (expected["step"], key)


@pytest.mark.parametrize("layout", LOOKED)
def test_attention_mass_is_that_of_one_process(runs: Path, layout: str) -> None:
    """Heads, layers and chunks of several ranks add up to the same shares within 1e-5; data ranks look at more rows."""
    one, two = (lines(runs / name, looks=True)[0] for name in ("one", layout))
    shares = {name: share for name, share in one.items() if name.startswith("attention/mass/")}
    more_rows = "data" in layout or layout == "interleaved"
    assert len(shares) == 8
    for name, share in shares.items():
        assert two[name] == pytest.approx(share, abs=0.05 if more_rows else 1e-5), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_equals_that_of_one_process(runs: Path, layout: str) -> None:
    """Adam's first moment is a sum of clipped gradients: it agrees tensor by tensor within 1e-5 of its norm."""
    one, two = newest_tensors(runs / "one"), newest_tensors(runs / layout)
    moments = [key for key in one if ".exp_avg." in key]
    assert len(moments) == 16  # twelve of a layer, stacked over the layers, and four outside
    for key in moments:
        difference = (one[key] - two[key]).norm() / one[key].norm()
        assert float(difference) < 1e-5, key


@pytest.mark.parametrize("layout", MUONS)
def test_muon_steps_as_on_one_process(runs: Path, layout: str) -> None:
    """Parts of a matrix are turned together: each weight is where one process brings it, as far as bf16 can tell.

    Halves that were turned on their own would be more than a half apart.
    """
    first, one, two = (newest_tensors(runs / name) for name in ("one", "muon, one", layout))
    for key in (key for key in one if key.startswith("decoder.") and key.endswith(".weight")):
        apart, moved = (one[key] - two[key]).norm(), (one[key] - first[key]).norm()
        assert float(apart / moved) < 0.1, key


def test_an_export_of_two_processes_has_their_weights(runs: Path) -> None:
    """The first one writes it while both train on; the other one holds half of each matrix."""
    trained, exported = (
        {
            name: tensor
            for group in open_source(runs / "tensor" / place / "step-00000004")
            for name, tensor in group.items()
        }
        for place in ("checkpoints", "export")
    )
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[name], exported[name]) for name in trained)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_goes_on_where_two_stopped(runs: Path, layout: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of two processes loads in one, under any layout, and trains on as one process would have."""
    for name in ("one", layout):
        train_here(runs, name, "train.steps=6", "optimizer.decay_steps=4")
        assert "resumed from" in capfd.readouterr().out
    one, two = (
        [line for line in read_jsonl(runs / name / "metrics.jsonl") if "train/loss" in line][-1]
        for name in ("one", layout)
    )
    assert one["step"] == two["step"] == 6
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)


@pytest.mark.parametrize("name", STARTS)
def test_foreign_weights_start_two_processes_as_one(runs: Path, name: str) -> None:
    """Weights given to two processes: validation before the first step, each loss and gradient norm within 1e-5."""
    one, two = (lines(runs / run, looks=False) for run in (f"one from {STARTS[name][1]}", name))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [4, 5, 6, 6, 6]
    for expected, found in zip(one, two, strict=True):
        for key in expected.keys() & {"train/loss", "valid/loss", "train/grad_norm", "attention/visible"}:
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (expected["step"], key)


def test_a_layout_that_does_not_fit_names_the_way_out(tiny: Callable[..., RunConfig]) -> None:
    """tensor=2 with one process is an error that says how many to start."""
    from megatron_sep.parallel.groups import ParallelError, set_layout

    config = tiny(parallel={"tensor": 2})
    with pytest.raises(
        ParallelError,
        match=r"parallel.tensor=2 x parallel.context=1 x parallel.pipeline=1 does not divide the 1 process",
    ):
        set_layout(config.parallel, 0)
