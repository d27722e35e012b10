"""`.metadata` of torch's distributed checkpoints without running what is in it.

torch writes it with pickle and reads it back without restriction; a file that someone else made could run code. Here it
is read through a list of the classes that torch writes there, before anything else opens it.
"""

import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_sep.weights.tensor_files import UNREADABLE, WeightsError

_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = frozenset(
    [
        *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *((f"{_CHECKPOINT}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
        *((f"{_CHECKPOINT}.metadata", name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
        *((f"{_CHECKPOINT}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
        *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("builtins", "frozenset"),
    ]
)
"""Module and name of what torch 2.11 to 2.15 and megatron-core put there; all that they do is hold values."""


_MOST_PLACES = 2**24
"""Of pickle's memo: one for each value of a file that is read again later in it."""
_PUTS = (pickle.PUT[0], pickle.BINPUT[0], pickle.LONG_BINPUT[0])
_LOADS: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch


def _within_bounds(put: Callable[[Any], None]) -> Callable[[Any], None]:
    """A load that puts a value into the memo, and its place held to the bound."""

    def checked(unpickler: Any) -> None:
        put(unpickler)
        place = next(reversed(unpickler.memo))
        if place > _MOST_PLACES:
            raise pickle.UnpicklingError(f"puts a value into place {place:,} of its memo")

    return checked


def _member(kind: Any, name: Any) -> Enum:
    """What `getattr` stands for in a checkpoint: a value of an enumeration, as Python 3.11 before 3.11.4 writes one."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in list(kind.__members__):
        return kind[name]
    raise pickle.UnpicklingError("asks for an attribute, which no checkpoint does")


class _Restricted(pickle._Unpickler):
    """Python's own unpickler: the one in C takes memory up to the largest place of the memo that a file names."""

    dispatch = _LOADS | {code: _within_bounds(_LOADS[code]) for code in _PUTS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        found = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint has")


def read_metadata(folder: Path) -> Metadata:
    """What tensors a checkpoint holds and in which of its files. Raises WeightsError; no code of the file runs."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            found = _Restricted(file).load()
    except UNREADABLE as error:
        known = f"no checkpoint of torch {torch.__version__} or older"
        raise WeightsError(f"{path}: is damaged, or {known}: {error}") from error
    if not isinstance(found, Metadata):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, not the metadata of a checkpoint")
    _check_names(path, found)
    return found


def _check_names(path: Path, metadata: Metadata) -> None:
    """Every tensor has a name, a type and whole sizes, and lies in a file of the checkpoint itself."""
    tensors, storage = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise WeightsError(f"{path}: lists no tensors, or no places of them")
    for key, value in tensors.items():
        if not isinstance(key, str) or (isinstance(value, TensorStorageMetadata) and not _is_whole(value)):
            raise WeightsError(f"{path}: {str(key)[:200]!r} has no sizes and no type that a tensor has")
    for info in storage.values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\0" in name:
            raise WeightsError(f"{path}: names the file {name!r}; tensors lie beside it")


def _is_whole(tensor: TensorStorageMetadata) -> bool:
    try:
        sizes = [tensor.size, *(size for chunk in tensor.chunks for size in (chunk.offsets, chunk.sizes))]
        kind = tensor.properties.dtype
    except (AttributeError, TypeError):  # a file may hold anything in their place
        return False
    whole = all(isinstance(size, torch.Size) and all(0 <= part < 2**40 for part in size) for size in sizes)
    return whole and isinstance(kind, torch.dtype)
