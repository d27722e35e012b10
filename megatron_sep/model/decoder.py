"""megatron-core's GPTModel, computed by the operations it is given."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_sep.kernels.cross_entropy import TokenLosses
from megatron_sep.model.operations import Operations
from megatron_sep.model.positions import Positions


class Decoder(GPTModel):  # type: ignore[misc]
    """GPTModel with the loss of its operations; they stay on it for the engine that trains it.

    ``positions`` makes of position ids what the layers are told in the place of megatron-core's angles.
    """

    positions: Positions

    def __init__(self, *args: Any, operations: Operations, compiled: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.operations = operations
        losses = operations.token_losses
        self.token_losses: TokenLosses = torch.compile(losses, dynamic=False) if compiled else losses

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """position_ids: [B, T], or [2, B, T], segments and places in them, of which the places are embedded."""
        embedded = position_ids[1] if self.positions.bilevel else position_ids
        found = super()._preprocess(input_ids, embedded, *args, **kwargs)
        return (found[0], self.positions.told(position_ids, found[1]), *found[2:])

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, T], logits [T, B, vocabulary / tensor-parallel ranks]; the loss of each token, fp32 [B, T]."""
        return self.token_losses(labels, logits)
