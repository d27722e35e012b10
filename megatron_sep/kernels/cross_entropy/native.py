"""torch's cross entropy: compiled, it reads the logits once forward and once backward.

megatron-core's fused one makes five passes over them.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy


def token_losses(labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
    """See ``cross_entropy.TokenLosses``; the whole vocabulary."""
    losses = cross_entropy(logits_TBV.float().flatten(0, 1), labels_BT.T.flatten(), reduction="none")
    return losses.view(labels_BT.T.shape).T.contiguous()
