"""Checkpoints that are complete and verified, or ignored.

A checkpoint is written into `step-NNNNNNNN.partial`, with the SHA-256 of every file in `manifest.json`, flushed to the
disk and renamed to `step-NNNNNNNN`. A directory without that final name, or whose files differ from its manifest, is
never loaded.
"""

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sep.config.schema import ModelConfig, RunConfig
from megatron_sep.data.manifest import sha256, versions
from megatron_sep.parallel.groups import is_first_rank

Tree = dict[str, Any]
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_SEAL = "manifest.sha256"
_PACKAGES = ("megatron_sep", "torch", "megatron-core", "numpy", "tokenizers")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or taken up."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; with the seed it fixes data order and dropout."""

    step: int = 0
    consumed: int = 0
    """Training sequences seen."""
    skipped: int = 0
    """Steps whose gradient was not finite."""

    def advance(self, sequences: int, applied: bool) -> "TrainState":
        return TrainState(self.step + 1, self.consumed + sequences, self.skipped + (not applied))


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, keep: int | None) -> None:
        self.dir, self.keep = run_dir / "checkpoints", keep

    def save(self, state: TrainState, config: RunConfig, vocab_size: int, tensors: Tree) -> Path:
        """Write a checkpoint from every rank of the job; older ones go only after it is in place.

        Raises CheckpointError, with the older checkpoints untouched, where the disk refuses.
        """
        from megatron.core import dist_checkpointing

        final = self.dir / f"step-{state.step:08d}"
        partial = final.with_suffix(".partial")
        self._on_first_rank(lambda: _fresh_directory(partial))
        try:
            dist_checkpointing.save(tensors, str(partial))
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            self._on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise _not_written(final, error) from error
        self._on_first_rank(lambda: finish(partial, final, description(state, config, vocab_size)))
        self._on_first_rank(self._drop_old)
        return final

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; what does not is named and passed over.

        The first rank reads the files and tells the others.
        """
        found = [next(self._verified(), None) if is_first_rank() else None]
        dist.broadcast_object_list(found)
        return found[0]

    def _verified(self) -> Iterator[Path]:
        """Checkpoints without a fault, newest first."""
        for path in reversed(self.all()):
            fault = fault_of(path)
            if fault is None:
                yield path
            else:
                print(f"checkpoint passed over: {fault}", flush=True)

    def all(self) -> list[Path]:
        """Directories of finished checkpoints, oldest first."""
        if not self.dir.is_dir():
            return []
        named = [(int(match[1]), path) for path in self.dir.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(named)]

    def _drop_old(self) -> None:
        if self.keep is not None:
            for path in self.all()[: -self.keep]:
                shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def _on_first_rank(act: Callable[[], None]) -> None:
        """Do something once for the job; its failure is every rank's failure."""
        failed: list[Exception | None] = [None]
        if is_first_rank():
            try:
                act()
            except OSError as error:
                failed = [error]
        dist.broadcast_object_list(failed)
        if failed[0] is not None:
            raise CheckpointError(str(failed[0])) from failed[0]


def load(path: Path, frame: Tree) -> tuple[TrainState, Tree]:
    """Read a verified checkpoint into the tensors of ``frame``, on this or another number of data-parallel ranks."""
    from megatron.core import dist_checkpointing

    return TrainState(**describe(path)["state"]), dist_checkpointing.load(frame, str(path))


def describe(path: Path) -> Tree:
    """The step, the configuration and the versions that a checkpoint was written with."""
    found: Tree = json.loads((path / _MANIFEST).read_text())["description"]
    return found


def tokenizer_of(path: Path, config: RunConfig) -> Path | None:
    """The tokenizer that lies in a checkpoint, or that of its run; None where neither is there."""
    inside = (path / name for name in ("tokenizer.json", "tokenizer.model"))
    return next((file for file in (*inside, config.tokenizer.path) if file.is_file()), None)


def check_fits(path: Path, description: Tree, config: RunConfig, vocab_size: int) -> None:
    """Raise CheckpointError where the model differs from the one that was saved."""
    now = config.model_dump(mode="json")["model"] | {"vocab_size": vocab_size}
    saved = ModelConfig.model_validate(description["config"]["model"]).model_dump(mode="json")
    saved["vocab_size"] = description["vocab_size"]
    free = {"hidden_dropout", "attention_dropout", "init", "output_init", "init_std", "sequence_length"}
    free.add("vocab_multiple")
    wrong = [f"model.{k} is {saved[k]} there and {now[k]} here" for k in now if k not in free and saved[k] != now[k]]
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}. Set them as they were, or start in another dir")


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        if (path / _SEAL).read_text() != sha256(path / _MANIFEST):
            return f"{path}: {_MANIFEST} and its {_SEAL} do not agree"
        expected: dict[str, Tree] = json.loads((path / _MANIFEST).read_text())["files"]
    except OSError as error:
        return f"{path}: is not whole: {error}"
    for name, record in expected.items():
        file = path / name
        if not file.is_file():
            return f"{file}: is missing"
        if file.stat().st_size != record["bytes"]:
            return f"{file}: has {file.stat().st_size} bytes, was written with {record['bytes']}"
        if sha256(file) != record["sha256"]:
            return f"{file}: its SHA-256 is not the one it was written with"
    return None


def finish(partial: Path, final: Path, description: Tree) -> None:
    """List the files of a directory with their sums, flush them and give it its name."""
    try:
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps({"description": description, "files": files}, indent=1))
        (partial / _SEAL).write_text(sha256(partial / _MANIFEST))
        for path in (*partial.iterdir(), partial):
            flush(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        flush(final.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(str(_not_written(final, error))) from error


def _not_written(final: Path, error: BaseException) -> CheckpointError:
    cause = next(_os_errors(error), (str(error).strip() or repr(error)).splitlines()[-1])
    free = shutil.disk_usage(final.parent).free / 1e9
    return CheckpointError(
        f"{final}: could not be written ({cause}; {free:.1f} GB free on that disk); the checkpoints before it are "
        "untouched. Free space, or lower checkpoint.keep, and start again"
    )


def _os_errors(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        if isinstance(error, OSError):
            yield str(error)
        error = error.__cause__ or error.__context__


def description(state: TrainState, config: RunConfig, vocab_size: int) -> Tree:
    """What a checkpoint says of itself."""
    return {
        "state": asdict(state),
        "vocab_size": vocab_size,
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **versions(*_PACKAGES)},
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
    }


def _fresh_directory(path: Path) -> None:
    """Leftovers of a killed save go here, and nowhere else."""
    for leftover in path.parent.glob("step-*.partial"):
        shutil.rmtree(leftover)
    path.mkdir(parents=True)


def flush(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
