"""Where a process stands in its job: one value, made once and handed to whoever needs it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sep.parallel.flags import Flags
from megatron_sep.parallel.share import Share
from megatron_sep.parallel.watch import Watch


@dataclass(frozen=True)
class Axis:
    """One way in which the work is split: this process's part of ``size`` parts."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, eq=False)
class Topology:
    """Ranks and sizes of a job, this process's device, and what the processes tell each other outside the model."""

    process: Axis
    """Among all processes of the job."""
    data: Axis
    """Other sequences, the same weights."""
    tensor: Axis
    """Parts of each matrix."""
    pipeline: Axis
    """Consecutive layers; under an interleaved schedule, several such parts."""
    context: Axis
    """Parts of each sequence."""
    device: torch.device
    chunks: int = 1
    """Parts of the layers that this pipeline stage holds: more than 1 under an interleaved schedule."""
    data_group: dist.ProcessGroup | None = None
    """The processes that differ in ``data`` alone; None: all of them."""
    tensor_group: dist.ProcessGroup | None = None
    """The processes that differ in ``tensor`` alone; None: all of them."""
    context_group: dist.ProcessGroup | None = None
    """The processes that differ in ``context`` alone; None: all of them."""
    token_group: dist.ProcessGroup | None = None
    """The processes that hold other tokens: they differ in ``data`` and ``context`` alone; None: all of them."""
    flags: Flags = field(default_factory=lambda: Flags(torch.device("cpu"), 1))
    """What any process may call out to all of them."""
    watch: Watch = field(default_factory=Watch)
    """Over the other processes."""

    @property
    def first(self) -> bool:
        """Does this process speak, log and seal for the job?"""
        return self.process.rank == 0

    def has_embedding(self, chunk: int = 0) -> bool:
        """Does a chunk of this process hold the embedding?"""
        return self.pipeline.rank == 0 and chunk == 0

    def has_loss(self, chunk: int = 0) -> bool:
        """Does a chunk of this process compute the loss?"""
        return self.pipeline.rank == self.pipeline.size - 1 and chunk == self.chunks - 1

    def layers(self, num_layers: int, chunk: int = 0) -> range:
        """The layers of the whole model that a chunk of this process holds."""
        count = num_layers // (self.pipeline.size * self.chunks)
        first = (chunk * self.pipeline.size + self.pipeline.rank) * count
        return range(first, first + count)

    def say(self, message: str) -> None:
        """Print once for the job."""
        if self.first:
            print(message, flush=True)

    def share(self, length: int) -> Share | None:
        """The tokens that this process holds of a sequence of ``length``; None: all of them."""
        return Share(self.context.rank, self.context.size, length) if self.context.size > 1 else None

    def sum_over_tokens(self, counts: Tensor) -> Tensor:
        """Of a tensor that each process with other tokens has its own of; in place."""
        dist.all_reduce(counts, group=self.token_group)
        return counts

    def mean_over_last_stages(self, value: Tensor) -> Tensor:
        """Of a scalar that only last pipeline stages have, 0 elsewhere; every process gets it, and the flags of all."""
        return self.flags.ride(value) * self.pipeline.size / self.process.size

    def of_each(self, value: float) -> list[float]:
        """A number that each process has its own of, by rank."""
        own = torch.tensor([value], dtype=torch.float64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.process.size)]
        dist.all_gather(found, own)
        return [float(each) for each in found]

    def together(self, make: Callable[[], Any]) -> Any:
        """What this process makes, once all have made theirs; the first error among them is every process's error."""
        own: list[Any] = []
        self.collect(lambda: own.append(make()))
        return own[0]

    def tell(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, told to all; an error there is every process's error."""
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = make()
            except Exception as error:  # handed on, whatever it is
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def collect(self, make: Callable[[], Any]) -> list[Any]:
        """What every process makes, told to all, by rank; the first error among them is every process's error."""
        own: tuple[Any, Exception | None]
        try:
            own = (make(), None)
        except Exception as error:  # handed on, whatever it is
            own = (None, error)
        found: list[Any] = [None] * self.process.size
        dist.all_gather_object(found, own)
        for _, failure in found:
            if failure is not None:
                raise failure
        return [value for value, _ in found]
