"""Trains a tiny run again and again in one job of two processes, each time with something that befalls one of them.

torchrun --nproc-per-node 2 tests/train/two_ranks.py OUT RUN.yaml

Each case trains in OUT/NAME; OUT/NAME.json has how it ended on each rank.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sep.config import load_config
from megatron_sep.errors import SepError
from megatron_sep.parallel.groups import join_job, set_layout
from megatron_sep.train.signals import Signals

SLOW = 1.5
"""Seconds that rank 1 writes longer than rank 0."""


class PoweredOffError(Exception):
    """Nothing that follows is done any more."""


class Late:
    """What an engine writes, there only after a while."""

    def __init__(self, writing: Any, seconds: float) -> None:
        self._writing, self._there = writing, time.monotonic() + seconds

    def done(self) -> bool:
        return self._writing.done() and time.monotonic() >= self._there

    def finish(self) -> Sequence[Path]:
        while not self.done():
            time.sleep(0.01)
        return self._writing.finish()


def train(out: Path, name: str, prepare: Callable[[Any, Signals], None], *words: str) -> str:
    """Train in OUT/NAME; how it ended."""
    from megatron_sep.train.loop import train as loop
    from megatron_sep.train.run import build_run

    signals = Signals()
    config = load_config(Path(sys.argv[2]), [f"dir={out}/{name}", *words])
    run = build_run(config, set_layout(config.parallel, config.train.seed), (), signals)
    prepare(run, signals)
    try:
        loop(run)
    except SepError as end:
        return f"{type(end).__name__}: {end}"
    except PoweredOffError:
        while run.saves._save is not None and run.saves._save.busy:  # a thread of a process that is gone is gone
            time.sleep(0.01)
        return "powered off"
    return "done"


def in_step(step: int, act: Callable[[], None]) -> Callable[[Any, Signals], None]:
    """Prepare a run for something to happen in a step."""

    def prepare(run: Any, _: Signals) -> None:
        rules = run.train_data.rules

        def happens(number: int) -> object:
            if number == step:
                act()
            return rules(number)

        run.train_data.rules = happens

    return prepare


def stopped(rank: int) -> Callable[[Any, Signals], None]:
    """Rank 1 receives SIGTERM in step 3."""

    def prepare(run: Any, signals: Signals) -> None:
        if rank == 1:
            in_step(3, lambda: signals.received(signal.SIGTERM))(run, signals)
        signals.can_finish = True

    return prepare


def cut(_: int) -> Callable[[Any, Signals], None]:
    """The power goes in step 5, while the checkpoint of step 4 is on its way."""

    def off() -> None:
        raise PoweredOffError

    return in_step(5, off)


def slow(rank: int) -> Callable[[Any, Signals], None]:
    """Rank 1 writes each checkpoint for longer, beside the steps."""

    def prepare(run: Any, _: Signals) -> None:
        begin = run.engine.begin_save
        if rank == 1:
            run.engine.begin_save = lambda folder: Late(begin(folder), SLOW)

    return prepare


def lagging(rank: int) -> Callable[[Any, Signals], None]:
    """Rank 1 takes half a second longer for each micro-batch."""

    def prepare(run: Any, _: Signals) -> None:
        if rank == 1:
            take = run.train_data.take

            def late(step: int, consumed: int) -> Any:
                for batch in take(step, consumed):
                    time.sleep(0.5)
                    yield batch

            run.train_data.take = late

    return prepare


def full(rank: int) -> Callable[[Any, Signals], None]:
    """The disk of rank 1 takes nothing of the first checkpoint."""

    def prepare(_: Any, __: Signals) -> None:
        from megatron_sep.train import megatron_files

        write, times = megatron_files._write, []

        def fail(buckets: Any, transforms: Any, results: Any) -> None:
            times.append(1)
            if rank == 1 and len(times) == 1:
                results.put(OSError(28, "No space left on device", "the disk of rank 1"))
            else:
                write(buckets, transforms, results)

        megatron_files._write = fail

    return prepare


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    watch = join_job(timeout_minutes=4)
    topology = set_layout(load_config(Path(sys.argv[2])).parallel, 1234)
    rank = topology.process.rank

    def nothing(_: Any, __: Signals) -> None:
        pass

    cases: dict[str, tuple[Callable[[Any, Signals], None], list[str]]] = {
        "beside": (nothing, []),
        "waited": (nothing, ["checkpoint.background=false"]),
        "stopped": (stopped(rank), []),
        "cut": (cut(rank), []),
        "slow": (slow(rank), ["checkpoint.every=3"]),
        "lagging": (lagging(rank), ["train.steps=4", "metrics.every=2", "parallel.tensor=1"]),
        "full": (full(rank), []),
    }
    for name, (prepare, words) in cases.items():
        ends = topology.collect(lambda: train(out, name, prepare, *words))  # noqa: B023
        if topology.first:
            (out / f"{name}.json").write_text(json.dumps(ends))
    for name in ("stopped", "cut"):
        topology.collect(lambda: train(out, name, nothing))  # noqa: B023
    watch.leave(None)


if __name__ == "__main__":
    main()
