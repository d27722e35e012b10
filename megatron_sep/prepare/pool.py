"""Who does the work on blocks: processes of this machine."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, Protocol

from megatron_sep.prepare import worker
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.receipt import PrepareError


class Pool(Protocol):
    """Workers, each with a ``worker.Worker`` of the job."""

    size: int
    """How many work at once."""
    machines: int
    """On so many machines."""

    def map(self, function: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        """Each item with its result, in order; a few items ahead at most, so that memory does not grow."""
        ...


def in_order(
    items: Iterator[Any], submit: Callable[[Any], Any], result: Callable[[Any], Any], size: int
) -> Iterator[tuple[Any, Any]]:
    """Each item with the result of what was submitted for it, so many ahead as keep ``size`` workers busy."""
    waiting: deque[tuple[Any, Any]] = deque()
    for item in items:
        waiting.append((item, submit(item)))
        if len(waiting) > size + 2:
            item, coming = waiting.popleft()
            yield item, result(coming)
    while waiting:
        item, coming = waiting.popleft()
        yield item, result(coming)


def map_here(function: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """What ``Pool.map`` does, by this process: of files that no other machine sees."""
    return ((item, function(item)) for item in items)


class ProcessPool:
    """Worker processes that are started when they are first needed."""

    def __init__(self, job: Job) -> None:
        self.machines = 1
        self.size = job.config.workers or len(os.sched_getaffinity(0))
        self._executor = ProcessPoolExecutor(self.size, get_context("spawn"), initializer=worker.start, initargs=(job,))

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        """As ``Pool`` says. Raises PrepareError where a process was killed."""
        try:
            yield from in_order(items, partial(self._submit, function), Future.result, self.size)
        except BrokenProcessPool as error:
            raise PrepareError(
                "a worker process was killed, as by a machine without free memory; run again to go on where it "
                "stopped, with fewer workers if it happens twice"
            ) from error

    def _submit(self, function: Callable[[Any], Any], item: Any) -> Future[Any]:
        """Ctrl-C, which a terminal sends to every process, is for the first one alone: those it starts never see it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return self._executor.submit(function, item)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
