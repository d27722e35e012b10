"""The weights of a Hugging Face directory: safetensors or .bin, sharded or not."""

from pathlib import Path

from megatron_sep.files import read_json
from megatron_sep.weights.pickle_files import PickleFiles
from megatron_sep.weights.safetensors_files import SafetensorsFiles
from megatron_sep.weights.tensor_files import Files, WeightsError


def hugging_face_files(folder: Path) -> Files:
    """The safetensors or .bin files of a directory, sharded or not. Raises WeightsError."""
    for name, kind in (("model.safetensors", SafetensorsFiles), ("pytorch_model.bin", PickleFiles)):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return kind(_shards(index))
        if (folder / name).is_file():
            return kind([folder / name])
    raise WeightsError(f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of either")


def _shards(index: Path) -> list[Path]:
    try:
        where: dict[str, str] = read_json(index)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: is no index of shards: {error!r}") from error
    if not isinstance(where, dict):
        raise WeightsError(f"{index}: is no index of shards: `weight_map` is a {type(where).__name__}")
    for tensor, name in where.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{index}: {tensor} is said to be in {name!r}; a shard lies beside its index")
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index.parent / name}: no such file; {tensor} is in it")
    return [index.parent / name for name in sorted(set(where.values()))]
