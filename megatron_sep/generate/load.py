"""Open what `generate` and the evaluations run: a checkpoint of this program, or a directory of Hugging Face."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sep.attention.rules import LayerRules, bilevel_of
from megatron_sep.attention.separators import Tokens
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.convert.as_transformers import as_transformers
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.files import read_json
from megatron_sep.generate.positions import ModelPositions, install
from megatron_sep.kernels.sep_attention.scores import alibi_slopes
from megatron_sep.weights.hugging_face import KNOWN_TYPES, declared_end
from megatron_sep.weights.names import PLACES
from megatron_sep.weights.open_source import OpenedSource, SourceError, open_source
from megatron_sep.weights.sealed import is_checkpoint, tokenizer_in


@dataclass(frozen=True)
class Loaded:
    """A model of transformers, its tokenizer, and the pattern it was trained with."""

    model: Any
    tokenizer: Tokenizer
    attention: AttentionConfig

    def rules(self, attention: AttentionConfig | None = None) -> LayerRules:
        """The pattern of each layer, separators looked up in the tokenizer. Raises SeparatorError."""
        return LayerRules.of(attention or self.attention, self.model.config.num_hidden_layers, self.tokenizer)

    @property
    def trained_length(self) -> int:
        """Tokens of a training sequence."""
        return int(self.model.config.max_position_embeddings)


def load(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Loaded:
    """A checkpoint, a run's dir, or a Hugging Face directory of any decoder; ``dtype``: None keeps the weights' own.

    Raises SourceError, and what reading such a directory raises.
    """
    if (path / "config.json").is_file() and not is_checkpoint(path):
        return _load_hugging_face(path, device, dtype)
    source = open_source(path)
    if source.tokenizer is None:
        raise no_tokenizer(path)
    tokenizer = load_tokenizer(source.tokenizer, source.eod)
    return Loaded(with_positions(source, tokenizer, device, dtype), tokenizer, source.attention)


def with_positions(source: OpenedSource, tokenizer: Tokens, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Weights as a model of transformers, with what only ``attach`` computes of it."""
    model = as_transformers(source, device, dtype, weights_alone=True)
    positions = _positions(source, tokenizer, device, model.dtype)
    if str(positions):
        install(model.base_model, positions)
    return model


def _positions(source: OpenedSource, tokenizer: Tokens, device: torch.device, dtype: torch.dtype) -> ModelPositions:
    """What a checkpoint has that transformers does not compute."""
    config, places = source.config, None
    if config.position.bilevel:
        weight = source.weight(f"{PLACES.ours}.weight").to(device, dtype)
        places = torch.nn.Embedding.from_pretrained(weight)  # type: ignore[no-untyped-call]
    return ModelPositions(
        None if config.position.rotates else alibi_slopes(config.num_attention_heads).to(device),
        bilevel_of(config.position, tokenizer),
        places,
        config.self_adjusting_softmax,
    )


def _load_hugging_face(path: Path, device: torch.device, dtype: torch.dtype | None) -> Loaded:
    """As transformers itself reads it; what it would fill with random numbers is an error."""
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_in(path)
    if tokenizer is None:
        raise no_tokenizer(path)
    attention = AttentionConfig()
    if _model_type(path) in KNOWN_TYPES:
        attention = open_source(path).attention  # every name and shape is checked
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True
    )
    if report["missing_keys"]:
        raise SourceError(f"{path}: its files lack weights: {', '.join(sorted(report['missing_keys'])[:4])}")
    return Loaded(model.to(device).eval(), load_tokenizer(tokenizer, declared_end(path)), attention)


def _model_type(path: Path) -> Any:
    file = path / "config.json"
    try:
        found = read_json(file)
    except ValueError as error:
        raise SourceError(f"{file}: cannot be read: {error}") from error
    return found.get("model_type") if isinstance(found, dict) else None


def no_tokenizer(path: Path) -> SourceError:
    """Of a model that has none."""
    return SourceError(f"{path}: has no tokenizer.json or tokenizer.model; copy it there")
