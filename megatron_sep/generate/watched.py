"""The attention weights of every layer of any model that a cache can be attached to, under its own pattern."""

from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.layers import plan_layers
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.generate.architecture import cache_name
from megatron_sep.generate.attach import attach
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.policies import softmax
from megatron_sep.generate.scores import Scoring


class WatchedCache(SepCache):
    """Attends as its base does, and keeps what each layer's queries paid to each key of the same pass."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weights: dict[int, Tensor] = {}
        """By layer: fp32 [B, H, T, T] on the host."""
        self.visible: tuple[Tensor, ...] = ()
        """By layer: bool [B, T, T], what a query may see."""

    def attend(
        self, layer: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, scoring: Scoring | None = None
    ) -> Tensor:
        """As SepCache. Raises AttachError for scores that go through more than a softmax."""
        if scoring is not None:
            raise AttachError(
                "attention maps are of scores that a softmax alone turns into weights; this model adds to them"
            )
        k_BHTD = k_BKTD.repeat_interleave(q_BHTD.shape[1] // k_BKTD.shape[1], 1)
        scores_BHTT = (q_BHTD.float() @ k_BHTD.float().mT) * scale
        hidden_B1TT = ~self.visible[layer][:, None].to(scores_BHTT.device)
        self.weights[layer] = softmax(scores_BHTT.masked_fill(hidden_B1TT, -torch.inf)).cpu()
        return super().attend(layer, q_BHTD, k_BKTD, v_BKTD, scale, scoring)


@torch.no_grad()
def attention_weights(model: Any, patterns: list[AttentionPattern], ids_BT: Tensor) -> list[Tensor]:
    """Of texts [B, T] in one pass: fp32 [B, H, T, T] a layer, rows that add up to 1. The model is left as it was.

    Raises AttachError for a model that cannot be attached.
    """
    attachment = attach(model, list(patterns))
    try:
        cache = WatchedCache(attachment.policies, **attachment.options)
        cache.visible = tuple(plan.dense() for plan in plan_layers(patterns, ids_BT))
        model(input_ids=ids_BT.to(model.device), **{cache_name(model): cache})
        return [cache.weights[layer] for layer in range(len(patterns))]
    finally:
        attachment.detach()
