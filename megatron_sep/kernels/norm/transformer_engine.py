"""Transformer Engine's norms."""

import torch
from torch import nn
from transformer_engine.pytorch import LayerNorm, RMSNorm


def layer_norm(size: int, eps: float, dtype: torch.dtype) -> nn.Module:
    """See ``norm.MakeNorm``."""
    norm: nn.Module = LayerNorm(size, eps=eps, params_dtype=dtype)
    return norm


def rms_norm(size: int, eps: float, dtype: torch.dtype) -> nn.Module:
    """See ``norm.MakeNorm``."""
    norm: nn.Module = RMSNorm(size, eps=eps, params_dtype=dtype)
    return norm
