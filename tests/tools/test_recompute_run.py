"""`tools/recompute_run.py` finds the numbers of a run again, and a number that is not the run's."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megatron_sep.config import RunConfig
from megatron_sep.parallel.groups import topology

pytestmark = pytest.mark.usefixtures("single_process")

PATH = Path(__file__).parents[2] / "tools" / "recompute_run.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("recompute_run", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trained(tiny: Callable[..., RunConfig]) -> Path:
    """A run with documents kept apart whose last checkpoint has a training line after it."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    config = tiny(
        attention={"document_boundaries": True, "stride": 7}, train={"eval_batches": 2}, checkpoint={"every": 5}
    )
    train(build_run(config, topology()))
    newest = config.dir / "checkpoints" / "step-00000008"
    newest.rename(config.dir / "step-00000008")  # as if the run had been stopped between two checkpoints
    return config.dir


def recompute(
    tool: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str]:
    """Exit code and what is printed."""
    monkeypatch.setattr("sys.argv", [str(PATH), str(run)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return ended.value.code, capsys.readouterr().out


def test_every_number_is_found_again_and_no_other(
    tool: ModuleType, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Learning rate, consumed, visible share, density, operations, tokens, and the loss of the step that follows; a
    line that is changed by a ten-thousandth is marked."""
    code, said = recompute(tool, trained, monkeypatch, capsys)
    assert code == 0, said
    for name in ("train/lr", "train/consumed", "attention/visible", "operations", "train/loss_last of the next step"):
        assert name in said
    path = trained / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for key in ("train/lr", "attention/visible", "train/loss_last", "speed/model_flops"):
        changed = [line | ({key: line[key] * 1.0001} if key in line else {}) for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in changed))
        code, said = recompute(tool, trained, monkeypatch, capsys)
        assert code == 1
        assert said.count("<-- differs") == 1, key
