"""What a run will need is looked at before its first step, and all that is missing is told at once."""

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sep.config import RunConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.parallel.groups import topology
from megatron_sep.train import preflight as room
from megatron_sep.train.preflight import Need, PreflightError

pytestmark = pytest.mark.usefixtures("single_process")

Usage = namedtuple("Usage", "total used free")


def build(config: RunConfig) -> Any:
    from megatron_sep.train.run import build_run

    return build_run(config, topology())


def need(config: RunConfig) -> Need:
    return Need.of(config, ModelSize(config.model, 384), topology())


def test_all_that_is_missing_is_one_message(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the way of the checkpoints, a cache that cannot be written and too little memory, before any model."""
    (tmp_path / "file").write_text("")
    config = tiny(data={"order": "neox", "cache": str(tmp_path / "file" / "cache")})
    config.dir.mkdir()
    (config.dir / "checkpoints").write_text("in the way")
    free = namedtuple("Memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free(1000))
    monkeypatch.setattr("megatron_sep.train.run._engine", lambda *_, **__: pytest.fail("a model was built"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"order": "samples"})})
    with pytest.raises(PreflightError) as refused:
        build(config)
    lines = str(refused.value).splitlines()
    assert lines[0] == "3 thing(s) to see to before training"
    assert "checkpoints=" in lines[1]
    assert "cannot be written to" in lines[1]
    assert lines[2].startswith(f"  data.cache={config.data.cache}: cannot be written to (Not a directory)")
    assert "of memory are needed, 0.0 GB are free; set checkpoint.background=false, or take a smaller" in lines[3]


@pytest.mark.parametrize(("keep", "there", "more"), [(2, 0, 3), (2, 2, 1), (2, 5, 1), (None, 0, 1)])
def test_keep_and_one_more_checkpoint_must_fit(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, keep: int | None, there: int, more: int
) -> None:
    """Those that are there already need no more room; a byte less than the rest is too little, and it is said."""
    config = tiny(checkpoint={"keep": keep})
    for step in range(there):
        path = config.dir / "checkpoints" / f"step-{step + 1:08d}"
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"x" * need(config).checkpoint)
    (config.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    beside = 0 if there else room.BESIDE  # what is there tells its size
    wanted = more * (need(config).checkpoint + beside)
    for free, faults in ((wanted, 0), (wanted - 1, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        assert len(list(room._of_the_job(config, need(config)))) == faults


def test_what_is_needed_is_near_what_is_written(tiny: Callable[..., RunConfig]) -> None:
    """The size that is foretold of a checkpoint is at most what it takes, and at least four fifths of it."""
    for precision in ("fp32", "bf16"):
        config = tiny(train={"steps": 1, "eval_every": 0, "precision": precision}, dir=f"{tiny().dir}-{precision}")
        run = build(config)
        run.save()
        newest = run.checkpoints.newest()
        size = sum(path.stat().st_size for path in newest.glob("*.distcp"))
        foretold = Need.of(config, ModelSize(config.model, run.vocab_size), topology()).checkpoint
        assert 0.8 * size < foretold <= size


def test_epochs_and_clocks_are_said(tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """Data that are read more than once, a disk that all checkpoints will not fit on, and clocks that differ."""
    config = tiny(train={"steps": 1000, "eval_every": 0})
    run = build(config)
    distinct = run.train_data.samples.num_distinct
    said = capsys.readouterr().out
    assert f"the data have {distinct:,} different sequences; 1,000 steps take 8,000: {8000 / distinct:.1f} epo" in said
    huge = Need(checkpoint=10**15, device=0, host=0)
    notes = list(room._notes(config, run.train_data.samples, huge, [0.0, 45.0]))
    assert notes[0].startswith("the clocks of the machines differ by 45 s")
    assert notes[-1].startswith("checkpoint.keep is not set: 250 checkpoints take 250000000.0 GB")


def test_a_process_that_does_not_see_the_dir_is_named(tiny: Callable[..., RunConfig]) -> None:
    """On another machine without a shared disk, what rank 0 wrote is not there."""
    config = tiny()
    config.dir.mkdir()
    faults = list(room._of_this_process(config, Need(0, 0, 0), topology(), "what rank 0 wrote"))
    assert len(faults) == 1
    assert "does not see what rank 0 writes there; set a dir on a disk that all share" in faults[0]
