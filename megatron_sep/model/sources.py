"""Weights on disk, read one layer at a time, whatever wrote them: safetensors, .bin, GPT-NeoX's layers, checkpoints.

A `Files` knows names and shapes without loading anything, and gives one tensor at a time. `Source` binds it to the
table of names: it checks every name and shape before a single weight is handed out.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sep.config.schema import ModelConfig
from megatron_sep.model.weights import GPT_NEOX, Link, groups, weight_shapes

Shape = tuple[int, ...]
_STACK = "decoder.layers."
_BUFFERS = re.compile(r".*(\.rotary_emb\.inv_freq|\.attention\.bias|\.attention\.masked_bias)")
"""What old checkpoints hold beside weights."""
_INV_FREQ = ".rotary_emb.inv_freq"
_UNREADABLE = (UnpicklingError, RuntimeError, ValueError, OSError, EOFError, AttributeError, KeyError, ImportError)
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")


class WeightsError(ValueError):
    """Weights that are damaged, or do not fit the model they are said to be."""


class Files(Protocol):
    """Named tensors on disk."""

    def shapes(self) -> Mapping[str, Shape]: ...
    def tensor(self, name: str) -> Tensor: ...


class SafetensorsFiles:
    """model.safetensors, or the shards of an index."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, Shape] = {}
        for path in paths:
            with _open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118
                    self._where[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def tensor(self, name: str) -> Tensor:
        with _open_safetensors(self._where[name]) as file:
            found: Tensor = file.get_tensor(name)
        return found


class PickleFiles:
    """pytorch_model.bin and its shards: tensors alone, through torch's restricted unpickler. One shard is held."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, Shape] = {}
        self._held: tuple[Path, dict[str, Tensor]] | None = None
        for path in paths:
            for name, tensor in load_tensors(path).items():
                self._where[name], self._shapes[name] = path, tuple(tensor.shape)

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def tensor(self, name: str) -> Tensor:
        path = self._where[name]
        if self._held is None or self._held[0] != path:
            self._held = None
            self._held = (path, load_tensors(path))
        return self._held[1][name]


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
            self._name(layer, key): (layer, key) for layer in self._paths for key in load_tensors(self._paths[layer][0])
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
        if len(parts) == 1 or key.endswith(_INV_FREQ.lstrip(".")):
            return parts[0]
        if re.search(r"word_embeddings|final_linear|query_key_value|dense_h_to_4h", key):
            return torch.cat(parts)
        if re.search(r"(attention\.dense|dense_4h_to_h)\.weight", key):
            return torch.cat(parts, 1)
        total = torch.stack([part.float() for part in parts]).sum(0)
        # with a parallel residual each rank adds its own bias before the sum over ranks; all else are copies
        added = self._config.parallel_residual and re.search(r"(attention\.dense|dense_4h_to_h)\.bias", key)
        return (total if added else total / len(parts)).to(parts[0].dtype)

    def _name(self, layer: int, key: str) -> str:
        outer = {
            0: {"word_embeddings": "gpt_neox.embed_in"},
            self._config.num_layers + 3: {"norm": "gpt_neox.final_layer_norm"},
            self._config.num_layers + 4: {"final_linear": "embed_out"},
        }.get(layer)
        if outer is None:
            return f"{GPT_NEOX.layer_prefix}.{layer - 2}.{key}"
        module, _, part = key.rpartition(".")
        return f"{outer.get(module, module)}.{part}"


class CheckpointFiles:
    """The weights of a training checkpoint, which stacks its layers: one layer is read at a time.

    megatron-core itself can only load all layers of a stack at once.
    """

    def __init__(self, path: Path) -> None:
        self._reader = FileSystemReader(path)
        try:
            metadata = self._reader.read_metadata()
        except (CheckpointException, *_UNREADABLE) as error:
            raise WeightsError(f"{path}: is no checkpoint of megatron-core: {error}") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._saved = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and not key.startswith("optimizer.")
        }

    def shapes(self) -> Mapping[str, Shape]:
        found: dict[str, Shape] = {}
        for key, value in self._saved.items():
            rest = key.removeprefix(_STACK)
            if rest == key:
                found[key] = tuple(value.size)
            else:
                found |= {f"{_STACK}{i}.{rest}": tuple(value.size[1:]) for i in range(value.size[0])}
        return found

    def tensor(self, name: str) -> Tensor:
        number, _, rest = name.removeprefix(_STACK).partition(".")
        stacked = name.startswith(_STACK)
        key = f"{_STACK}{rest}" if stacked else name
        saved = self._saved[key]
        sizes = torch.Size([1, *saved.size[1:]]) if stacked else saved.size
        offsets = torch.Size([int(number) if stacked else 0, *[0] * (len(sizes) - 1)])
        frame = torch.empty(sizes, dtype=saved.properties.dtype, device="cpu")
        wanted = create_read_items_for_chunk_list(key, saved, [ChunkStorageMetadata(offsets, sizes)])
        self._reader.read_data(LoadPlan(wanted), _Into(frame)).wait()
        return frame[0] if stacked else frame


class _Into(DefaultLoadPlanner):
    """Reads parts of a saved tensor into one tensor of ours."""

    def __init__(self, frame: Tensor) -> None:
        super().__init__()
        self._frame = frame

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._frame
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The tensor is part of the frame already."""


class Source:
    """The weights of one model under our names, every name and shape checked when it is opened."""

    def __init__(self, place: Path, config: ModelConfig, files: Files, named_as_ours: bool) -> None:
        self.place, self.config, self._files, self._ours = place, config, files, named_as_ours
        assert config.vocab_size is not None
        self.vocab_size = config.vocab_size
        self.groups = [tuple(self._respelled(link) for link in group) for group in groups(config)]
        self._links = {link.ours: link for group in self.groups for link in group}
        self._check()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The weights of the embedding, of each layer, of the final norm and of the output, one group at a time."""
        for group in self.groups:
            yield {link.ours: self.weight(link.ours) for link in group}

    def weight(self, name: str) -> Tensor:
        """One weight of the whole model."""
        link = self._links[name]
        return link.join([self._files.tensor(theirs) for theirs in self._names(link)], self.config)

    def _respelled(self, link: Link) -> Link:
        """Hugging Face's head of GPTNeoX has two names."""
        renamed = link.theirs == ("embed_out.weight",) and "lm_head.weight" in self._files.shapes()
        return Link(link.ours, ("lm_head.weight",), link.join, link.split) if renamed else link

    def _names(self, link: Link) -> tuple[str, ...]:
        return (link.ours,) if self._ours else link.theirs

    def _check(self) -> None:
        shapes = dict(self._files.shapes())
        expected = weight_shapes(self.config, self.vocab_size)
        mistakes: list[str] = []
        for link in self._links.values():
            names = self._names(link)
            missing = [name for name in names if name not in shapes]
            mistakes += [f"{name} is missing" for name in missing]
            if not missing:
                mistakes += _misshapen(link, names, [shapes[name] for name in names], expected[link.ours], self)
        known = {name for link in self._links.values() for name in self._names(link)}
        tied = {"lm_head.weight", "embed_out.weight", "output_layer.weight"} if self.config.tie_embeddings else set()
        strange = [name for name in shapes if name not in known | tied and not _BUFFERS.fullmatch(name)]
        mistakes += [f"{name} has no place in this architecture" for name in strange]
        mistakes += self._rotary_mistakes(shapes)
        if mistakes:
            shown = "\n  ".join(mistakes[:8] + (["..."] if len(mistakes) > 8 else []))
            raise WeightsError(f"{self.place}: {len(mistakes)} tensor(s) do not fit the model:\n  {shown}")

    def _rotary_mistakes(self, shapes: Mapping[str, Shape]) -> list[str]:
        """Saved frequencies tell how many values of a head rotate, which no weight's shape does."""
        turning = int(self.config.head_size * self.config.rotary_fraction) // 2
        name = next((n for n in shapes if n.endswith(_INV_FREQ)), None)
        if name is None or shapes[name] == (turning,):
            return []
        return [
            f"{name} has {shapes[name][0]} frequencies; num_attention_heads={self.config.num_attention_heads} and "
            f"rotary_fraction={self.config.rotary_fraction} make {turning}: one of them is not that of the weights"
        ]


def _misshapen(link: Link, names: tuple[str, ...], shapes: list[Shape], expected: Shape, source: Source) -> list[str]:
    if len(names) == 1:
        parts = [expected]
    else:
        whole = torch.empty(expected, device="meta")
        parts = [tuple(part.shape) for part in link.split(whole, source.config)]
    return [
        f"{name} is {list(found)}, config says {list(part)}"
        for name, found, part in zip(names, shapes, parts, strict=True)
        if tuple(found) != tuple(part)
    ]


def hugging_face_files(folder: Path) -> Files:
    """The safetensors or .bin files of a directory, sharded or not. Raises WeightsError."""
    for name, kind in (("model.safetensors", SafetensorsFiles), ("pytorch_model.bin", PickleFiles)):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return kind(_shards(index))
        if (folder / name).is_file():
            return kind([folder / name])
    raise WeightsError(f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of either")


def has_neox_layers(folder: Path) -> bool:
    return any(_LAYER_FILE.fullmatch(path.name) for path in folder.iterdir())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote. Nothing but tensors is read: torch's unpickler with its allow-list
    refuses everything else, and no code of the file runs. Raises WeightsError."""
    try:
        found = _load_mapped(path)
    except _UNREADABLE as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise WeightsError(f"{path}: is damaged, or holds something that is no tensor: {why}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        strange = [k for k, v in found.items() if not isinstance(v, Tensor)] if isinstance(found, dict) else "all of it"
        raise WeightsError(f"{path}: holds something that is no tensor: {strange}")
    return found


def _load_mapped(path: Path) -> Any:
    with suppress(RuntimeError):  # a file of torch before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return torch.load(path, map_location="cpu", weights_only=True)


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: is damaged or cut short: {error}") from error


def _shards(index: Path) -> list[Path]:
    try:
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: is no index of shards: {error!r}") from error
    for tensor, name in where.items():
        if Path(name).name != name:
            raise WeightsError(f"{index}: {tensor} is said to be in {name!r}; a shard lies beside its index")
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index.parent / name}: no such file; {tensor} is in it")
    return [index.parent / name for name in sorted(set(where.values()))]
