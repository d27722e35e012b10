"""Bytes of what a pass keeps on a device beside the weights, counted tensor by tensor; torch-free.

What is counted is what the fused rows of ``kernels/registry.py`` keep for their backward passes: inputs of norms,
matrix products, GELU and attention, once each. A layer that the reference computes keeps more.
"""

from dataclasses import dataclass

from megatron_sep.config.schema import ModelConfig, RunConfig
from megatron_sep.config.traffic import landmark_bytes
from megatron_sep.config.visible import landmark_share, most_landmarks, num_full_layers

_PLAN = 17
"""Bytes a token: landmark (1), reach (4), landmarks before it (4), the kernel's order of the keys (8)."""
_MOMENTUM = 2 * 4
"""fp32 mean and 1/deviation that a norm keeps of a token."""
_TYPICAL_SHARE = 0.15


@dataclass(frozen=True)
class Activations:
    """Of one process; ``microbatches``: of a step, of which a pipeline has at most as many in flight as stages."""

    config: RunConfig
    vocab_size: int
    microbatches: int

    @property
    def tokens(self) -> float:
        """Of a micro-batch on this process."""
        config = self.config
        return config.train.micro_batch_size * config.model.sequence_length / config.parallel.context

    @property
    def number_bytes(self) -> int:
        """Of a value."""
        return 4 if self.config.train.precision == "fp32" else 2

    @property
    def layers_in_flight(self) -> float:
        """Whole layers of which the first pipeline stage keeps a micro-batch's values (1F1B, arXiv 2104.04473)."""
        parallel = self.config.parallel
        stages, chunks = parallel.pipeline, parallel.virtual_pipeline
        flights: float = min(stages, self.microbatches)
        if chunks > 1:
            flights = min(flights * (1 + (stages - 1) / (stages * chunks)), self.microbatches)
        return self.config.model.num_layers / stages * flights

    @property
    def kept(self) -> int:
        """Between forward and backward pass, by the layers, whole or as far as they are recomputed."""
        if self.config.train.recompute is True:
            return round(self.layers_in_flight * self._stream + self.layer(full=False))
        full = num_full_layers(self.config.attention, self.config.model.num_layers) / self.config.model.num_layers
        mean = full * self.layer(full=True) + (1 - full) * self.layer(full=False)
        return round(self.layers_in_flight * mean)

    def layer(self, full: bool) -> float:
        """What one layer keeps of a micro-batch."""
        model, parallel = self.config.model, self.config.parallel
        own = parallel.tensor if parallel.sequence_parallel else 1
        inside = model.heads_size * 2 + 2 * _key_width(model) + _fc1(model) + model.mlp_size
        streams = (1 if model.parallel_residual else 2) * self._stream
        norms = 2 * self._stream + self.tokens * 2 * _MOMENTUM / own
        attention = self.tokens * model.num_attention_heads * 4 / parallel.tensor
        dropped = 2 * self.tokens * model.hidden_size / own if model.hidden_dropout else 0
        compact = 0.0 if full or self.config.train.recompute == "selective" else self._compact
        values = self.tokens * inside * self.number_bytes / parallel.tensor
        return streams + norms + values + attention + dropped + compact

    @property
    def _stream(self) -> float:
        """One value of the width a token, as sequence parallelism splits it."""
        parallel = self.config.parallel
        own = parallel.tensor if parallel.sequence_parallel else 1
        return self.tokens * self.config.model.hidden_size * self.number_bytes / own

    @property
    def _compact(self) -> float:
        """Keys and values of the landmarks, which the fused kernel gathers and keeps."""
        model = self.config.model
        share = most_landmarks(self.config.attention, model.sequence_length) / model.sequence_length
        return share * 2 * self.tokens * _key_width(model) * self.number_bytes / self.config.parallel.tensor

    @property
    def logits(self) -> int:
        """The loss's gradient takes their place in 16 bits; in fp32 there are three more of them."""
        chunk = self.config.train.loss_chunk
        tokens = self.tokens if chunk is None else min(self.tokens, chunk)
        each = self.number_bytes if self.number_bytes == 2 else 3 * self.number_bytes
        last_norm = 2 * self._stream
        return round(tokens * self.vocab_size / self.config.parallel.tensor * each + last_norm)

    @property
    def plans(self) -> int:
        """Ids, labels and positions, and the plans of a run's patterns, of the micro-batches in flight."""
        patterns = 1 + bool(self.config.attention.full_layers and self.config.attention.window)
        flights = min(self.config.parallel.pipeline, self.microbatches)
        return round(flights * self.tokens * (3 * 8 + patterns * _PLAN))

    @property
    def communication(self) -> int:
        """Keys and values from other context-parallel ranks, kept by every layer, and what tensor ranks gather."""
        return round(self._from_context + self._from_tensor)

    @property
    def _from_context(self) -> float:
        model, parallel, attention = self.config.model, self.config.parallel, self.config.attention
        if parallel.context == 1:
            return 0.0
        layers = 1 if self.config.train.recompute else self.layers_in_flight
        width, rows = _key_width(model) // parallel.tensor, self.config.train.micro_batch_size
        received = landmark_bytes(
            rows, model.sequence_length, width, parallel.context,
            share=1.0 if attention.window is None else landmark_share(attention, _TYPICAL_SHARE),
            window=attention.window or 1, number_bytes=self.number_bytes,
        )  # fmt: skip
        return layers * received

    @property
    def _from_tensor(self) -> float:
        parallel = self.config.parallel
        if not parallel.sequence_parallel:
            return 0.0
        return 2 * self.tokens * self.config.model.hidden_size * self.number_bytes


def _key_width(model: ModelConfig) -> int:
    return model.key_value_heads * model.head_size


def _fc1(model: ModelConfig) -> int:
    return model.mlp_size * (2 if model.gated_mlp else 1)
