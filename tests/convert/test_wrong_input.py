"""Weights that are damaged, foreign or hostile are refused by name; nothing is written and no code of theirs runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.disk import Bomb, as_bin, hugging_face_dir, neox_layers
from support.models import llama_config, neox_config

from megatron_sep.convert.convert import ConvertError, convert
from megatron_sep.weights.hugging_face import HuggingFaceError
from megatron_sep.weights.open_source import SourceError
from megatron_sep.weights.sealed import CheckpointError
from megatron_sep.weights.source import WeightsError

pytestmark = pytest.mark.usefixtures("single_process")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard_gone(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def shard_cut(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-50])


def renamed(folder: Path) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights["gpt_neox.layers.1.mlp.dense.weight"] = weights.pop("gpt_neox.layers.1.mlp.dense_4h_to_h.weight")

    edit_weights(folder, edit)


def reshaped(folder: Path) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights["gpt_neox.layers.2.attention.dense.weight"] = torch.zeros(64, 32)

    edit_weights(folder, edit)


CASES: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "another architecture": (
        lambda f: edit_config(f, model_type="falcon"),
        HuggingFaceError,
        "model_type='falcon'; known are gpt_neox, llama",
    ),
    "no key": (lambda f: edit_config(f, hidden_act="mish"), HuggingFaceError, "hidden_act='mish': known are gelu"),
    "too many layers": (
        lambda f: edit_config(f, num_hidden_layers=5),
        WeightsError,
        "gpt_neox.layers.4.input_layernorm.weight is missing",
    ),
    "too few layers": (
        lambda f: edit_config(f, num_hidden_layers=3),
        WeightsError,
        "gpt_neox.layers.3.attention.dense.bias has no place",
    ),
    "another vocabulary": (
        lambda f: edit_config(f, vocab_size=256),
        WeightsError,
        "gpt_neox.embed_in.weight is [128, 64], config says [256, 64]",
    ),
    "a renamed tensor": (renamed, WeightsError, "gpt_neox.layers.1.mlp.dense_4h_to_h.weight is missing"),
    "a reshaped tensor": (
        reshaped,
        WeightsError,
        "gpt_neox.layers.2.attention.dense.weight is [64, 32], config says [64, 64]",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), SourceError, "no manifest.json, no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), WeightsError, "has neither model.safetensors nor"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), HuggingFaceError, "config.json: cannot be read"),
}
SHARDED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard that is gone": (shard_gone, "no such file; gpt_neox"),
    "a shard that was cut": (shard_cut, "is damaged or cut short"),
}


def refuses(src: Path, kind: type[Exception], message: str, tmp_path: Path, config: Path | None = None) -> None:
    with pytest.raises(kind) as raised:
        convert(src, tmp_path / "out" / "ours", config)
    assert message in str(raised.value)
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    """The key or the tensor, what it is and what it should be; no file is left."""
    spoil, kind, message = CASES[case]
    folder = hugging_face_dir(tmp_path / "theirs", neox_config())
    spoil(folder)
    refuses(folder, kind, message, tmp_path)


@pytest.mark.parametrize("case", SHARDED)
def test_damaged_shards_are_named(case: str, tmp_path: Path) -> None:
    """A shard that is missing or cut short is named before anything is written."""
    spoil, message = SHARDED[case]
    folder = hugging_face_dir(tmp_path / "theirs", neox_config(), shard="100KB")
    spoil(folder)
    refuses(folder, WeightsError, message, tmp_path)


def test_wrong_heads_are_seen_where_no_shape_tells_them(tmp_path: Path) -> None:
    """GPT-NeoX's layers under a config with twice the heads: the number of frequencies gives it away."""
    folder, _ = neox_layers(tmp_path / "layers", neox_config(), 1)
    config = tmp_path / "run.yaml"
    config.write_text(
        "dir: x\ntokenizer: {path: x}\ndata: {path: x}\n"
        "model: {num_layers: 4, hidden_size: 64, num_attention_heads: 8, sequence_length: 48}\n"
    )
    refuses(
        folder, WeightsError, "2 frequencies; num_attention_heads=8 and rotary_fraction=0.25 make 1", tmp_path, config
    )
    refuses(folder, SourceError, "do not tell heads and rotation; give their YAML with --config", tmp_path)
    theirs = hugging_face_dir(tmp_path / "theirs", neox_config())
    refuses(theirs, SourceError, "model.num_attention_heads is 4 there and 8 here", tmp_path, config)


def test_missing_layers_and_parts_are_named(tmp_path: Path) -> None:
    """A layer file that is not there, and a part that lacks a tensor."""
    config = tmp_path / "run.yaml"
    config.write_text(
        "dir: x\ntokenizer: {path: x}\ndata: {path: x}\n"
        "model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, sequence_length: 48}\n"
    )
    folder, _ = neox_layers(tmp_path / "layers", neox_config(), 2)
    path = folder / "layer_03-model_01-model_states.pt"
    tensors = torch.load(path, weights_only=True)
    del tensors["attention.dense.bias"]
    torch.save(dict(tensors), path)
    refuses(folder, WeightsError, "layer_03-model_01-model_states.pt: has no attention.dense.bias", tmp_path, config)
    path.unlink()
    refuses(folder, WeightsError, "layer_03-model_01-model_states.pt: no such file", tmp_path, config)


@pytest.mark.parametrize("kind", ["bin", "layer"])
def test_a_pickle_with_code_in_it_is_refused(kind: str, tmp_path: Path) -> None:
    """The file that its code would create is not there afterwards, though an unrestricted reader would create it."""
    canary = tmp_path / "canary"
    if kind == "bin":
        folder = as_bin(hugging_face_dir(tmp_path / "theirs", llama_config()))
        path, config = folder / "pytorch_model.bin", None
    else:
        folder, _ = neox_layers(tmp_path / "layers", neox_config(), 1)
        path, config = folder / "layer_02-model_00-model_states.pt", tmp_path / "run.yaml"
        config.write_text(
            "dir: x\ntokenizer: {path: x}\ndata: {path: x}\n"
            "model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, sequence_length: 48}\n"
        )
    torch.save({**torch.load(path, weights_only=True), "extra": Bomb(canary)}, path)
    refuses(folder, WeightsError, "is damaged, or holds something that is no tensor", tmp_path, config)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()


def test_truncated_pickles_and_other_contents_are_refused(tmp_path: Path) -> None:
    """A .bin that was cut, one that is text, and one that holds numbers beside tensors."""
    folder = as_bin(hugging_face_dir(tmp_path / "theirs", neox_config()))
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    tensors = dict(torch.load(path, weights_only=True))
    for spoiled in (whole[: len(whole) // 2], b"<html>not found</html>", b""):
        path.write_bytes(spoiled)
        refuses(folder, WeightsError, "pytorch_model.bin: is damaged", tmp_path)
    torch.save({"step": 3, **tensors}, path)
    refuses(folder, WeightsError, "holds something that is no tensor: ['step']", tmp_path)


def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path) -> None:
    """A shard named by a path is refused."""
    folder = hugging_face_dir(tmp_path / "theirs", neox_config(), shard="100KB")
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"]["embed_out.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(tree))
    refuses(folder, WeightsError, "a shard lies beside its index", tmp_path)


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """DST must be new; a damaged checkpoint of ours is refused by the sums of its manifest."""
    theirs = hugging_face_dir(tmp_path / "theirs", neox_config())
    convert(theirs, tmp_path / "ours")
    with pytest.raises(ConvertError, match="is there already"):
        convert(theirs, tmp_path / "ours")
    path = tmp_path / "ours" / "weights-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refuses(tmp_path / "ours", CheckpointError, "weights-00002.safetensors: its SHA-256 is not", tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that fails in the middle takes its unfinished directory away."""
    import safetensors.torch

    theirs = hugging_face_dir(tmp_path / "theirs", neox_config())
    real, written = safetensors.torch.save_file, []

    def save_two(*args: Any, **kwargs: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(real(*args, **kwargs))

    monkeypatch.setattr(safetensors.torch, "save_file", save_two)
    with pytest.raises(OSError, match="No space left"):
        convert(theirs, tmp_path / "out" / "ours")
    assert len(written) == 2
    assert not list((tmp_path / "out").iterdir())
