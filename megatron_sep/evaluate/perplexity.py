"""Loss of texts under what a cache keeps, as a model meets them when it decodes: a prompt, then a token at a time."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_sep.generate.attach import attach
from megatron_sep.generate.cache import Retention
from megatron_sep.generate.decode import Decoder


@dataclass(frozen=True)
class Score:
    """Of the tokens after the prompts."""

    loss_N: Tensor
    """Nats, float64: one a token, so that policies can be compared token by token."""
    retention: Retention

    @property
    def loss(self) -> float:
        """Mean, nats per token."""
        return float(self.loss_N.mean())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.loss)

    def error_of_difference(self, other: "Score") -> float:
        """Standard error of the difference of two mean losses of the same tokens."""
        difference_N = self.loss_N - other.loss_N
        return float(difference_N.std() / math.sqrt(len(difference_N)))


@torch.no_grad()
def score(model: Any, policy: Any, ids_BT: Tensor, prompt: int, *, graph: bool | None = None) -> Score:
    """Feed texts of T tokens, the first ``prompt`` at once, under a policy or a list of one a layer (see ``attach``).

    The first token after the prompt is predicted from the whole prompt and is not counted: what the policy drops, it
    drops for the others. The model is left as it was.
    """
    attachment = attach(model, policy)
    try:
        decoder = Decoder(model, attachment.new_cache(), graph)
        decoder.read(ids_BT[:, :prompt])
        before = decoder.cache.retention()
        losses = []
        for t in range(prompt, ids_BT.shape[1] - 1):
            logits_BV = decoder.step(ids_BT[:, t : t + 1])
            losses.append(cross_entropy(logits_BV.float(), ids_BT[:, t + 1], reduction="none").double())
        return Score(torch.stack(losses).flatten().cpu(), decoder.cache.retention().since(before))
    finally:
        attachment.detach()
