"""Whether groups of query heads share a key head."""

from torch import Tensor

from megatron_sep.kernels.symbols import truth


def is_grouped(q_BHQD: Tensor, k_BHTD: Tensor) -> bool:
    """For torch's ``enable_gqa``, which takes no symbol."""
    return truth(q_BHQD.shape[1] != k_BHTD.shape[1])
