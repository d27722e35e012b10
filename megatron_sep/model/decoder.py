"""megatron-core's GPTModel, computed by the operations it is given."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_sep.kernels.cross_entropy import TokenLosses
from megatron_sep.model.operations import Operations


class Decoder(GPTModel):  # type: ignore[misc]
    """GPTModel with the loss of its operations; they stay on it for the engine that trains it."""

    def __init__(
        self, *args: Any, operations: Operations, loss_chunk: int | None, compiled: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.operations, self.loss_chunk = operations, loss_chunk
        losses = operations.token_losses
        self.token_losses: TokenLosses = torch.compile(losses, dynamic=False) if compiled else losses

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, T], logits [T, B, vocabulary / tensor-parallel ranks]; the loss of each token, fp32 [B, T]."""
        return self.token_losses(labels, logits)

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None, **rest: Any) -> Tensor:
        """hidden_states [T, B, hidden]; the logits, or with labels [B, T] the losses, chunk by chunk."""
        if labels is None or self.loss_chunk is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)  # type: ignore[no-any-return]
        length = max(self.loss_chunk // labels.shape[0], 1)
        chunks = zip(torch.split(hidden_states, length), torch.split(labels, length, 1), strict=True)
        return torch.cat([self._chunk_losses(hidden, labels) for hidden, labels in chunks], 1)

    def _chunk_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The logits are not kept for the backward pass."""
        losses: Tensor = checkpoint(self._losses, hidden, labels, use_reentrant=False, preserve_rng_state=False)
        return losses

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=tied)
        return self.token_losses(labels, logits)
