"""The saves of a run in training: the steps go on while a checkpoint is written."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_sep.parallel.flags import Flag
from megatron_sep.train.checkpoint import Checkpoints, NotWrittenError, Save
from megatron_sep.train.engine import Engine
from megatron_sep.train.exports import Exports
from megatron_sep.train.history import History
from megatron_sep.train.statistics import Statistics
from megatron_sep.weights.sealed import Description


@dataclass
class Saves:
    """At most one is on its way. Every rank of the job calls each method together."""

    checkpoints: Checkpoints
    exports: Exports
    engine: Engine
    statistics: Statistics
    history: History
    background: bool
    """False: ``begin`` waits for it."""
    failure: NotWrittenError | None = None
    """Of the last one, where it could not be written."""
    _save: Save | None = None
    _began: float = 0.0
    _told: bool = False

    def begin(self, description: Description) -> None:
        """Begin to write a checkpoint; one that is still on its way is waited for.

        What goes wrong is said and kept for ``finish``; training goes on.
        """
        self.settle()
        self.exports.clear(description.state.step)
        self._began = time.perf_counter()
        self._try(description.state.step, lambda: self._start(description))
        if not self.background:
            self.settle()

    def tell(self) -> None:
        """Let the other ranks know whether this one is still writing."""
        self.checkpoints.topology.flags.set(Flag.BUSY, self._save is not None and self._save.busy)

    def go_on(self, heard: frozenset[Flag]) -> None:
        """Do the next part of what is on its way if no rank is busy any more, as far as was ``heard``."""
        self.exports.look()
        told, self._told = self._told, True  # what is heard is a step old: of the part before, right after a part
        if self._save is not None and told and Flag.BUSY not in heard:
            self._proceed()

    def settle(self) -> None:
        """Wait for what is on its way, well or not."""
        while self._save is not None:
            self._proceed()
        with self.statistics.aside("save", more=True):
            self.exports.settle()

    def finish(self) -> None:
        """Wait for what is on its way. Raises NotWrittenError where the last checkpoint could not be written."""
        self.settle()
        if self.failure is not None:
            raise self.failure

    def _start(self, description: Description) -> Path | None:
        self._save = self.checkpoints.begin(description, self.engine)
        return None

    def _proceed(self) -> None:
        save = self._save
        assert save is not None
        sealed = self._try(save.step, save.proceed)
        if sealed is not None:
            self.exports.begin(sealed, save.step)

    def _try(self, step: int, act: Callable[[], Path | None]) -> Path | None:
        flags = self.checkpoints.topology.flags
        sealed = None
        try:
            with self.statistics.aside("save", more=self._save is not None):
                sealed = act()
        except NotWrittenError as error:
            self._save, self.failure = None, error
            self.checkpoints.topology.say(f"step {step}: {error}; training goes on")
            self.history.add("save failed", step=step, message=str(error))
        if sealed is not None:
            self._save, self.failure = None, None
            self.statistics.saved(time.perf_counter() - self._began)
        flags.set(Flag.BUSY, self._save is not None)
        self._told = False
        return sealed
