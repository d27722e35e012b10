"""From the attention section of a configuration to the plans of a batch."""

from dataclasses import dataclass

from torch import Tensor

from megatron_sep.attention.layers import layer_patterns, plan_layers
from megatron_sep.attention.pattern import AttentionPattern, MaskPlan, document_numbers
from megatron_sep.attention.separators import Tokens, chosen_separators
from megatron_sep.config.schema import AttentionConfig


@dataclass(frozen=True)
class LayerRules:
    """A pattern a layer, the separators among the ids, and the token that ends a document where boundaries count."""

    patterns: tuple[AttentionPattern, ...]
    separators: AttentionPattern
    """Its only landmarks are the separators."""
    document_end: int | None

    @classmethod
    def of(cls, attention: AttentionConfig, num_layers: int, tokenizer: Tokens) -> "LayerRules":
        """Look the separators up in the tokenizer. Raises SeparatorError."""
        ids = chosen_separators(attention, tokenizer)
        pattern = AttentionPattern(attention.window, attention.sinks, ids, attention.stride)
        return cls(
            layer_patterns(pattern, num_layers, attention.full_layers),
            AttentionPattern(separator_ids=ids),
            tokenizer.eod_id if attention.document_boundaries else None,
        )

    def plans(self, ids_BT: Tensor) -> tuple[MaskPlan, ...]:
        """The plan of every layer for a batch of ids [B, T]."""
        document_BT = None if self.document_end is None else document_numbers(ids_BT, self.document_end)
        return plan_layers(self.patterns, ids_BT, document_BT)
