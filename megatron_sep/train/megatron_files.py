"""megatron-core's checkpoints, written by a thread of this process while training goes on."""

import os
import queue
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_sep.parallel.background import in_background
from megatron_sep.parallel.core_versions import own_writer
from megatron_sep.parallel.results import results_into
from megatron_sep.weights.safe_metadata import read_metadata
from megatron_sep.weights.sealed import CheckpointError

Bucket = tuple[Any, str, tuple[list[Any], list[Any]]]
"""megatron-core's name for what goes into one file: its path, its name, and its bytes and tensors with their places."""
Results = queue.SimpleQueue[Any]
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp")
"""What torch's distributed checkpoint calls the files of a rank."""

PLAIN = "common.pt"
"""The file of what is no tensor."""


def check_safe(folder: Path) -> None:
    """Before megatron-core reads a checkpoint without restriction. Raises CheckpointError, WeightsError."""
    read_metadata(folder)
    if not (folder / PLAIN).exists():  # newer versions would unpickle what is no tensor from among the tensors
        raise CheckpointError(f"{folder}: has no {PLAIN}, which every checkpoint has; take another one")


class MegatronWriting:
    """A save that has begun: what is written is a copy on the host, taken before this returns."""

    def __init__(self, state: dict[str, Any], folder: Path, rank: int) -> None:
        """Every rank of the job at once; ``state``: megatron-core's sharded state dict."""
        self._folder, self._rank = folder, rank
        results: Results = queue.SimpleQueue()
        plain = extract_matching_values(state, lambda value: isinstance(value, ShardedBase))[1]
        with results_into(results):
            request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **own_writer())
        if rank == 0:
            _write_plain(plain, folder / PLAIN)
        self._finalize = tuple(request.finalize_fns)
        write = _copied(request, results) if request.async_fn else lambda: None  # nothing of it is this rank's
        self._written: Future[None] = in_background(write, "checkpoint")

    def done(self) -> bool:
        """Has this rank written its part, well or not?"""
        return self._written.done()

    def finish(self) -> Sequence[Path]:
        """Wait for this rank's part, put all ranks' parts together and name the files that this rank wrote."""
        self._written.result()
        for finalize in self._finalize:
            finalize()
        return [path for path in sorted(self._folder.iterdir()) if self._wrote(path)]

    def _wrote(self, path: Path) -> bool:
        """A rank's own tensors are its own; what there is once for the job is the first rank's."""
        found = _RANK_FILE.fullmatch(path.name)
        return int(found[1] if found else 0) == self._rank


def _write_plain(values: dict[str, Any], path: Path) -> None:
    """What is no tensor, where every version looks for it first; newer ones write it among the tensors alone."""
    if not path.exists():
        with path.open("xb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())


def _copied(request: Any, results: Results) -> Callable[[], None]:
    """What writes this rank's files, from copies that no step changes."""
    (transforms, _), live = request.async_fn.args, request.async_fn_args[1]
    buckets = [_own(copied, bucket) for copied, bucket in zip(request.preload_fn(), live, strict=True)]
    live[:] = [(path, name, ([], [])) for path, name, _ in live]  # megatron-core counts them when all is written
    return lambda: _write(buckets, transforms, results)


def _own(copied: Bucket, live: Bucket) -> Bucket:
    """Tensors that came from a GPU are copies already; on the CPU they are still those that training changes."""
    path, name, (plain, tensors) = copied
    pairs = zip(tensors, live[2][1], strict=True)
    return path, name, (plain, [(item, t.clone() if t is original else t) for (item, t), (_, original) in pairs])


def _write(buckets: list[Bucket], transforms: Any, results: Results) -> None:
    """Every file, flushed to the disk; megatron-core looks for what was written, or the first error, in ``results``."""
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        found: queue.Queue[Any] = queue.Queue()
        counted: queue.Queue[None] = queue.Queue()  # of writers at work, which somebody could wait for
        counted.put(None)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, found, counted, use_fsync=True)
        _, outcome = found.get_nowait()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[number] = outcome
    results.put(written)
