"""Weights in safetensors files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sep.weights.tensor_files import Shape, WeightsError


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


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: is damaged or cut short: {error}") from error
