"""Every k-th checkpoint also as a Hugging Face directory, RUN/export/step-N, written beside the steps."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

from megatron_sep.config.schema import RunConfig
from megatron_sep.errors import UserError
from megatron_sep.files import remove
from megatron_sep.parallel.background import in_background
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.history import History
from megatron_sep.weights.hugging_face import make_config
from megatron_sep.weights.rope_scaling import HuggingFaceError
from megatron_sep.weights.sealed import checkpoint_name

FOLDER = "export"
"""Of a run's dir."""
_SECONDS = 10.0
"""That the other ranks wait for the first one at a time, less than any time-out of theirs."""

Exporter = Callable[[Path, Path], object]
"""Writes the checkpoint that is the first path as a new directory, the second, which is whole or not there."""


class ExportError(UserError):
    """A run whose checkpoints cannot be exported as asked."""


def exporter_of(config: RunConfig, vocab_size: int, write: Exporter | None) -> Exporter | None:
    """What writes this run's exports; None where none are asked for. Raises ExportError before anything is trained."""
    every = config.checkpoint.export_every
    if every is None:
        return None
    if write is None:
        raise ExportError(
            f"checkpoint.export_every={every}: build_run was given nothing that exports; hand it `export`"
        )
    try:
        make_config(config.model, vocab_size, {}, "float32", None)
    except HuggingFaceError as error:
        raise ExportError(f"checkpoint.export_every={every}: {error}; set it to null") from error
    return write


@dataclass(frozen=True)
class _Writing:
    step: int
    checkpoint: Path
    made: "Future[object]"


@dataclass
class Exports:
    """The exports of one run, one at a time; every rank of the job calls each method together.

    The first rank writes, in a thread, from a checkpoint that is sealed. What goes wrong is said and written down, and
    training goes on: the checkpoint is there.
    """

    run_dir: Path
    every: int
    """Steps between two."""
    write: Exporter | None
    """None: none are made."""
    topology: Topology
    history: History
    _writing: "_Writing | None" = None

    def folder(self, step: int) -> Path:
        """Where a step's export lies once it is there."""
        return self.run_dir / FOLDER / checkpoint_name(step)

    def clear(self, step: int) -> None:
        """Remove a step's export before its checkpoint is written again: it would be of other weights."""
        if self._writes(step):
            remove(self.folder(step))

    def begin(self, checkpoint: Path, step: int) -> None:
        """Begin to write what is due of a sealed checkpoint; one on its way is waited for."""
        self.settle()
        write, final = self.write, self.folder(step)
        if write is not None and self._writes(step):
            self._writing = _Writing(step, checkpoint, in_background(lambda: write(checkpoint, final), "checkpoint"))

    def take_up(self, newest: Path | None, step: int) -> None:
        """Remove what a killed process has left, and make up for the export that it did not come to."""
        if self.write is None:
            return
        for leftover in (self.run_dir / FOLDER).glob(".*.partial") if self.topology.first else ():
            remove(leftover)
        missing: bool = self.topology.tell(lambda: not self.folder(step).exists())
        if newest is not None and missing:
            self.begin(newest, step)

    def look(self) -> None:
        """Tell what has become of the one on its way, if it is over; nobody waits."""
        if self._writing is not None and self._writing.made.done():
            self._tell(self._writing)
            self._writing = None

    def settle(self) -> None:
        """Wait for the one on its way, well or not."""
        while self.write is not None and self.topology.tell(self._still_writing):
            pass
        self.look()

    def _writes(self, step: int) -> bool:
        """Is this the process that writes an export, and the step one at which it is due?"""
        return self.write is not None and self.topology.first and step % self.every == 0

    def _still_writing(self) -> bool:
        return self._writing is not None and not wait([self._writing.made], _SECONDS).done

    def _tell(self, writing: "_Writing") -> None:
        error, step = writing.made.exception(), writing.step
        final = self.folder(step)
        if error is None:
            self.topology.say(f"step {step}: exported to {final}")
            self.history.add("export", step=step, directory=str(final.relative_to(self.run_dir)))
            return
        why = str(error).strip() or repr(error)
        self.topology.say(
            f"step {step}: not exported: {why}; training goes on, and `convert {writing.checkpoint} DIR` makes it"
        )
        self.history.add("export failed", step=step, message=why)
