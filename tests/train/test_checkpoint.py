"""A checkpoint is complete or ignored, and a failed save loses nothing."""

import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from megatron_sep.config import RunConfig
from megatron_sep.parallel.groups import topology
from megatron_sep.train.checkpoint import NotWrittenError
from megatron_sep.train.run import Run
from megatron_sep.weights.open_source import open_source
from megatron_sep.weights.sealed import CheckpointError, fault_of, finished_checkpoints

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def trained(tiny: Callable[..., RunConfig]) -> Run:
    """A run of 8 steps with checkpoints at 4 and 8."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    run = build_run(tiny(train={"eval_every": 0}), topology())
    train(run)
    return run


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[Random(path.name).randrange(len(data))] ^= 4
    path.write_bytes(data)


def test_any_damage_to_any_file_is_found_and_the_older_checkpoint_is_taken(
    trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file of the newest checkpoint, cut, changed or gone: never loaded, named, and step 4 is found instead."""
    older, newest = finished_checkpoints(trained.checkpoints.dir)
    names = [path.name for path in newest.iterdir()]
    assert len(names) >= 6
    for name in names:
        path = newest / name
        whole = path.read_bytes()
        for damage in (truncate, flip_a_bit, Path.unlink):
            damage(path)
            assert trained.checkpoints.newest() == older, (name, damage)
            assert name in capsys.readouterr().out
            path.write_bytes(whole)
    assert trained.checkpoints.newest() == newest


def test_half_written_directories_are_ignored_and_cleaned_up(trained: Run) -> None:
    """A save that was killed leaves a .partial directory: never found, and gone after the next save."""
    leftover = trained.checkpoints.dir / "step-00000099.partial"
    leftover.mkdir()
    (leftover / "common.pt").write_bytes(b"half")
    assert trained.checkpoints.newest() == finished_checkpoints(trained.checkpoints.dir)[-1]
    trained.save()
    assert not leftover.exists()


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process and its children may grow past 20 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_checkpoints_good(trained: Run, full_disk: None) -> None:  # noqa: ARG001
    """The save fails with the reason and the way out; what was there still verifies, and nothing half-written stays."""
    before = finished_checkpoints(trained.checkpoints.dir)
    trained.state = trained.state.advance(8)
    with pytest.raises(NotWrittenError, match=r"step-00000009: could not be written \(.* GB free.*untouched"):
        trained.save()
    assert finished_checkpoints(trained.checkpoints.dir) == before
    assert [fault_of(path) for path in before] == [None, None]
    assert sorted(trained.checkpoints.dir.iterdir()) == before


def test_a_save_that_fails_without_a_word_is_named_by_its_kind(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's writer processes end in an EOFError that has no text."""
    from megatron.core import dist_checkpointing

    def end(*_: object, **__: object) -> None:
        raise EOFError

    monkeypatch.setattr(dist_checkpointing, "save", end)
    with pytest.raises(NotWrittenError, match=r"could not be written \(EOFError\(\); .* GB free"):
        trained.save()


def test_only_the_newest_are_kept(trained: Run) -> None:
    """keep=2: the third save drops the first."""
    trained.checkpoints.keep = 2
    trained.state = trained.state.advance(8)
    trained.save()
    assert [path.name for path in finished_checkpoints(trained.checkpoints.dir)] == ["step-00000008", "step-00000009"]


def test_another_shape_is_refused_by_name(trained: Run, tiny: Callable[..., RunConfig]) -> None:
    """Each setting that differs is named with both values; settings that change no weight may differ."""
    from megatron_sep.train.run import build_run

    other = tiny(model={"hidden_size": 32, "num_layers": 4, "hidden_dropout": 0.1})
    with pytest.raises(CheckpointError, match=r"num_layers is 2 there and 4 here; model.hidden_size is 64 there") as e:
        build_run(other, topology())
    assert "hidden_dropout" not in str(e.value)
    assert trained.checkpoints.newest() is not None


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(
    trained: Run, tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Starting at step 0 in the same dir would cut its metrics and write over its steps: it stops and names each."""
    from megatron_sep.train.run import build_run

    before = (trained.config.dir / "metrics.jsonl").read_bytes()
    for path in finished_checkpoints(trained.checkpoints.dir):
        flip_a_bit(path / "common.pt")
    with pytest.raises(
        CheckpointError, match=r"none of its 2 checkpoint\(s\) is whole.*give another dir, or move them"
    ):
        build_run(tiny(train={"eval_every": 0}), topology())
    assert capsys.readouterr().out.count("checkpoint passed over") == 2
    assert (trained.config.dir / "metrics.jsonl").read_bytes() == before


def test_a_moved_run_brings_its_tokenizer(tiny: Callable[..., RunConfig], tmp_path: Path, corpus: Path) -> None:
    """The tokenizer that lies in a run's dir is found there, not under the path that it had when it was trained."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    config = tiny(train={"steps": 2, "eval_every": 0})
    config.dir.mkdir()
    inside = config.dir / "tokenizer.json"
    shutil.copy(corpus / "tokenizer.json", inside)
    config = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": inside})})
    train(build_run(config, topology()))
    moved = config.dir.rename(tmp_path / "moved")
    assert open_source(moved).tokenizer == moved / "tokenizer.json"
    inside.parent.mkdir()
    inside.write_text("another one, of another run")
    assert open_source(moved).tokenizer == moved / "tokenizer.json"
