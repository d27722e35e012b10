"""The attention pattern of weights as an export's config.json holds it."""

from typing import Any

from megatron_sep.attention.rules import LayerRules
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.weights.open_source import OpenedSource, SourceError


def export_rules(source: OpenedSource) -> dict[str, Any]:
    """Window, sinks, separators as ids, stride, full layers and the token that ends a document. Raises SourceError."""
    attention, layers = source.attention, source.config.num_layers
    ids, end = attention.separator_ids, None
    if attention.separators or attention.document_boundaries:
        if source.tokenizer is None:
            raise SourceError(f"{source.place}: has no tokenizer, which its separators are looked up in")
        rules = LayerRules.of(attention, layers, load_tokenizer(source.tokenizer, source.eod))
        ids, end = rules.separators.separator_ids, rules.document_end
    return {
        "window": attention.window,
        "sinks": attention.sinks,
        "separator_ids": list(ids),
        "stride": attention.stride,
        "full_layers": sorted({layer % layers for layer in attention.full_layers}),
        "document_end": end,
    }
