"""GELU of a matrix product's output and its bias: x * Phi(x), Phi the normal distribution's (arXiv 1606.08415)."""

from typing import Protocol

from torch import Tensor


class BiasGelu(Protocol):
    """What a row of ``bias_gelu`` names."""

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """gelu(x + bias) for x [..., F] and bias [F], of x's shape and type."""
        ...
