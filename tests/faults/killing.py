"""F1 to F3: processes that are killed, and what goes on after them."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.case import Times, Trial, WrongError, expect
from faults.hooks import Point, around, at, kill
from faults.processes import start_ranks
from faults.verbs import Ended
from faults.world import World, lines, numbers, tensor_sums

_SAVING = tuple(
    Point(where, after)
    for where, after in (
        ("megatron_sep.train.checkpoint:_fresh_directory", False),
        ("megatron_sep.train.checkpoint:_fresh_directory", True),
        ("megatron_sep.train.megatron_engine:MegatronEngine.begin_save", True),
        ("os:fsync", False),
        ("os:fsync", True),
        ("megatron_sep.train.checkpoint:file_record", False),
        ("megatron_sep.train.checkpoint:seal", False),
        ("megatron_sep.weights.sealed:write_manifest", False),
        ("megatron_sep.weights.sealed:write_manifest", True),
        ("megatron_sep.weights.sealed:flush_tree", False),
        ("pathlib:Path.rename", False),
        ("pathlib:Path.rename", True),
        ("megatron_sep.weights.sealed:flush", False),
        ("megatron_sep.train.checkpoint:Checkpoints.drop_old", False),
    )
)
"""The moments of a save, in order; beside them there is the middle of a removal, and any moment."""
_STEPPING = (
    Point("megatron_sep.train.feed:Feed.take"),
    Point("megatron_sep.train.megatron_engine:MegatronEngine.forward_backward"),
    Point("megatron_sep.train.megatron_engine:MegatronEngine.step"),
    Point("megatron_sep.train.megatron_engine:MegatronEngine.step", after=True),
    Point("megatron_sep.train.metrics:Metrics.log"),
    Point("megatron_sep.train.metrics:Metrics.log", after=True),
)
_KEEP = "checkpoint.keep=2"


def while_saving(trial: Trial) -> Times:
    """SIGKILL at a named moment of a save, or any time after one began; one trial in eight on two processes."""
    run, count = trial.folder / "run", 2 if trial.number % 8 == 7 else 1
    background = "false" if trial.number % 4 == 2 else "true"
    settings = (_KEEP, f"checkpoint.background={background}", "parallel.timeout_minutes=1")
    victim = trial.random.randrange(count)
    ranks = start_ranks(trial.world, run, count, *settings, before=_of_rank(victim, _strike_while_saving(trial)))
    killed = [rank.wait() for rank in ranks][victim]
    expect(killed.code == -signal.SIGKILL, f"ended with {killed.code} before it was killed: {killed.text[-200:]}")
    straight = trial.world.pair if count == 2 else trial.world.straight
    return goes_on_exactly(trial.world, run, *settings, straight=straight, count=count)


def _of_rank(rank: int, strike: Callable[[], None]) -> Callable[[], None]:
    """For one process of a job alone."""

    def put() -> None:
        if int(os.environ.get("RANK", "0")) == rank:
            strike()

    return put


def _strike_while_saving(trial: Trial) -> Callable[[], None]:
    kind, random = trial.number % (len(_SAVING) + 4), trial.random
    if trial.number % 8 == 7:  # any process of the job comes to it, whatever is its part of the files
        begun = Point("megatron_sep.train.megatron_engine:MegatronEngine.begin_save", after=random.random() < 0.5)
        return at(begun, random.randint(1, 3), kill(random.choice((0, 0.02, 0.2))))
    if kind < len(_SAVING):
        return at(_SAVING[kind], random.randint(1, 3), kill())
    if kind == len(_SAVING):
        return around("shutil:rmtree", _killed_in_a_removal)
    begun = Point("megatron_sep.train.megatron_engine:MegatronEngine.begin_save")
    return at(begun, random.randint(1, 3), kill(random.uniform(0.001, 0.3)))


def _killed_in_a_removal(remove: Callable[..., Any], path: Path, *arguments: Any, **more: Any) -> Any:
    """Of a whole checkpoint, after the first of its files is gone."""
    if re.fullmatch(r"step-\d+", Path(path).name):
        next(Path(path).iterdir()).unlink()
        kill()()
    return remove(path, *arguments, **more)


def while_training(trial: Trial) -> Times:
    """SIGKILL in the data, the forward and backward pass, the optimizer or the log of a step."""
    run, random = trial.folder / "run", trial.random
    point = random.choice(_STEPPING)
    killed = trial.world.train(run, before=at(point, random.randint(1, 11), kill(random.choice((0, 0.002, 0.01)))))
    expect(killed.code == -signal.SIGKILL, f"ended with {killed.code} before it was killed: {killed.text[-200:]}")
    return goes_on_exactly(trial.world, run)


def goes_on_exactly(world: World, run: Path, *settings: str, straight: Path | None = None, count: int = 1) -> Times:
    """Train to the end and compare every number and tensor with the run that nothing happened to, bit for bit.

    ``count`` processes; ``straight`` is the run of as many. Raises WrongError where one differs, or where half a
    checkpoint bears a whole one's name.
    """
    half = [fault for path in sorted((run / "checkpoints").glob("step-????????")) if (fault := _fault(path, run))]
    if half:
        raise WrongError(f"half a checkpoint has its name: {half}")
    began = time.time()
    for ended in [rank.wait() for rank in start_ranks(world, run, count, *settings)]:
        expect(ended.code == 0, f"could not go on: {ended.code}: {ended.text[-300:]}")
    equals_straight(world, run, straight)
    left = [path.name for path in (run / "checkpoints").iterdir() if not re.fullmatch(r"step-\d{8}", path.name)]
    expect(not left, f"left over: {left}")
    return Times(recover=recovery(run, began))


def _fault(path: Path, run: Path) -> str | None:
    """What is wrong with a finished checkpoint; one that was being removed for its age is none any more."""
    from megatron_sep.weights.sealed import fault_of, finished_checkpoints

    being_removed = path in finished_checkpoints(run / "checkpoints")[:-2]
    return None if being_removed else fault_of(path)


def equals_straight(world: World, run: Path, straight: Path | None = None) -> None:
    """Raise WrongError where a number or a tensor is not that of the run that nothing happened to."""
    straight = straight or world.straight
    ours, theirs = numbers(run), numbers(straight)
    wrong = [(one, other) for one, other in zip(ours, theirs, strict=False) if one != other]
    if wrong or len(ours) != len(theirs):
        raise WrongError(f"{len(ours)} steps of {len(theirs)}, the first that differs: {wrong[:1]}")
    sums, expected = tensor_sums(run), tensor_sums(straight)
    if sums != expected:
        raise WrongError(f"tensors differ: {sorted(sums.items() ^ expected.items())}")


def recovery(run: Path, began: float) -> float | None:
    """Seconds from the restart to the first step after it; None where no step was left."""
    after = [line["time"] for line in lines(run) if line["time"] > began]
    return min(after) - began if after else None


def told(ended: Ended, code: int, *words: str) -> float:
    """Seconds until a verb ended as one message with these words. Raises AssertionError for any other end."""
    expect(ended.code == code, f"exit code {ended.code}, not {code}: {ended.text[-400:]}")
    missing = [word for word in words if word not in ended.message]
    expect(bool(ended.message) and not missing, f"{missing} not in {ended.message or ended.text[-400:]!r}")
    return ended.seconds
