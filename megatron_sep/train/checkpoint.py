"""The checkpoints of a run: named, sealed once all ranks have written, and removed when they are too old."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_sep.errors import RunFailure
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.engine import Engine, Writing
from megatron_sep.weights.sealed import (
    Description,
    checkpoint_name,
    file_record,
    finished_checkpoints,
    newest_verified,
    seal,
)


class NotWrittenError(RunFailure):
    """A checkpoint could not be written; those before it are untouched."""


class Checkpoints:
    """The checkpoints of one run; every rank of the job calls each method together."""

    def __init__(self, run_dir: Path, keep: int | None, topology: Topology) -> None:
        self.dir, self.keep, self._topology = run_dir / "checkpoints", keep, topology

    def begin(self, description: Description, engine: Engine) -> "Save":
        """Begin to write a checkpoint; it is there when ``finish`` of what is returned has returned.

        Raises NotWrittenError.
        """
        final = self.dir / checkpoint_name(description.state.step)
        partial = final.with_suffix(".partial")
        self._topology.tell(lambda: _fresh_directory(partial))
        try:
            return Save(self, final, description, engine.begin_save(partial))
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            self._topology.tell(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise _not_written(final, error) from error

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; what does not is named and passed over.

        The first rank reads the files and tells the others.
        """
        found: Path | None = self._topology.tell(lambda: newest_verified(self.dir))
        return found

    def drop_old(self) -> None:
        """Remove all but the newest ``keep``, by the first rank."""
        if self.keep is not None:
            for path in finished_checkpoints(self.dir)[: -self.keep]:
                shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Save:
    """A checkpoint that is being written."""

    checkpoints: Checkpoints
    final: Path
    description: Description
    writing: Writing

    def finish(self) -> Path:
        """Wait for every rank, seal what they wrote and give it its name; older ones go only after it is in place.

        Each rank reads back and sums what it wrote itself. Raises NotWrittenError, with the older ones untouched.
        """
        topology = self.checkpoints._topology
        partial = self.final.with_suffix(".partial")
        try:
            parts = topology.collect(lambda: {path.name: file_record(path) for path in self.writing.finish()})
            files = {name: record for part in parts for name, record in part.items()}
            topology.tell(lambda: seal(partial, self.final, self.description.record(topology.process.size), files))
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            topology.tell(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise _not_written(self.final, error) from error
        topology.tell(self.checkpoints.drop_old)
        return self.final


def _not_written(final: Path, error: BaseException) -> NotWrittenError:
    cause = next(_os_errors(error), (str(error).strip() or repr(error)).splitlines()[-1])
    free = shutil.disk_usage(final.parent).free / 1e9
    return NotWrittenError(
        f"{final}: could not be written ({cause}; {free:.1f} GB free on that disk); the checkpoints before it are "
        "untouched. Free space, or lower checkpoint.keep, and start again"
    )


def _os_errors(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        if isinstance(error, OSError):
            yield str(error)
        error = error.__cause__ or error.__context__


def _fresh_directory(path: Path) -> None:
    """Leftovers of a killed save go here, and nowhere else."""
    for leftover in (*path.parent.glob("step-*.partial"), *path.parent.glob("step-*.replaced")):
        shutil.rmtree(leftover)
    path.mkdir(parents=True)
