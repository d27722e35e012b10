"""Whether groups of query heads share a key head."""

from torch import Tensor


def is_grouped(q_BHQD: Tensor, k_BHTD: Tensor) -> bool:
    """For torch's ``enable_gqa``, which takes no symbol: in compiled code ``not`` makes a constant, ``!=`` does not."""
    return not q_BHQD.shape[1] == k_BHTD.shape[1]  # noqa: SIM201
