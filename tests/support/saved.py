"""What a checkpoint holds, read by torch alone."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sep.weights.safe_metadata import read_metadata
from megatron_sep.weights.sealed import newest_verified


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by the name it has there."""
    saved = read_metadata(folder).state_dict_metadata
    frames = {
        name: torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in saved.items()
        if isinstance(value, TensorStorageMetadata)
    }
    checkpoint.load(frames, checkpoint_id=str(folder), no_dist=True)
    return frames


def newest_tensors(run: Path) -> dict[str, Tensor]:
    """Those of a run's newest checkpoint."""
    newest = newest_verified(run / "checkpoints")
    assert newest is not None
    return saved_tensors(newest)
