"""What a run will need, looked at before its first step: all that is missing in one message."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megatron_sep.config.needs import Needs
from megatron_sep.config.schema import RunConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.data.samples import Samples
from megatron_sep.errors import UserError
from megatron_sep.parallel.topology import Topology
from megatron_sep.weights.sealed import finished_checkpoints

_CLOCK_SECONDS = 30.0
"""Between the clocks of two machines, from which on times of metrics and logs mislead."""


class PreflightError(UserError):
    """All that a run needs and does not have."""


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes at least."""

    checkpoint: int
    """On disk, over all ranks."""
    device: int
    """Of one rank, for weights, gradients and optimizer; activations come on top."""
    host: int
    """Of one rank, for the copy that a save in the background writes."""

    @classmethod
    def of(cls, config: RunConfig, size: ModelSize, topology: Topology) -> "Need":
        """As the engine splits them among the ranks."""
        needs = Needs(config, size.vocab_size, topology.process.size)
        return cls(
            checkpoint=needs.checkpoint_bytes,
            device=needs.state_bytes,
            host=needs.checkpoint_bytes // topology.process.size if config.checkpoint.background else 0,
        )


def preflight(config: RunConfig, samples: Samples, need: Need, topology: Topology) -> list[str]:
    """What a user should know before a run starts. Raises PreflightError on every rank, naming all that is wrong."""
    token = topology.tell(lambda: _write_token(config.dir))
    found = topology.collect(lambda: (time.time(), list(_of_this_process(config, need, topology, token))))
    clocks = [clock for clock, _ in found]
    with suppress(OSError):
        (config.dir / _TOKEN).unlink()
    wrong = topology.tell(lambda: list(_of_the_job(config, need)))
    wrong += [fault for _, faults in found for fault in faults]
    if wrong:
        raise PreflightError(
            "\n".join([f"{len(wrong)} thing(s) to see to before training", *(f"  {w}" for w in wrong)])
        )
    return list(_notes(config, samples, need, clocks))


_TOKEN = ".preflight"
BESIDE = 2**20
"""Bytes of a checkpoint beside its tensors at most: their names and places, sums, pages of the disk."""


def _write_token(run_dir: Path) -> str:
    """A file that all ranks must see. Nothing where the dir takes no file: that is told with the rest."""
    token = uuid.uuid4().hex
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / _TOKEN).write_text(token)
    except OSError:
        return ""
    return token


def _of_this_process(config: RunConfig, need: Need, topology: Topology, token: str) -> Iterator[str]:
    """What is wrong on this process's machine."""
    who = f"rank {topology.process.rank} on {os.uname().nodename}"
    if token and not _reads(config.dir / _TOKEN, token):
        yield f"dir={config.dir}: {who} does not see what rank 0 writes there; set a dir on a disk that all share"
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = psutil.virtual_memory().available
    on_host = need.host * together
    if topology.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if need.device > free:
            yield (
                f"{who}: weights, gradients and optimizer take {_gb(need.device)} of GPU memory, {_gb(free)} are free; "
                "raise parallel.tensor or pipeline, or take more GPUs"
            )
    else:
        on_host += need.device * together
    if on_host > host:
        yield (
            f"{who}: {_gb(on_host)} of memory are needed, {_gb(host)} are free; "
            + ("set checkpoint.background=false, or " if need.host else "")
            + "take a smaller model or more machines"
        )


def _reads(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def _of_the_job(config: RunConfig, need: Need) -> Iterator[str]:
    """What is wrong with the dirs that the first process writes to."""
    checkpoints = config.dir / "checkpoints"
    dirs = {"dir": config.dir, "dir's checkpoints": checkpoints}
    if config.metrics.tensorboard:
        dirs["dir's tensorboard"] = config.dir / "tensorboard"
    if config.data.cache is not None:
        dirs["data.cache"] = config.data.cache
    for name, path in dirs.items():
        try:
            _try_to_write(path)
        except OSError as error:
            yield f"{name}={path}: cannot be written to ({error.strerror}); set another one"
    if config.dir.is_dir():
        yield from _space(config, need, checkpoints)


def _try_to_write(folder: Path) -> None:
    """Leaves no folder that was not there. Raises OSError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    for path in made:
        path.rmdir()


def _space(config: RunConfig, need: Need, checkpoints: Path) -> Iterator[str]:
    there = finished_checkpoints(checkpoints)
    one = _bytes_of(there[-1]) if there else need.checkpoint + BESIDE
    more = 1 if config.checkpoint.keep is None else max(1, config.checkpoint.keep + 1 - len(there))
    free = shutil.disk_usage(config.dir).free
    if more * one > free:
        yield (
            f"{checkpoints}: {more} more checkpoint(s) of {_gb(one)} each do not fit into the {_gb(free)} that are "
            "free; free space, lower checkpoint.keep, or set another dir"
        )


def _bytes_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir() if path.is_file())


def _notes(config: RunConfig, samples: Samples, need: Need, clocks: list[float]) -> Iterator[str]:
    apart = max(clocks) - min(clocks)
    if apart > _CLOCK_SECONDS:
        yield f"the clocks of the machines differ by {apart:.0f} s: times in metrics and logs will mislead"
    newest = max((path.stat().st_mtime for path in config.dir.glob("*.jsonl")), default=0.0)
    if newest - time.time() > _CLOCK_SECONDS:
        yield f"{config.dir} has lines of {newest - time.time():.0f} s after now: a clock was set back"
    asked = config.train.steps * config.train.global_batch_size
    if asked > samples.num_distinct:
        yield (
            f"the data have {samples.num_distinct:,} different sequences; {config.train.steps:,} steps take {asked:,}: "
            f"{asked / samples.num_distinct:.1f} epochs"
        )
    saves = -(-config.train.steps // config.checkpoint.every)
    free = shutil.disk_usage(config.dir).free
    if config.checkpoint.keep is None and saves * need.checkpoint > free:
        yield (
            f"checkpoint.keep is not set: {saves:,} checkpoints take {_gb(saves * need.checkpoint)}, {_gb(free)} are "
            "free"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
