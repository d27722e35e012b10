"""From the attention section of a configuration to the plans of a batch, and to where its tokens stand."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sep.attention.bilevel import Bilevel
from megatron_sep.attention.layers import layer_patterns, plan_layers
from megatron_sep.attention.pattern import AttentionPattern, MaskPlan, document_numbers
from megatron_sep.attention.separators import SeparatorError, Tokens, chosen_separators
from megatron_sep.config.position import PositionConfig
from megatron_sep.config.schema import AttentionConfig


@dataclass(frozen=True)
class LayerRules:
    """A pattern a layer, the separators among the ids, and the token that ends a document where boundaries count."""

    patterns: tuple[AttentionPattern, ...]
    separators: AttentionPattern
    """Its only landmarks are the separators."""
    document_end: int | None
    bilevel: Bilevel | None = None
    """How tokens are counted where positions are bilevel; None: from the row's first token on."""

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

    def counting(self, position: PositionConfig, tokenizer: Tokens) -> "LayerRules":
        """The same with the positions of a model. Raises SeparatorError."""
        return replace(self, bilevel=bilevel_of(position, tokenizer))

    def plans(self, ids_BT: Tensor) -> tuple[MaskPlan, ...]:
        """The plan of every layer for a batch of ids [B, T]."""
        document_BT = None if self.document_end is None else document_numbers(ids_BT, self.document_end)
        return plan_layers(self.patterns, ids_BT, document_BT)

    def positions(self, ids_BT: Tensor) -> Tensor:
        """Where the tokens of a batch [B, T] stand: int64 [B, T], or [2, B, T] where positions are bilevel."""
        if self.bilevel is None:
            return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        return self.bilevel.positions(ids_BT, self.document_end)


def bilevel_of(position: PositionConfig, tokenizer: Tokens) -> Bilevel | None:
    """What ends a segment, looked up in the tokenizer; None where there are no segments. Raises SeparatorError."""
    if not position.bilevel:
        return None
    asked = AttentionConfig(separators=position.separators, separator_ids=position.separator_ids)
    try:
        return Bilevel(chosen_separators(asked, tokenizer), position.length)
    except SeparatorError as error:
        raise SeparatorError(str(error).replace("attention.separator", "model.position.separator")) from error
