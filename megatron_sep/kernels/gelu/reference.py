"""GELU written out, in fp32 or wider: the truth that the other rows are held to."""

import math

import torch
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """See ``gelu.BiasGelu``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sum_ = x.to(wide) + bias.to(wide)
    return (sum_ * 0.5 * torch.erfc(-sum_ / math.sqrt(2))).to(x.dtype)
