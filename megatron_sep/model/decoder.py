"""megatron-core's GPTModel with a loss that reads the logits once forward and once backward."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn.functional import cross_entropy


class Decoder(GPTModel):  # type: ignore[misc]
    """GPTModel; where the vocabulary is whole on each rank, its cross entropy is one compiled reduction.

    megatron-core's fused one makes five passes over the logits.
    """

    def __init__(self, *args: Any, compiled: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.token_losses: Callable[[Tensor, Tensor], Tensor] = (
            torch.compile(_token_losses, dynamic=False) if compiled else _token_losses
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, T], logits [T, B, vocabulary / tensor-parallel ranks]; the loss of each token, fp32 [B, T]."""
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]
        return self.token_losses(labels, logits)


def _token_losses(labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
    losses = cross_entropy(logits_TBV.float().flatten(0, 1), labels_BT.T.flatten(), reduction="none")
    return losses.view(labels_BT.T.shape).T.contiguous()
