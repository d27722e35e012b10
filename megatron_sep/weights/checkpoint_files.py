"""The weights of a training checkpoint in torch's distributed format, which stacks its layers: one layer at a time.

megatron-core itself can only load all layers of a stack at once.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sep.weights.safe_metadata import read_metadata
from megatron_sep.weights.tensor_files import UNREADABLE, Shape, WeightsError

_STACK = "decoder.layers."
OPTIMIZER_STATE = "optimizer.state"
"""Begins the name of what an optimizer keeps for a weight: its kind and the weight's name follow."""


class CheckpointFiles:
    """The weights of a training checkpoint, or what its optimizer keeps for each weight, under the weight's name.

    The checkpoint stacks its layers; one layer is read at a time. megatron-core itself can only load all layers of a
    stack at once.
    """

    def __init__(self, path: Path, of_optimizer: str | None = None) -> None:
        """``of_optimizer``: "param" (the fp32 weights), "exp_avg" or "exp_avg_sq"; None: the model's weights."""
        self._reader = FileSystemReader(path)
        metadata = read_metadata(path)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._path = path
        self._prefix = "" if of_optimizer is None else f"{OPTIMIZER_STATE}.{of_optimizer}."
        self._saved = {
            key.removeprefix(self._prefix): value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
            and key.startswith(self._prefix)
            and (self._prefix or not key.startswith("optimizer."))
        }
        self._check_size()

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
        wanted = create_read_items_for_chunk_list(self._prefix + key, saved, [ChunkStorageMetadata(offsets, sizes)])
        try:
            self._reader.read_data(LoadPlan(wanted), _Into(frame)).wait()
        except UNREADABLE as error:
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise WeightsError(f"{self._path}: {key} is damaged, or no tensor: {why}") from error
        return frame[0] if stacked else frame

    def _check_size(self) -> None:
        """Raise WeightsError for tensors that are said to be larger than the files, before memory is taken for one."""
        said = sum(math.prod(value.size) * value.properties.dtype.itemsize for value in self._saved.values())
        there = sum(file.stat().st_size for file in self._path.glob("*.distcp"))
        if said > there:
            raise WeightsError(f"{self._path}: .metadata says {said} bytes of weights, its files have {there}")


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
