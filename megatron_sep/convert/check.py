"""`convert --check`: transformers' model with the weights of one directory against this program's with the other's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.rules import LayerRules
from megatron_sep.convert.as_transformers import fill
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.model.build import build_model
from megatron_sep.model.load_weights import load_weights
from megatron_sep.parallel.topology import Topology
from megatron_sep.weights.export import export_rules
from megatron_sep.weights.hugging_face import make_config
from megatron_sep.weights.names import family_of
from megatron_sep.weights.open_source import OpenedSource, open_source

_TEXT = "The cat sat on the mat, and slept. It was warm; was it not? Yes!\nThen it rained, and the cat went in.\n"
_TOKENS = 128
_FULL: dict[str, Any] = {
    "window": None,
    "sinks": 0,
    "separator_ids": [],
    "stride": None,
    "full_layers": [],
    "document_end": None,
}
"""Rules under which every token sees every earlier one."""


@dataclass(frozen=True)
class Differences:
    """The largest difference between the fp32 logits of two models for the same text."""

    full: float
    """With every earlier token visible: the weights alone differ."""
    sep: float | None
    """Under the attention pattern that each directory names for itself; None where both name full attention."""

    def __str__(self) -> str:
        pattern = "" if self.sep is None else f"; under the attention pattern {self.sep:.3g}"
        return f"largest difference of a logit: with full attention {self.full:.3g}{pattern}"


@torch.no_grad()
def differences(source: OpenedSource, dst: Path, topology: Topology) -> Differences:
    """Between SRC and what was made of it. The pattern of the foreign one is computed by an export's own code."""
    own, foreign = (source, open_source(dst)) if source.own else (open_source(dst), source)
    own_rules, foreign_rules = export_rules(own), export_rules(foreign)
    ids = check_ids(own, own_rules).to(topology.device)
    layers = own.config.num_layers
    ours = own_logits(own, [exported_rules(rules, layers) for rules in (_FULL, own_rules)], ids, topology)
    full = _largest(ours[0] - _transformers_logits(foreign, _FULL, ids))
    if own_rules == foreign_rules == _FULL:
        return Differences(full, None)
    return Differences(full, _largest(ours[1] - _transformers_logits(foreign, foreign_rules, ids)))


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


@torch.no_grad()
def own_logits(
    source: OpenedSource, rules: Sequence[LayerRules], ids: Tensor, topology: Topology, backend: str = "reference"
) -> list[Tensor]:
    """Of the model that is trained, in fp32, for ids [B, T] under one set of rules after another: [B, T, V] each."""
    model = build_model(
        source.config, topology, vocab_size=source.vocab_size, precision="fp32", seed=0, backend=backend
    )
    load_weights(model, source, source.config, topology)
    return [model.eval()(ids, each.positions(ids), each.plans(ids)).float() for each in rules]


def exported_rules(rules: dict[str, Any], layers: int) -> LayerRules:
    """What an export's config.json says that each layer sees."""
    ids = tuple(rules["separator_ids"])
    pattern = AttentionPattern(rules["window"], rules["sinks"], ids, rules["stride"])
    everywhere = layer_patterns(pattern, layers, rules["full_layers"])
    return LayerRules(everywhere, AttentionPattern(separator_ids=ids), rules["document_end"])


def _transformers_logits(source: OpenedSource, rules: dict[str, Any], ids: Tensor) -> Tensor:
    """Without a cache."""
    logits: Tensor = export_model(source, rules, ids.device)(ids, use_cache=False).logits
    return logits.float()


def export_model(source: OpenedSource, rules: dict[str, Any], device: torch.device) -> Any:
    """transformers' own class for full attention, and the class that an export brings for any other rules, in fp32.

    Raises HuggingFaceError for a model that cannot be exported.
    """
    import transformers

    from megatron_sep.convert import modeling_sep

    settings = make_config(source.config, source.vocab_size, rules, "float32", None)
    config = transformers.AutoConfig.for_model(**{k: v for k, v in settings.items() if k != "auto_map"})
    architecture = family_of(source.config).architecture
    full = rules == _FULL
    kind: Any = getattr(transformers, architecture) if full else getattr(modeling_sep, f"Sep{architecture}")
    model = kind._from_config(config, attn_implementation="eager")
    fill(model, source)
    return model.to(device).eval()


def check_ids(source: OpenedSource, rules: dict[str, Any]) -> Tensor:
    """Ids [1, T] of a text of this module's own, with separators and the end of a document in it."""
    length = check_length(source, rules)
    if source.tokenizer is not None:
        text = load_tokenizer(source.tokenizer, source.eod).encode(_TEXT)
        ids = torch.tensor((text * (length // len(text) + 1))[:length])
    else:
        ids = torch.randint(0, source.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
        separators = torch.tensor(rules["separator_ids"], dtype=torch.long)
        ids[: 8 * len(separators) : 8] = separators[: -(-length // 8)]
    if rules["document_end"] is not None:
        ids[length // 3] = rules["document_end"]
    return ids[None]


def check_length(source: OpenedSource, rules: dict[str, Any]) -> int:
    """Tokens of a text of two windows, where the model has room for it."""
    return min(max(_TOKENS, 2 * (rules["window"] or 0)), source.config.sequence_length)
