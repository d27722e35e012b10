"""A way to train: what the loop asks of it."""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from megatron_sep.config.engines import ENGINES, MUON
from megatron_sep.data.extras import needs_extra
from megatron_sep.errors import UserError
from megatron_sep.model.decoder import Decoder
from megatron_sep.train.microbatch import Microbatch
from megatron_sep.weights.sealed import CheckpointError


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did, on the device: reading it waits for the step."""

    grad_norm: Tensor
    """Scalar, before clipping. Not finite: a gradient was not, and no weight changed, on any rank."""


@dataclass(frozen=True, eq=False)
class OptimizerSlot:
    """What the optimizer knows of a weight, as far as this rank keeps it."""

    values: slice
    """Which of the weight's values on this rank, flat."""
    tensors: Mapping[str, Tensor]
    """In memory, flat: `param` in fp32, `exp_avg`, `exp_avg_sq`, and the number of steps as `step`."""


class EngineError(UserError):
    """Something that an engine is asked for and does not do."""


class Writing(Protocol):
    """A save that has begun: training may go on, the files are whole when ``finish`` returns."""

    def done(self) -> bool:
        """Is this rank's part over, written or failed, so that ``finish`` need not wait for it?"""
        ...

    def finish(self) -> Sequence[Path]:
        """Wait for this rank's part and name the files that it wrote. Raises what went wrong while writing.

        Every rank of the job calls it together.
        """
        ...


class Engine(ABC):
    """Holds this rank's part of the model and its optimizer; every rank of the job calls each method together.

    What it writes is its own format: nobody else reads its tensors but the reader that ``weights.open_source`` has for
    its name.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    """Other engines whose checkpoints it loads."""

    @abstractmethod
    def forward_backward(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """Gradients of the mean loss of ``count`` micro-batches; that loss over all ranks, an fp32 scalar."""

    @abstractmethod
    def evaluate(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """The mean loss of ``count`` micro-batches over all ranks, an fp32 scalar; nothing is learnt."""

    def look(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """As ``evaluate``, by a pass in which every module is called, so that its hooks are."""
        return self.evaluate(microbatches, count)

    @property
    def decoders(self) -> Sequence[Decoder]:
        """This rank's parts of the model. Raises EngineError where the engine does not show them."""
        raise EngineError(
            f"the engine {self.name!r} does not show its layers; set metrics.attention_mass_every to null"
        )

    @abstractmethod
    def step(self, lr: float) -> StepResult:
        """Clip and apply the gradients, unless one of them is not finite on any rank."""

    @abstractmethod
    def loss_scale(self) -> float:
        """Factor on the loss before the backward pass; 1 but for fp16."""

    def optimizer_slots(self) -> Mapping[nn.Parameter, OptimizerSlot]:
        """What this rank's part of the optimizer knows of each weight. Raises CheckpointError where it is not told."""
        raise CheckpointError(
            f"checkpoint.init_optimizer=true: the engine {self.name!r} takes no optimizer of another program; set it "
            "to false to start with a new one"
        )

    def own_seconds(self) -> float:
        """Mean seconds of a step since the last call in which this rank did not wait for others; NaN: not measured."""
        return math.nan

    @abstractmethod
    def begin_save(self, folder: Path) -> Writing:
        """Begin to write weights and optimizer into an empty folder that all ranks see."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take over what ``begin_save`` wrote, in this or another layout. Raises CheckpointError."""


def engine_class(name: str, optimizer: str = "adamw") -> Any:
    """The class of an engine; called with the model and the sections it needs, as ``MegatronEngine`` is.

    Raises MissingLibraryError, naming the extra that brings the engine's library.
    """
    module, kind = (MUON if optimizer == "muon" else ENGINES[name]).split(":")
    with needs_extra("deepspeed", "deepspeed"):
        return getattr(importlib.import_module(module), kind)
