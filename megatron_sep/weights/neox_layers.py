"""GPT-NeoX's checkpoints: one file for each layer and model-parallel part."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_sep.config.schema import ModelConfig
from megatron_sep.weights.names import GPT_NEOX, INV_FREQ, PLACES
from megatron_sep.weights.pickle_files import load_tensors
from megatron_sep.weights.tensor_files import Shape, WeightsError

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")


class NeoxLayerFiles:
    """layer_NN-model_MM-model_states.pt of GPT-NeoX, its model-parallel parts joined, under Hugging Face's names."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._config = config
        found = {tuple(map(int, m.groups())): p for p in folder.iterdir() if (m := _LAYER_FILE.fullmatch(p.name))}
        self.degree = 1 + max(part for _, part in found)
        self._paths: dict[int, list[Path]] = {}
        for layer in [0, *range(2, config.num_layers + 2), config.num_layers + 3, config.num_layers + 4]:
            names = [f"layer_{layer:02d}-model_{part:02d}-model_states.pt" for part in range(self.degree)]
            missing = [name for part, name in enumerate(names) if (layer, part) not in found]
            if missing:
                raise WeightsError(
                    f"{folder / missing[0]}: no such file; {config.num_layers} layers in {self.degree} part(s) need it"
                )
            self._paths[layer] = [folder / name for name in names]
        too_many = sorted(str(found[key]) for key in found if key[0] not in self._paths)
        if too_many:
            raise WeightsError(f"{too_many[0]}: is no layer of a model with num_layers={config.num_layers}")
        self._held: tuple[int, list[dict[str, Tensor]]] = (-1, [])
        self._places = {
            _name(layer, key, config.num_layers): (layer, key)
            for layer in self._paths
            for key in load_tensors(self._paths[layer][0])
        }

    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(self.tensor(name).shape) for name in self._places}

    def tensor(self, name: str) -> Tensor:
        layer, key = self._places[name]
        if self._held[0] != layer:
            self._held = (-1, [])
            self._held = (layer, [load_tensors(path) for path in self._paths[layer]])
        for path, part in zip(self._paths[layer], self._held[1], strict=True):
            if key not in part:
                raise WeightsError(f"{path}: has no {key}, which part 00 has")
        return self._join(key, [part[key] for part in self._held[1]])

    def _join(self, key: str, parts: list[Tensor]) -> Tensor:
        """Columns and the vocabulary are cut along the first axis, rows along the second; the rest is on every rank."""
        if len(parts) == 1 or key.endswith(INV_FREQ.lstrip(".")):
            return parts[0]
        if re.search(r"word_embeddings|final_linear|query_key_value|dense_h_to_4h", key):
            return torch.cat(parts)
        if re.search(r"(attention\.dense|dense_4h_to_h)\.weight", key):
            return torch.cat(parts, 1)
        total = torch.stack([part.float() for part in parts]).sum(0)
        # with a parallel residual each rank adds its own bias before the sum over ranks; all else are copies
        added = self._config.parallel_residual and re.search(r"(attention\.dense|dense_4h_to_h)\.bias", key)
        return (total if added else total / len(parts)).to(parts[0].dtype)


def hugging_face_name(name: str, num_layers: int) -> str:
    """Of a parameter ``LAYER.key`` of GPT-NeoX's pipeline; a tied embedding lies outside its layers there."""
    layer, _, key = name.removeprefix("tied_modules.embed.").partition(".")
    if not layer.isdecimal():
        return _name(0, name.removeprefix("tied_modules.embed."), num_layers)
    return _name(int(layer), key, num_layers)


def _name(layer: int, key: str, num_layers: int) -> str:
    outer = {
        0: {"word_embeddings": "gpt_neox.embed_in", "position_embeddings": PLACES.theirs[0]},
        num_layers + 3: {"norm": "gpt_neox.final_layer_norm"},
        num_layers + 4: {"final_linear": "embed_out"},
    }.get(layer)
    if outer is None:
        return f"{GPT_NEOX.layer_prefix}.{layer - 2}.{key}"
    module, _, part = key.rpartition(".")
    return f"{outer.get(module, module)}.{part}"


def has_neox_layers(folder: Path) -> bool:
    return any(_LAYER_FILE.fullmatch(path.name) for path in folder.iterdir())
