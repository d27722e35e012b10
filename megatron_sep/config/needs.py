"""Bytes that a run needs, estimated from its configuration alone; torch-free."""

import math
from dataclasses import dataclass

from megatron_sep.config.schema import RunConfig
from megatron_sep.config.size import ModelSize

_MOMENTS = 8
"""Of AdamW, fp32, a weight."""
_LAYER = 34
"""Bytes that a layer keeps of a token and a hidden value in 16 bits (arXiv 2205.05198, equation 2); attention itself
keeps none that grow with the square of the sequence."""
_SPLIT_OF_LAYER = 24
"""Of those, what tensor parallelism splits without sequence parallelism (the same, equation 3)."""


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
    def weights(self) -> int:
        """Of the largest rank: its layers, and an embedding or output that pipeline stages do not share."""
        size, parallel = ModelSize(self.config.model, self.vocab_size), self.config.parallel
        outside = size.embedding_parameters
        layers = (size.parameters - outside) / parallel.pipeline
        tables = outside if parallel.pipeline == 1 else self.vocab_size * self.config.model.hidden_size
        return math.ceil((layers + tables) / parallel.tensor)

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, fp32 weights and moments, as the engine splits them among the data-parallel ranks."""
        wide = self.config.train.precision == "fp32"
        weight, gradient, share = (4 if wide else 2), 4, 1 / self.data_ranks
        stage, zero = self.config.parallel.zero_stage, self.config.parallel.engine == "deepspeed"
        master = 0 if wide and not zero else 4
        if self.config.optimizer.kind == "muon":  # whole on every rank
            share = 1.0
        own = (weight if stage < 3 else weight * share) + (gradient if stage < 2 else gradient * share)
        return math.ceil(self.weights * (own + (master + _MOMENTS) * share))

    @property
    def activation_bytes(self) -> int:
        """Of the micro-batches that are in flight, with the logits of one."""
        train, model, parallel = self.config.train, self.config.model, self.config.parallel
        width = 2 if train.precision == "fp32" else 1
        tokens = train.micro_batch_size * model.sequence_length / parallel.context
        layer = _SPLIT_OF_LAYER / parallel.tensor + (_LAYER - _SPLIT_OF_LAYER) / (
            parallel.tensor if parallel.sequence_parallel else 1
        )
        kept = 2 * model.num_layers + layer if train.recompute else layer * model.num_layers
        logits = tokens * self.vocab_size / parallel.tensor * (4 * width + 4)
        return math.ceil(tokens * model.hidden_size * kept * width + logits)

    @property
    def device_bytes(self) -> int:
        """Both together; libraries and fragments come on top."""
        return self.state_bytes + self.activation_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, fp32 weights and moments of the whole model."""
        weight = 4 if self.config.train.precision == "fp32" else 2
        return ModelSize(self.config.model, self.vocab_size).parameters * (weight + 4 + _MOMENTS)

    @property
    def export_bytes(self) -> int:
        """Weights of the whole model, as one export has them; 0 where none are asked for."""
        if self.config.checkpoint.export_every is None:
            return 0
        weight = 4 if self.config.train.precision == "fp32" else 2
        return ModelSize(self.config.model, self.vocab_size).parameters * weight

    @property
    def disk_bytes(self) -> int:
        """Of the checkpoints that are kept, one that is being written, and all exports."""
        steps, checkpoint = self.config.train.steps, self.config.checkpoint
        made = -(-steps // checkpoint.every)
        exports = steps // (checkpoint.every * (checkpoint.export_every or 1))
        return self.checkpoint_bytes * (min(made, checkpoint.keep or made) + 1) + self.export_bytes * exports
