"""The norms written out, in fp32 or wider: the truth that the other rows are held to."""

import torch
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        centred = wide - wide.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return (scaled * _wide(self.weight) + _wide(self.bias)).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean square + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        scaled = wide / (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return (scaled * _wide(self.weight)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
