"""`.metadata` of torch's distributed checkpoints without running what is in it.

torch writes it with pickle and reads it back without restriction; a file that someone else made could run code. Here it
is read through a list of the classes that torch writes there, before anything else opens it.
"""

import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

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
"""Module and name of what torch 2.11 to 2.13 and megatron-core put there; all that they do is hold values."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
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
    except (*UNREADABLE, pickle.PickleError, IndexError, TypeError, MemoryError, OverflowError) as error:
        raise WeightsError(f"{path}: is damaged, or no checkpoint of torch: {error}") from error
    if not isinstance(found, Metadata):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, not the metadata of a checkpoint")
    _check_names(path, found)
    return found


def _check_names(path: Path, metadata: Metadata) -> None:
    """Every tensor lies in a file of the checkpoint itself."""
    storage = metadata.storage_data if isinstance(metadata.storage_data, dict) else {}
    for info in storage.values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or PurePosixPath(name).name != name:
            raise WeightsError(f"{path}: names the file {name!r}; tensors lie beside it")
