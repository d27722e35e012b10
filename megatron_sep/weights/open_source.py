"""Weights to start from: checkpoints of this program, of Hugging Face and of GPT-NeoX."""

from collections.abc import Callable
from pathlib import Path

from megatron_sep.config.schema import AttentionConfig, ModelConfig
from megatron_sep.errors import UserError
from megatron_sep.weights.checkpoint_files import CheckpointFiles
from megatron_sep.weights.hugging_face import declared_end, read_config
from megatron_sep.weights.hugging_face_files import hugging_face_files
from megatron_sep.weights.neox_layers import NeoxLayerFiles, has_neox_layers
from megatron_sep.weights.safetensors_files import SafetensorsFiles
from megatron_sep.weights.sealed import (
    FREE_SETTINGS,
    CheckpointError,
    describe,
    fault_of,
    is_checkpoint,
    newest_verified,
    tokenizer_in,
    tokenizer_of,
)
from megatron_sep.weights.source import Source
from megatron_sep.weights.tensor_files import Files

WEIGHTS = "weights-{:05d}.safetensors"
"""Files of a checkpoint that holds weights alone."""


class SourceError(UserError):
    """Weights that cannot be started from as asked."""


class OpenedSource(Source):
    """Weights with what is known of their attention and tokenizer; ``own``: written by this program.

    ``eod`` is the text of the tokenizer's end-of-document token, as ``load_tokenizer`` takes it.
    """

    def __init__(
        self,
        place: Path,
        config: ModelConfig,
        files: Files,
        attention: AttentionConfig,
        tokenizer: Path | None,
        eod: str | None,
        own: bool,
    ) -> None:
        super().__init__(place, config, files, named_as_ours=own)
        self.attention, self.tokenizer, self.eod, self.own = attention, tokenizer, eod, own


def open_source(path: Path, config: ModelConfig | None = None) -> OpenedSource:
    """Open a checkpoint, a run's dir, a Hugging Face directory or GPT-NeoX's layers, and check every name and shape.

    ``config`` is what the weights are said to be; GPT-NeoX's layers need it, with all others it must agree. Raises
    SourceError, WeightsError, HuggingFaceError or CheckpointError.
    """
    if not path.is_dir():
        raise SourceError(f"{path}: no such directory")
    if (path / "checkpoints").is_dir():
        newest = newest_verified(path / "checkpoints")
        if newest is None:
            raise CheckpointError(f"{path}: has no complete checkpoint")
        path = newest
    if is_checkpoint(path):
        return _open_own(path, config)
    if (path / "config.json").is_file():
        found, attention = read_config(path)
        _agree(path, config, found)
        return OpenedSource(
            path, found, hugging_face_files(path), attention, tokenizer_in(path), declared_end(path), own=False
        )
    if has_neox_layers(path):
        if config is None:
            raise SourceError(
                f"{path}: GPT-NeoX's layers do not tell heads and rotation; give their YAML with --config"
            )
        return _open_layers(path, config)
    raise SourceError(f"{path}: has no manifest.json, no config.json and no layer_NN-model_MM-model_states.pt")


def _open_own(path: Path, config: ModelConfig | None) -> OpenedSource:
    fault = fault_of(path)
    if fault:
        raise CheckpointError(fault)
    found = describe(path)
    _agree(path, config, found.model)
    if found.engine not in _READERS:
        raise SourceError(
            f"{path}: its tensors were written by the engine {found.engine!r}; weights are read from those of "
            f"{', '.join(_READERS)}. Load it with its engine and save it with another"
        )
    files = _READERS[found.engine](path)
    tokenizer, eod = tokenizer_of(path, found.config), found.config.tokenizer.eod
    return OpenedSource(path, found.model, files, found.config.attention, tokenizer, eod, own=True)


def _weights_alone(path: Path) -> Files:
    return SafetensorsFiles(sorted(path.glob("weights-*.safetensors")))


_READERS: dict[str, Callable[[Path], Files]] = {
    "weights": _weights_alone,
    "megatron": CheckpointFiles,
    "deepspeed": CheckpointFiles,
}
"""How the tensors that an engine wrote are read without it."""


def _open_layers(path: Path, config: ModelConfig) -> OpenedSource:
    files = NeoxLayerFiles(path, config)
    rows = files.shapes().get("gpt_neox.embed_in.weight")
    if rows is None:
        raise SourceError(f"{path}: layer_00 has no word_embeddings.weight")
    if config.vocab_size not in (None, rows[0]):
        raise SourceError(f"{path}: the embedding has {rows[0]} rows, --config says {config.vocab_size}")
    found = config.model_copy(update={"vocab_size": rows[0]})
    return OpenedSource(path, found, files, AttentionConfig(), tokenizer_in(path), declared_end(path), own=False)


def _agree(path: Path, asked: ModelConfig | None, found: ModelConfig) -> None:
    """Raise SourceError where the weights are of another shape than the configuration."""
    if asked is None:
        return
    ours, theirs = (model.model_dump() | model.spelled_out() for model in (asked, found))
    wrong = [
        f"model.{key} is {theirs[key]} there and {ours[key]} here"
        for key in ours
        if key not in FREE_SETTINGS | {"vocab_size"} and ours[key] != theirs[key]
    ]
    if wrong:
        raise SourceError(f"{path}: {'; '.join(wrong)}. Set them as they are there")
