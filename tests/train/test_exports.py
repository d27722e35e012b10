"""Every k-th checkpoint goes out as a Hugging Face directory too: whole or not there, and always of its checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_sep.config import RunConfig
from megatron_sep.convert.convert import convert
from megatron_sep.parallel.groups import topology
from megatron_sep.train.exports import Exporter, ExportError
from megatron_sep.train.loop import train
from megatron_sep.train.run import Run, build_run
from megatron_sep.train.written import read_history
from megatron_sep.weights.open_source import open_source

pytestmark = pytest.mark.usefixtures("single_process")

EVERY = {"every": 1, "export_every": 2, "keep": 1}


def run_of(config: RunConfig, export: Exporter | None = convert) -> Run:
    return build_run(config, topology(), export=export)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for group in open_source(path) for name, tensor in group.items()}


def exported(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.dir / "export").iterdir())


def test_every_second_checkpoint_is_there_for_transformers_and_has_the_same_weights(
    tiny: Callable[..., RunConfig],
) -> None:
    """Though only the newest checkpoint is kept, each export is written before its own goes."""
    config = tiny(train={"steps": 4, "eval_every": 0}, checkpoint=EVERY)
    train(run_of(config))
    assert exported(config) == ["step-00000002", "step-00000004"]
    told = [line for line in read_history(config.dir) if line["event"] == "export"]
    assert [(line["step"], line["directory"]) for line in told] == [
        (2, "export/step-00000002"),
        (4, "export/step-00000004"),
    ]
    ours, theirs = weights(config.dir), weights(config.dir / "export" / "step-00000004")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], part) for name, part in weights(config.dir / "export/step-00000002").items())


def test_a_run_that_goes_on_makes_up_for_a_killed_export_and_leaves_nothing_half(
    tiny: Callable[..., RunConfig],
) -> None:
    config = tiny(train={"steps": 2, "eval_every": 0}, checkpoint=EVERY)
    train(run_of(config))
    final = config.dir / "export" / "step-00000002"
    half = final.with_name(f".{final.name}.elsewhere-12.partial")
    final.rename(half)
    (half / "config.json").unlink()
    run_of(config).saves.finish()
    assert exported(config) == [final.name]
    assert open_source(final).own is False


def test_an_export_that_fails_is_told_and_the_run_goes_on(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Path, dst: Path) -> None:
        raise OSError(28, "No space left on device", str(dst))

    config = tiny(train={"steps": 3, "eval_every": 0}, checkpoint=EVERY)
    train(run_of(config, full))
    assert not (config.dir / "export").exists()
    failed = [line for line in read_history(config.dir) if line["event"] == "export failed"]
    assert [line["step"] for line in failed] == [2]
    assert "step 2: not exported: [Errno 28] No space left" in capsys.readouterr().out
    assert read_history(config.dir)[-1]["event"] == "done"


def test_a_step_that_is_saved_again_is_exported_again(tiny: Callable[..., RunConfig]) -> None:
    """An export of weights that are gone would be taken for those of the checkpoint beside it."""
    config = tiny(train={"steps": 2, "eval_every": 0}, checkpoint=EVERY)
    train(run_of(config))
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 5})})
    shutil.rmtree(config.dir / "checkpoints")
    train(run_of(other))
    ours, theirs = weights(config.dir), weights(config.dir / "export" / "step-00000002")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_transformers_cannot_hold_is_refused_before_training(tiny: Callable[..., RunConfig]) -> None:
    config = tiny(model={"position": {"kind": "alibi"}}, checkpoint=EVERY)
    with pytest.raises(
        ExportError, match=r"checkpoint\.export_every=2: model\.position\.kind=alibi: transformers has no"
    ):
        run_of(config)
    assert not (config.dir / "checkpoints").exists()
    with pytest.raises(ExportError, match="hand it `export`"):
        run_of(tiny(checkpoint=EVERY), None)
