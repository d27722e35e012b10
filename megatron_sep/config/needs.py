"""Bytes that a run needs, estimated from its configuration alone; torch-free."""

import math
from dataclasses import dataclass

from megatron_sep.config.activations import Activations
from megatron_sep.config.schema import RunConfig
from megatron_sep.config.size import ModelSize

_MOMENTS = 8
"""Of AdamW, fp32, a weight."""


@dataclass(frozen=True)
class Needs:
    """What one of ``ranks`` processes holds on its device, and what a checkpoint takes on the disk."""

    config: RunConfig
    vocab_size: int
    ranks: int

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same part of the model, whether they share batches or sequences."""
        parallel = self.config.parallel
        return max(1, self.ranks // (parallel.tensor * parallel.pipeline))

    @property
    def microbatches(self) -> int:
        """Of a step, on one process."""
        together = self.config.train.micro_batch_size * max(1, self.data_ranks // self.config.parallel.context)
        return max(1, self.config.train.global_batch_size // together)

    @property
    def activations(self) -> Activations:
        """What the passes of a process keep."""
        return Activations(self.config, self.vocab_size, self.microbatches)

    @property
    def weights(self) -> int:
        """Of the largest rank: its layers, and an embedding or output that pipeline stages do not share."""
        size, parallel = ModelSize(self.config.model, self.vocab_size), self.config.parallel
        outside = size.embedding_parameters
        layers = (size.parameters - outside) / parallel.pipeline
        tables = outside if parallel.pipeline == 1 else self.vocab_size * self.config.model.hidden_size
        return math.ceil((layers + tables) / parallel.tensor)

    @property
    def weight_bytes(self) -> int:
        """As they compute."""
        split = self.config.parallel.zero_stage == 3
        return math.ceil(self.weights * self._number * (self._share if split else 1))

    @property
    def gradient_bytes(self) -> int:
        """Their fp32 sums."""
        return math.ceil(self.weights * 4 * (self._share if self.config.parallel.zero_stage > 1 else 1))

    @property
    def optimizer_bytes(self) -> int:
        """fp32 weights and moments, as the engine splits them among the data-parallel ranks."""
        zero = self.config.parallel.engine == "deepspeed"
        master = 0 if self._number == 4 and not zero else 4
        whole = self.config.optimizer.kind == "muon"  # whole on every rank
        return math.ceil(self.weights * (master + _MOMENTS) * (1.0 if whole else self._share))

    @property
    def _number(self) -> int:
        return 4 if self.config.train.precision == "fp32" else 2

    @property
    def _share(self) -> float:
        return 1 / self.data_ranks

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def activation_bytes(self) -> int:
        """Of the micro-batches that are in flight, with the logits of one, on the fuller of first and last stage."""
        kept, logits = self.activations.kept, self.activations.logits
        stages = self.config.parallel.pipeline
        if stages > 1:
            kept = max(kept, logits + math.ceil(kept / min(stages, self.microbatches)))
            logits = 0
        return kept + logits + self.activations.plans + self.activations.communication

    @property
    def device_bytes(self) -> int:
        """All together; libraries and fragments come on top.

        When the backward pass ends, its gradients in 16 bits stand in the place of the activations.
        """
        return self.state_bytes + max(self.activation_bytes, self.weights * self._number)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, fp32 weights and moments of the whole model."""
        return ModelSize(self.config.model, self.vocab_size).parameters * (self._number + 4 + _MOMENTS)

    @property
    def export_bytes(self) -> int:
        """Weights of the whole model, as one export has them; 0 where none are asked for."""
        if self.config.checkpoint.export_every is None:
            return 0
        return ModelSize(self.config.model, self.vocab_size).parameters * self._number

    @property
    def disk_bytes(self) -> int:
        """Of the checkpoints that are kept, one that is being written, and all exports."""
        steps, checkpoint = self.config.train.steps, self.config.checkpoint
        made = -(-steps // checkpoint.every)
        exports = steps // (checkpoint.every * (checkpoint.export_every or 1))
        return self.checkpoint_bytes * (min(made, checkpoint.keep or made) + 1) + self.export_bytes * exports
