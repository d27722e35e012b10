"""megatron-core's GPTModel, computed by the operations it is given."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_sep.kernels.cross_entropy import TokenLosses
from megatron_sep.model.operations import Operations


class Decoder(GPTModel):  # type: ignore[misc]
    """GPTModel with the loss of its operations; they stay on it for the engine that trains it."""

    def __init__(self, *args: Any, operations: Operations, compiled: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.operations = operations
        losses = operations.token_losses
        self.token_losses: TokenLosses = torch.compile(losses, dynamic=False) if compiled else losses

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, T], logits [T, B, vocabulary / tensor-parallel ranks]; the loss of each token, fp32 [B, T]."""
        return self.token_losses(labels, logits)
