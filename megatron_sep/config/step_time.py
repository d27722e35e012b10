"""Seconds of a training step on one GPU of a job, put together from measured speeds; torch-free."""

from dataclasses import dataclass
from functools import cached_property

from megatron_sep.config.gpus import NETWORK, NODE, Gpu
from megatron_sep.config.needs import Needs
from megatron_sep.config.size import ModelSize
from megatron_sep.config.speeds import Speeds
from megatron_sep.config.traffic import (
    all_gather_bytes,
    data_bytes,
    gathered_bytes,
    landmark_bytes,
    pipeline_bytes,
    tensor_bytes,
)
from megatron_sep.config.visible import all_pairs, landmark_share, num_full_layers, visible_pairs

_BACKWARD = 2.5
"""Times of an attention's forward pass that its backward pass takes."""
_ADAMW = 38
"""Bytes that clipping and AdamW move a weight: gradient twice and once to zero it, fp32 weight and moments in and out,
the 16-bit weight out."""
_SUM = 10
"""Bytes a weight: a micro-batch's 16-bit gradient, added to the fp32 sum."""


@dataclass(frozen=True)
class StepTime:
    """Of the slowest process; nothing overlaps. ``separator_share`` of the tokens are separators."""

    needs: Needs
    gpu: Gpu
    speeds: Speeds
    separator_share: float

    @property
    def seconds(self) -> float:
        """Of a step: its micro-batches, the pipeline's bubble, the optimizer, and what travels."""
        return sum(self.parts.values())

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds by what takes them."""
        count, parallel = self.needs.microbatches, self.needs.config.parallel
        passes = {
            "matrix products": self._matrix_seconds,
            "attention": self._attention_seconds,
            "norms, activation, loss": self._elementwise_seconds,
        }
        parts = {name: count * seconds / self.speeds.busy for name, seconds in passes.items()}
        parts["optimizer"] = self._optimizer_seconds / self.speeds.busy
        received = self._received_seconds
        bubble = (parallel.pipeline - 1) / (parallel.virtual_pipeline * count)
        within = sum(parts.values()) - parts["optimizer"] + received["passes"]
        travels = {"pipeline bubble": bubble * within, "communication": sum(received.values())}
        return parts | {name: seconds for name, seconds in travels.items() if seconds}

    @property
    def _again(self) -> float:
        """Forward passes of a layer that are computed a second time."""
        return 1.0 if self.needs.config.train.recompute is True else 0.0

    @property
    def _tokens(self) -> float:
        return self.needs.activations.tokens

    @property
    def _layers(self) -> float:
        return self.needs.config.model.num_layers / self.needs.config.parallel.pipeline

    @property
    def _matrix_seconds(self) -> float:
        """Of the stage that has the output layer, too; a chunked loss computes its logits twice."""
        config = self.needs.config
        model, vocab = config.model, self.needs.vocab_size
        size = ModelSize(model, vocab)
        passes = 3 + self._again
        layers = self._product_seconds(size.layer_matrices, size.layer_widths) * self._layers * passes
        output = self._product_seconds(vocab * model.hidden_size, vocab + model.hidden_size)
        return layers + output * (3 + (config.train.loss_chunk is not None))

    def _product_seconds(self, entries: float, widths: float) -> float:
        """One pass of matrices with so many entries in all, as fast as they compute or as their values move.

        ``widths``: of their inputs and outputs together, values a token.
        """
        tensor, number = self.needs.config.parallel.tensor, self.needs.activations.number_bytes
        computed = 2 * self._tokens * entries / self.speeds.matrix_flops
        moved = number * self._tokens * widths / self.speeds.memory
        return max(computed, moved) / tensor

    @property
    def _attention_seconds(self) -> float:
        config = self.needs.config
        model, parallel, attention = config.model, config.parallel, config.attention
        length, rows = model.sequence_length, config.train.micro_batch_size
        heads = model.num_attention_heads / parallel.tensor
        full = num_full_layers(attention, model.num_layers) / model.num_layers
        token_heads, pairs = self._tokens * heads, rows * heads / parallel.context
        visible = visible_pairs(attention, length, self.separator_share)
        of_full = self.speeds.full.seconds(token_heads, pairs * all_pairs(length), model.head_size)
        of_sep = self.speeds.sep.seconds(token_heads, pairs * visible, model.head_size)
        again = 1 / (1 + _BACKWARD) if config.train.recompute else 0.0
        return self._layers * (full * of_full + (1 - full) * of_sep) * (1 + again)

    @property
    def _elementwise_seconds(self) -> float:
        """Bytes that norms, rotation with the split of queries, keys and values, activation and loss move."""
        config = self.needs.config
        model, number, tensor = config.model, self.needs.activations.number_bytes, config.parallel.tensor
        norms = 9 * model.hidden_size
        split = 4 * (model.heads_size + 2 * model.key_value_heads * model.head_size) / tensor
        activation = (8 if model.gated_mlp else 5) * model.mlp_size / tensor
        again = 1 + self._again / 3
        layers = self._layers * (norms + split + activation) * again
        loss = 3 * self.needs.vocab_size / tensor
        sums = _SUM * self.needs.weights / self._tokens
        moved = self._tokens * ((layers + loss) * number + sums)
        return moved / (self.speeds.memory * self.speeds.elementwise)

    @property
    def _optimizer_seconds(self) -> float:
        share = 1.0 if self.needs.config.optimizer.kind == "muon" else 1 / self.needs.data_ranks
        return self.needs.weights * _ADAMW * share / (self.speeds.memory * self.speeds.optimizer)

    @property
    def received(self) -> dict[str, float]:
        """Bytes that a process receives in a step, by axis of the layout."""
        config, count = self.needs.config, self.needs.microbatches
        model, parallel, tokens = config.model, config.parallel, self._tokens
        passes = 3 if config.train.recompute is True else 2
        gathered = gathered_bytes(self.needs.weights, self.needs.data_ranks) if parallel.zero_stage == 3 else 0.0
        return {
            "tensor": count * tensor_bytes(model, parallel, tokens, passes) if parallel.tensor > 1 else 0.0,
            "context": count * self._context_bytes * (3 if config.train.recompute else 2),
            "pipeline": count * pipeline_bytes(model, parallel, tokens),
            "data": data_bytes(self.needs.weights, self.needs.data_ranks) + count * gathered,
        }

    @property
    def _context_bytes(self) -> float:
        """Of a micro-batch, forward."""
        config = self.needs.config
        model, parallel, attention = config.model, config.parallel, config.attention
        if parallel.context == 1:
            return 0.0
        rows, length = config.train.micro_batch_size, model.sequence_length
        width = model.key_value_heads * model.head_size // parallel.tensor
        full = num_full_layers(attention, model.num_layers) / model.num_layers
        whole = all_gather_bytes(rows, length, width, parallel.context)
        landmarks = landmark_bytes(
            rows, length, width, parallel.context,
            share=landmark_share(attention, self.separator_share), window=attention.window or 1,
        )  # fmt: skip
        return self._layers * (full * whole + (1 - full) * landmarks)

    @property
    def _received_seconds(self) -> dict[str, float]:
        """In the passes and after them, within a node while the axes so far fit into it."""
        parallel = self.needs.config.parallel
        data = self.needs.data_ranks // parallel.context
        sizes = {"tensor": parallel.tensor, "context": parallel.context, "data": data, "pipeline": parallel.pipeline}
        found, together = {"passes": 0.0, "step": 0.0}, 1
        for axis, ranks in sizes.items():  # in the order in which megatron-core numbers the processes
            together *= ranks
            rate = self.gpu.link if together <= NODE else NETWORK
            found["step" if axis == "data" else "passes"] += self.received[axis] / rate
        return found
