"""Open what `generate` and the evaluations run: a checkpoint of this program, or a directory of Hugging Face."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.convert.as_transformers import as_transformers
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.train.start import StartError, open_source

_OWN_READERS = ("gpt_neox", "llama")


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

    Raises StartError, and what reading such a directory raises.
    """
    if _other_architecture(path):
        return _load_other(path, device, dtype)
    source = open_source(path)
    if source.tokenizer is None:
        raise StartError(f"{path}: has no tokenizer.json or tokenizer.model; copy it there")
    return Loaded(as_transformers(source, device, dtype), load_tokenizer(source.tokenizer), source.attention)


def _other_architecture(path: Path) -> bool:
    file = path / "config.json"
    if not file.is_file():
        return False
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type") not in _OWN_READERS
    except ValueError as error:
        raise StartError(f"{file}: cannot be read: {error}") from error


def _load_other(path: Path, device: torch.device, dtype: torch.dtype | None) -> Loaded:
    from transformers import AutoModelForCausalLM

    found = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)
    if found is None:
        raise StartError(f"{path}: has no tokenizer.json or tokenizer.model; copy it there")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", trust_remote_code=False)
    return Loaded(model.to(device).eval(), load_tokenizer(found), AttentionConfig())
