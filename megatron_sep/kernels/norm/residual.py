"""A residual stream opened by plain calls of its norms: see ``norm.OpenResidual``."""

from collections.abc import Sequence

from torch import Tensor, nn


def open_residual(x: Tensor, norms: Sequence[nn.Module], biases: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """See ``norm.OpenResidual``."""
    return tuple(norm(x) for norm in norms), sum(biases, x)
