"""Weights to start from: checkpoints of this program, of Hugging Face and of GPT-NeoX."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import AttentionConfig, ModelConfig, RunConfig
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.model.hugging_face import read_config
from megatron_sep.model.init import global_parameters, local_part
from megatron_sep.model.sources import (
    CheckpointFiles,
    Files,
    NeoxLayerFiles,
    SafetensorsFiles,
    Source,
    has_neox_layers,
    hugging_face_files,
)
from megatron_sep.train import checkpoint
from megatron_sep.train.checkpoint import CheckpointError, Checkpoints

WEIGHTS = "weights-{:05d}.safetensors"
_FREE = {"hidden_dropout", "attention_dropout", "init", "output_init", "init_std", "sequence_length", "vocab_multiple"}
"""Settings of a model that no weight depends on."""


class StartError(ValueError):
    """Weights that cannot be started from as asked."""


class OpenedSource(Source):
    """Weights with what is known of their attention and tokenizer; ``own``: written by this program."""

    def __init__(
        self,
        place: Path,
        config: ModelConfig,
        files: Files,
        attention: AttentionConfig,
        tokenizer: Path | None,
        own: bool,
    ) -> None:
        super().__init__(place, config, files, named_as_ours=own)
        self.attention, self.tokenizer, self.own = attention, tokenizer, own


def open_source(path: Path, config: ModelConfig | None = None) -> OpenedSource:
    """Open a checkpoint, a run's dir, a Hugging Face directory or GPT-NeoX's layers, and check every name and shape.

    ``config`` is what the weights are said to be; GPT-NeoX's layers need it, with all others it must agree. Raises
    StartError, WeightsError, HuggingFaceError or CheckpointError.
    """
    if not path.is_dir():
        raise StartError(f"{path}: no such directory")
    if (path / "checkpoints").is_dir():
        newest = Checkpoints(path, keep=None).newest()
        if newest is None:
            raise CheckpointError(f"{path}: has no complete checkpoint")
        path = newest
    if (path / "manifest.json").is_file():
        return _open_own(path, config)
    if (path / "config.json").is_file():
        found, attention = read_config(path)
        _agree(path, config, found)
        return OpenedSource(path, found, hugging_face_files(path), attention, _tokenizer_in(path), own=False)
    if has_neox_layers(path):
        if config is None:
            raise StartError(f"{path}: GPT-NeoX's layers do not tell heads and rotation; give their YAML with --config")
        return _open_layers(path, config)
    raise StartError(f"{path}: has no manifest.json, no config.json and no layer_NN-model_MM-model_states.pt")


def _open_own(path: Path, config: ModelConfig | None) -> OpenedSource:
    fault = checkpoint.fault_of(path)
    if fault:
        raise CheckpointError(fault)
    description = checkpoint.describe(path)
    run = RunConfig.model_validate(description["config"])
    found = run.model.model_copy(update={"vocab_size": description["vocab_size"]})
    _agree(path, config, found)
    stored = sorted(path.glob("weights-*.safetensors"))
    files = SafetensorsFiles(stored) if stored else CheckpointFiles(path)
    return OpenedSource(path, found, files, run.attention, checkpoint.tokenizer_of(path, run), own=True)


def _open_layers(path: Path, config: ModelConfig) -> OpenedSource:
    files = NeoxLayerFiles(path, config)
    rows = files.shapes().get("gpt_neox.embed_in.weight")
    if rows is None:
        raise StartError(f"{path}: layer_00 has no word_embeddings.weight")
    if config.vocab_size not in (None, rows[0]):
        raise StartError(f"{path}: the embedding has {rows[0]} rows, --config says {config.vocab_size}")
    found = config.model_copy(update={"vocab_size": rows[0]})
    return OpenedSource(path, found, files, AttentionConfig(), _tokenizer_in(path), own=False)


def _agree(path: Path, asked: ModelConfig | None, found: ModelConfig) -> None:
    """Raise StartError where the weights are of another shape than the configuration."""
    if asked is None:
        return
    ours, theirs = asked.model_dump(), found.model_dump()
    ours |= {"num_key_value_heads": asked.key_value_heads, "ffn_hidden_size": asked.mlp_size}
    theirs |= {"num_key_value_heads": found.key_value_heads, "ffn_hidden_size": found.mlp_size}
    wrong = [
        f"model.{key} is {theirs[key]} there and {ours[key]} here"
        for key in ours
        if key not in _FREE | {"vocab_size"} and ours[key] != theirs[key]
    ]
    if wrong:
        raise StartError(f"{path}: {'; '.join(wrong)}. Set them as they are there")


def _tokenizer_in(path: Path) -> Path | None:
    return next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)


@torch.no_grad()
def load_weights(model: nn.Module, source: Source, config: ModelConfig) -> None:
    """Copy this rank's part of every weight into a model; rows of the vocabulary that the source lacks become 0."""
    for name, parameter in global_parameters(model):
        if config.tie_embeddings and name == "output_layer.weight":  # its copy on the last pipeline stage
            name = "embedding.word_embeddings.weight"
        whole = source.weight(name)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            whole = _with_rows(whole, config.vocab_size or source.vocab_size)
        parameter.copy_(local_part(name, whole, parameter, config))


def _with_rows(whole: Tensor, rows: int) -> Tensor:
    if whole.shape[0] >= rows:
        return whole[:rows]
    return torch.cat([whole, whole.new_zeros(rows - whole.shape[0], *whole.shape[1:])])


def start(model: nn.Module, config: RunConfig, vocab_size: int) -> None:
    """Fill a new run's model from ``checkpoint.init_from``, once weights, tokenizer and vocabulary are seen to fit."""
    assert config.checkpoint.init_from is not None
    source = open_source(config.checkpoint.init_from, config.model)
    tokens = load_tokenizer(config.tokenizer.path, config.tokenizer.eod).vocab_size
    if source.vocab_size < tokens:
        raise StartError(
            f"{source.place}: its embedding has {source.vocab_size} rows, tokenizer.path={config.tokenizer.path} has "
            f"{tokens} tokens: use the tokenizer it was trained with"
        )
    if source.tokenizer is not None:
        _same_tokenizer(source.tokenizer, config.tokenizer.path)
    load_weights(model, source, config.model.model_copy(update={"vocab_size": vocab_size}))


def _same_tokenizer(theirs: Path, ours: Path) -> None:
    """Raise StartError where two tokenizers give other ids to the same text."""
    if theirs.suffix != ours.suffix or not theirs.is_file():
        return
    if theirs.suffix != ".json":
        same = theirs.read_bytes() == ours.read_bytes()
    else:
        same = _vocabulary(theirs) == _vocabulary(ours)
    if not same:
        raise StartError(
            f"tokenizer.path={ours} is not {theirs}, which the weights were trained with; set tokenizer.path to it"
        )


def _vocabulary(path: Path) -> tuple[Any, Any]:
    settings = json.loads(path.read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in settings.get("added_tokens", [])}
    return settings["model"].get("vocab"), added


def export_rules(source: OpenedSource) -> dict[str, Any]:
    """The attention pattern of a source as an export's config.json holds it, separators as ids."""
    attention, layers = source.attention, source.config.num_layers
    ids, end = attention.separator_ids, None
    if attention.separators or attention.document_boundaries:
        if source.tokenizer is None:
            raise StartError(f"{source.place}: has no tokenizer, which its separators are looked up in")
        tokenizer = load_tokenizer(source.tokenizer)
        rules = LayerRules.of(attention, layers, tokenizer)
        ids, end = rules.separators.separator_ids, rules.document_end
    return {
        "window": attention.window,
        "sinks": attention.sinks,
        "separator_ids": list(ids),
        "stride": attention.stride,
        "full_layers": sorted({layer % layers for layer in attention.full_layers}),
        "document_end": end,
    }
