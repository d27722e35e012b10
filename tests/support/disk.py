"""Directories as other programs write them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support.models import hugging_face, on_disk
from torch import Tensor

from megatron_sep.config.schema import ModelConfig


def hugging_face_dir(folder: Path, config: ModelConfig, shard: str = "5GB") -> Path:
    """What save_pretrained leaves."""
    hugging_face(config).save_pretrained(folder, max_shard_size=shard)
    return folder


def as_bin(folder: Path) -> Path:
    """The same directory with its weights in pytorch_model.bin."""
    weights = stored(folder)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def neox_layers(folder: Path, config: ModelConfig, degree: int) -> tuple[Path, dict[str, Tensor]]:
    """Layer files of ``degree`` parts, cut as GPT-NeoX cuts them, and the whole under Hugging Face's names."""
    whole = on_disk(hugging_face(config).state_dict(), config)
    folder.mkdir(parents=True)
    layers = {"gpt_neox.embed_in": (0, "word_embeddings"), "gpt_neox.final_layer_norm": (config.num_layers + 3, "norm")}
    layers["embed_out"] = (config.num_layers + 4, "final_linear")
    files: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in whole.items():
        module, _, part = name.rpartition(".")
        if module in layers:
            layer, key = layers[module][0], f"{layers[module][1]}.{part}"
        else:
            number, _, key = name.removeprefix("gpt_neox.layers.").partition(".")
            layer = int(number) + 2
        for rank, piece in enumerate(cut(key, tensor, degree, config)):
            files.setdefault((layer, rank), {})[key] = piece.clone()
    turning = int(config.head_size * config.rotary_fraction) // 2
    for (layer, rank), tensors in files.items():
        if 2 <= layer < config.num_layers + 2:
            tensors["attention.rotary_emb.inv_freq"] = torch.ones(turning)
        torch.save(tensors, folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
    return folder, whole


def cut(key: str, tensor: Tensor, degree: int, config: ModelConfig) -> list[Tensor]:
    if any(word in key for word in ("word_embeddings", "final_linear", "query_key_value", "dense_h_to_4h")):
        return list(tensor.chunk(degree))
    if key in ("attention.dense.weight", "mlp.dense_4h_to_h.weight"):
        return list(tensor.chunk(degree, 1))
    if key in ("attention.dense.bias", "mlp.dense_4h_to_h.bias") and config.parallel_residual:
        return [tensor / degree] * degree
    return [tensor] * degree


class Bomb:
    """Unpickled by an unrestricted reader, it would create a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)
