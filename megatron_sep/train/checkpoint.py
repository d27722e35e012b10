"""The checkpoints of a run: named, sealed once all ranks have written, and removed when they are too old."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_sep.errors import RunFailure
from megatron_sep.parallel.background import in_background
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.engine import Engine, Writing
from megatron_sep.weights.sealed import (
    Description,
    Tree,
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
        self.dir, self.keep, self.topology = run_dir / "checkpoints", keep, topology

    def begin(self, description: Description, engine: Engine) -> "Save":
        """Begin to write a checkpoint; it is there when ``finish`` of what is returned has returned.

        No other may be on its way. Raises NotWrittenError.
        """
        final = self.dir / checkpoint_name(description.state.step)
        try:
            self.topology.tell(lambda: _fresh_directory(_partial(final)))
            return Save(self, final, description, engine.begin_save(_partial(final)))
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            self.clear_away(final)
            raise _not_written(final, error) from error

    def newest(self, passed_over: Callable[[str], None] = lambda _: None) -> Path | None:
        """The newest checkpoint that verifies; what does not is named, also to ``passed_over``, and passed over.

        The first rank reads the files and tells the others.
        """
        found: Path | None = self.topology.tell(lambda: self._newest(passed_over))
        return found

    def _newest(self, passed_over: Callable[[str], None]) -> Path | None:
        for replaced in self.dir.glob("step-*.replaced"):  # a kill came between the old name and the new one
            if not replaced.with_suffix("").exists():
                replaced.rename(replaced.with_suffix(""))
        return newest_verified(self.dir, passed_over)

    def drop_old(self) -> None:
        """Remove all but the newest ``keep``; every rank waits for it."""
        self.topology.tell(self._drop_old)

    def _drop_old(self) -> None:
        if self.keep is not None:
            for path in finished_checkpoints(self.dir)[: -self.keep]:
                shutil.rmtree(path, ignore_errors=True)

    def clear_away(self, final: Path) -> None:
        """Remove what a failed save has left; every rank waits for it."""
        self.topology.tell(lambda: shutil.rmtree(_partial(final), ignore_errors=True))


class Save:
    """A checkpoint that is being written, part by part: the tensors, then the sum of each file, then the seal."""

    def __init__(self, checkpoints: Checkpoints, final: Path, description: Description, writing: Writing) -> None:
        self._checkpoints, self._final = checkpoints, final
        self._description, self._writing = description, writing
        self._sums: Future[dict[str, Tree]] | None = None

    @property
    def step(self) -> int:
        """Of the run, at which it was begun."""
        return self._description.state.step

    @property
    def busy(self) -> bool:
        """Is a part still on its way in this process? Training may go on meanwhile."""
        return not (self._writing if self._sums is None else self._sums).done()

    def proceed(self) -> Path | None:
        """The next part; every rank calls it together, once none is busy, or else the ranks wait for each other.

        The checkpoint's path once it is there; older ones go only then. Each rank reads back and sums what it wrote
        itself. Raises NotWrittenError, with the older ones untouched.
        """
        try:
            if self._sums is None:
                files = self._writing.finish()
                self._sums = in_background(lambda: {path.name: file_record(path) for path in files}, "checkpoint")
                return None
            self._seal(self._sums)
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            self._checkpoints.clear_away(self._final)
            raise _not_written(self._final, error) from error
        self._checkpoints.drop_old()
        return self._final

    def finish(self) -> Path:
        """Wait until the checkpoint is there. Raises NotWrittenError, with the older ones untouched."""
        sealed = None
        while sealed is None:
            sealed = self.proceed()
        return sealed

    def _seal(self, sums: "Future[dict[str, Tree]]") -> None:
        topology = self._checkpoints.topology
        files = {name: record for part in topology.collect(sums.result) for name, record in part.items()}
        description = self._description.record(topology.process.size)
        topology.tell(lambda: seal(_partial(self._final), self._final, description, files))


def _not_written(final: Path, error: BaseException) -> NotWrittenError:
    cause = next(_os_errors(error), (str(error).strip() or repr(error)).splitlines()[-1])
    free = shutil.disk_usage(final.parent if final.parent.exists() else final.parent.parent).free / 1e9
    return NotWrittenError(
        f"{final}: could not be written ({cause}; {free:.1f} GB free on that disk); the checkpoints before it are "
        "untouched. Free space, or lower checkpoint.keep"
    )


def _os_errors(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        if isinstance(error, OSError):
            yield str(error)
        error = error.__cause__ or error.__context__


def _partial(final: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return final.with_suffix(".partial")


def _fresh_directory(path: Path) -> None:
    """Leftovers of a killed save go here, and nowhere else."""
    for leftover in (*path.parent.glob("step-*.partial"), *path.parent.glob("step-*.replaced")):
        shutil.rmtree(leftover)
    path.mkdir(parents=True)
