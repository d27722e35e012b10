"""The norms of NVIDIA's apex, which take inputs of their parameters' type."""

import torch
from apex.normalization import FusedLayerNorm, FusedRMSNorm
from torch import nn


def layer_norm(size: int, eps: float, dtype: torch.dtype) -> nn.Module:
    """See ``norm.MakeNorm``."""
    norm: nn.Module = FusedLayerNorm(size, eps=eps)
    return norm.to(dtype)


def rms_norm(size: int, eps: float, dtype: torch.dtype) -> nn.Module:
    """See ``norm.MakeNorm``."""
    norm: nn.Module = FusedRMSNorm(size, eps=eps)
    return norm.to(dtype)
