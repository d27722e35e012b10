"""The loss written out, in fp32 or wider: the truth that the other rows are held to."""

import torch
from torch import Tensor


def token_losses(labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
    """See ``cross_entropy.TokenLosses``; the whole vocabulary."""
    wide_BTV = logits_TBV.to(torch.promote_types(logits_TBV.dtype, torch.float32)).transpose(0, 1)
    log_probability_BT = wide_BTV.log_softmax(2).gather(2, labels_BT[..., None])[..., 0]
    return -log_probability_BT.float()
