"""Weights that torch.save wrote, through torch's unpickler with its allow-list: no code of a file runs."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sep.weights.tensor_files import UNREADABLE, Shape, WeightsError


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


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote. Nothing but tensors is read: torch's unpickler with its allow-list
    refuses everything else, and no code of the file runs. Raises WeightsError."""
    try:
        found = _load_mapped(path)
    except UNREADABLE as error:
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
