"""Parameters and floating-point operations of a model, counted from its configuration; torch-free."""

from dataclasses import dataclass

from megatron_sep.config.schema import ModelConfig
from megatron_sep.errors import UserError


class ModelError(UserError):
    """A model that this layout or tokenizer cannot hold."""


def padded_vocab_size(config: ModelConfig, tokens: int) -> int:
    """Rows of the embedding: as configured, or ``tokens`` rounded up to ``vocab_multiple``. Raises ModelError."""
    if config.vocab_size is None:
        return -(-tokens // config.vocab_multiple) * config.vocab_multiple
    if config.vocab_size < tokens:
        raise ModelError(
            f"model.vocab_size={config.vocab_size} is smaller than the tokenizer's {tokens}; raise it or leave it out"
        )
    return config.vocab_size


@dataclass(frozen=True)
class ModelSize:
    """Counts for one model; matrix products count two operations per multiply-add, and backward twice the forward."""

    config: ModelConfig
    vocab_size: int

    @property
    def layer_matrices(self) -> int:
        """Matrix entries of one layer: query, key, value, projection and the two of the MLP (three with SwiGLU)."""
        h, ffn = self.config.hidden_size, self.config.mlp_size
        return h * self._qkv_rows + h * self.config.heads_size + h * self._fc1_rows + h * ffn

    @property
    def layer_widths(self) -> int:
        """Values a token that go into those matrices and come out of them."""
        h, ffn = self.config.hidden_size, self.config.mlp_size
        return 4 * h + self._qkv_rows + self.config.heads_size + self._fc1_rows + ffn

    @property
    def parameters(self) -> int:
        """Of the whole model, padding of the vocabulary included."""
        h = self.config.hidden_size
        biases = (self._qkv_rows + h) * self.config.biases + (self._fc1_rows + h) * self.config.mlp_has_biases
        norm = h * (2 if self.config.norm == "layernorm" else 1)
        layers = self.config.num_layers * (self.layer_matrices + biases + 2 * norm)
        return layers + norm + self.embedding_parameters

    @property
    def _qkv_rows(self) -> int:
        return self.config.heads_size + 2 * self.config.key_value_heads * self.config.head_size

    @property
    def _fc1_rows(self) -> int:
        return self.config.mlp_size * (2 if self.config.gated_mlp else 1)

    @property
    def embedding_parameters(self) -> int:
        """Input and output embedding, and the learned places of bilevel positions."""
        places = self.config.position.length if self.config.position.bilevel else 0
        return (self.vocab_size * (1 if self.config.tie_embeddings else 2) + places) * self.config.hidden_size

    def training_flops(self, tokens: float, visible_pairs: float) -> float:
        """Operations of a training step of ``tokens``, with ``visible_pairs`` (query, key) pairs summed over layers.

        The output layer counts; attention counts 4 x the size of all heads for each pair that is really visible.
        """
        matrices = self.config.num_layers * self.layer_matrices + self.vocab_size * self.config.hidden_size
        return 3 * (2 * matrices * tokens + 4 * self.config.heads_size * visible_pairs)
