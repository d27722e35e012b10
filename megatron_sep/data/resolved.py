"""What a configuration means once its tokenizer is open: token ids, vocabulary, the pattern of each layer."""

from dataclasses import dataclass

from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import AttentionConfig, ModelConfig, TokenizerConfig
from megatron_sep.config.size import padded_vocab_size
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Resolved:
    """Known without data, model or GPU."""

    tokenizer: Tokenizer
    vocab_size: int
    """Rows of the embedding."""
    rules: LayerRules


def resolve(tokenizer: TokenizerConfig, model: ModelConfig, attention: AttentionConfig) -> Resolved:
    """Open the tokenizer and look up what depends on it. Raises TokenizerError, ModelError, SeparatorError."""
    opened = load_tokenizer(tokenizer.path, tokenizer.eod)
    vocab_size = padded_vocab_size(model, opened.vocab_size)
    rules = LayerRules.of(attention, model.num_layers, opened).counting(model.position, opened)
    return Resolved(opened, vocab_size, rules)
