"""F12, F13, F18 and F19: disks, directories, clocks and loggers that fail, and two runs in one place."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.case import Times, Trial, WrongError, expect
from faults.hooks import Point, around, at
from faults.killing import equals_straight, goes_on_exactly, told
from faults.verbs import Ended
from faults.world import lines

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
_NOBODY = 65534
_SAVES = Point("megatron_sep.train.megatron_engine:MegatronEngine.begin_save")


def full_disk(trial: Trial) -> Times:
    """A disk that fills up before the second save, or before the first step: said; what is there is whole."""
    checkpoint = _size(sorted((trial.world.straight / "checkpoints").glob("step-*"))[0])
    room = int(checkpoint * (0.6, 0.95, 0.02)[trial.number % 3] * trial.random.uniform(0.97, 1.0))
    disk, filler = trial.folder / "disk", trial.folder / "disk" / "filler"
    disk.mkdir()
    run = disk / "run"
    if not _mount(disk, 12 * checkpoint):
        ended = trial.world.train(run, before=_no_large_files(room // 4))
        return Times(_the_first_is_whole(run, ended, 1), goes_on_exactly(trial.world, run).recover)
    if trial.number % 4 == 3:
        _fill(filler, room)
        ended = trial.world.train(run)
        expect(not lines(run), "was trained first")
    else:
        ended = trial.world.train(run, before=at(_SAVES, 2, lambda: _fill(filler, room)))
    seconds = _the_first_is_whole(run, ended, 2 if trial.number % 4 == 3 else 1)
    filler.unlink()
    return Times(seconds, goes_on_exactly(trial.world, run).recover)


def _fill(filler: Path, room: int) -> None:
    """Take all of a disk but ``room`` bytes."""
    left = shutil.disk_usage(filler.parent).free - room
    filler.write_bytes(bytes(max(left, 0)))


def _the_first_is_whole(run: Path, ended: Ended, code: int) -> float:
    """Seconds until the failure was told. Raises WrongError where a checkpoint before it was damaged."""
    from megatron_sep.weights.sealed import fault_of, finished_checkpoints

    seconds = told(ended, code, "could not be written" if code == 1 else "before training", "ree")
    faults = [fault for path in finished_checkpoints(run / "checkpoints") if (fault := fault_of(path))]
    if faults:
        raise WrongError(f"an older checkpoint was damaged: {faults}")
    return seconds


def _size(folder: Path) -> int:
    """On a disk of pages of 4 kB, the folder itself included."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir()) + 4096


def _mount(folder: Path, size: int) -> bool:
    """A disk of ``size`` bytes that this process and those it starts see; False where the system forbids it."""
    if ctypes.CDLL(None).unshare(_NEW_MOUNTS):
        return False
    private = subprocess.run(["mount", "--make-rprivate", "/"], check=False, capture_output=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(folder)]
    return private.returncode == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0


def _no_large_files(size: int) -> Callable[[], None]:
    """What stands for a full disk where none can be mounted: no file grows past ``size`` bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(size, 4096), resource.RLIM_INFINITY))

    return limit


def unusable_dir(trial: Trial) -> Times:
    """A dir that cannot be written to, found before the first step; a slow disk, which changes nothing."""
    kinds: tuple[Callable[[Trial], Times], ...] = (_below_a_file, _read_only, _not_ours, _no_name, _slow_disk)
    return kinds[trial.number % len(kinds)](trial)


def _refused(trial: Trial, run: Path, before: Callable[[], None] | None = None, place: Path | None = None) -> Times:
    ended = trial.world.start(trial.folder / "log", f"dir={run}", before=before).wait()
    seconds = told(ended, 2, str(place or run))
    expect("step 1/" not in ended.text, f"was trained first: {ended.text[-300:]}")
    return Times(seconds)


def _below_a_file(trial: Trial) -> Times:
    """The dir, or the folder of its checkpoints, is a file."""
    path = trial.folder / "file"
    if trial.random.random() < 0.5:
        path.write_text("in the way")
        return _refused(trial, path / "run", place=path)
    path.mkdir()
    (path / "checkpoints").write_text("in the way")
    return _refused(trial, path)


def _read_only(trial: Trial) -> Times:
    """A disk that is mounted for reading alone."""
    disk = trial.folder / "disk"
    disk.mkdir()
    if not _mount(disk, 1 << 20):
        return _not_ours(trial)
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    return _refused(trial, disk / trial.random.choice(("run", "other")))


def _not_ours(trial: Trial) -> Times:
    """A dir that belongs to another user; a process of root drops its rights for it."""
    run = trial.folder / "theirs"
    run.mkdir(mode=0o555)
    for folder in (trial.folder, trial.folder.parent):
        folder.chmod(0o755)

    def drop_rights() -> None:
        if os.getuid() == 0:
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)

    return _refused(trial, run / trial.random.choice(("", "run")), before=drop_rights)


def _no_name(trial: Trial) -> Times:
    """A name that no disk takes."""
    return _refused(trial, trial.folder / ("x" * 300))


def _slow_disk(trial: Trial) -> Times:
    """Each rename takes a while."""
    wait = trial.random.uniform(0.05, 0.2)

    def slowly(original: Callable[..., Any], *arguments: Any) -> Any:
        time.sleep(wait)
        return original(*arguments)

    def put() -> None:
        for name in ("rename", "replace"):
            around(f"pathlib:Path.{name}", slowly)()

    run = trial.folder / "run"
    ended = trial.world.train(run, before=put)
    expect(ended.code == 0, ended.text[-300:])
    equals_straight(trial.world, run)
    return Times()


def beside_training(trial: Trial) -> Times:
    """The clock jumps, a log goes away, a logger raises: the numbers and tensors are those of the straight run."""
    kinds = (_clock_jumps, _log_goes_away, _wandb_raises, _tensorboard_raises)
    before, settings = kinds[trial.number % len(kinds)](trial)
    run = trial.folder / "run"
    ended = trial.world.train(run, *settings, before=before)
    expect(ended.code == 0, ended.text[-300:])
    if kinds[trial.number % len(kinds)] is _log_goes_away:
        run.joinpath("metrics.jsonl").unlink(missing_ok=True)
        shutil.copyfile(trial.world.straight / "metrics.jsonl", run / "metrics.jsonl")  # the tensors tell
    equals_straight(trial.world, run)
    return Times()


Prepared = tuple[Callable[[], None], tuple[str, ...]]


def _clock_jumps(trial: Trial) -> Prepared:
    """Days forward or back, in the middle of the run."""
    jump = trial.random.choice((-1, 1)) * trial.random.uniform(3600, 1e7)
    step = trial.random.randint(2, 10)

    def strike() -> None:
        now = time.time
        time.time = lambda: now() + jump

    return at(Point("megatron_sep.train.feed:Feed.take"), step, strike), ()


def _log_goes_away(trial: Trial) -> Prepared:
    """metrics.jsonl and tensorboard/ are removed in the middle of the run."""
    run, step = trial.folder / "run", trial.random.randint(2, 10)

    def strike() -> None:
        (run / "metrics.jsonl").unlink()
        shutil.rmtree(run / "tensorboard")

    return at(Point("megatron_sep.train.feed:Feed.take"), step, strike), ("metrics.tensorboard=true",)


class _Failing:
    """A run of wandb whose ``log`` raises from some step on."""

    def __init__(self, step: int) -> None:
        self._step = step

    def log(self, _: object, step: int) -> None:
        if step >= self._step:
            raise ConnectionError("the service is gone")

    def finish(self) -> None:
        raise ConnectionError("the service is gone")


def _wandb_raises(trial: Trial) -> Prepared:
    """When it starts, or in the middle of the run."""
    step = trial.random.choice((0, 3, 12, 13))

    def put() -> None:
        def init(**_: object) -> _Failing:
            if step == 0:
                raise ConnectionError("no service")
            return _Failing(step)

        wandb: Any = types.ModuleType("wandb")
        wandb.init = init
        sys.modules["wandb"] = wandb

    return put, ("metrics.wandb=offline",)


def _tensorboard_raises(trial: Trial) -> Prepared:
    """Its writer, in the middle of the run."""
    step = trial.random.randint(1, 12)

    def strike() -> None:
        raise OSError(28, "No space left on device")

    return at(Point("megatron_sep.train.metrics:TensorBoard.log"), step, strike), ("metrics.tensorboard=true",)


def two_at_once(trial: Trial) -> Times:
    """A second training on the dir of the first: refused with its process and host; the first is undisturbed."""
    run = trial.folder / "run"
    first = trial.world.start(run)
    while not (run / "lock").is_file() or not (run / "lock").read_text():
        expect(first.running(), "the first has ended")
        time.sleep(0.01)
    time.sleep(trial.random.uniform(0, 0.3))
    second = trial.world.train(run)
    expect(first.wait().code == 0, "the first was disturbed")
    if second.code == 0 and "is done" in second.text:
        return Times()  # it came after the first had ended
    seconds = told(second, 2, f"process {first.pid} of {os.uname().nodename} trains there already")
    equals_straight(trial.world, run)
    return Times(seconds)
