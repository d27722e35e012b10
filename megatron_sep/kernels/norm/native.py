"""torch's own norms: one kernel forward on a GPU, and inside a compiled layer fused with what surrounds them."""

import torch
from torch import nn


def layer_norm(size: int, eps: float, dtype: torch.dtype) -> nn.Module:
    """See ``norm.MakeNorm``."""
    return nn.LayerNorm(size, eps=eps, dtype=dtype)


def rms_norm(size: int, eps: float, dtype: torch.dtype) -> nn.Module:
    """See ``norm.MakeNorm``."""
    return nn.RMSNorm(size, eps=eps, dtype=dtype)
