"""Attention whose scores go through more than a scale and a softmax, in plain torch and without a look at the host."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scoring:
    """What the scores of a layer go through."""

    softcap: float | None = None
    """Scores x become softcap * tanh(x / softcap)."""
    sinks_H: Tensor | None = None
    """A score of each head that takes a share of the attention and brings no value."""

    def __str__(self) -> str:
        return "softcap" if self.sinks_H is None else "attention sinks of the model"

    def of_heads(self, heads: slice) -> "Scoring":
        """The same for some of the heads."""
        return Scoring(self.softcap, None if self.sinks_H is None else self.sinks_H[heads])


def attend_shaped(
    q_BHTD: Tensor, k_BKED: Tensor, v_BKED: Tensor, visible: Tensor, scale: float, scoring: Scoring
) -> Tensor:  # fmt: skip
    """Attention of T queries to the entries that are visible: [B, H, T, D]. ``visible``: bool, [B, K, T or 1, E]."""
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    q_BKGTD = q_BHTD.to(wide).reshape(len(q_BHTD), k_BKED.shape[1], -1, *q_BHTD.shape[2:])
    scores_BKGTE = q_BKGTD @ k_BKED[:, :, None].to(wide).mT * scale
    if scoring.softcap is not None:
        scores_BKGTE = (scores_BKGTE / scoring.softcap).tanh() * scoring.softcap
    scores_BKGTE = scores_BKGTE.masked_fill(~visible[:, :, None], torch.finfo(wide).min)
    if scoring.sinks_H is not None:
        sinks_KG11 = scoring.sinks_H.to(wide).view(*q_BKGTD.shape[1:3], 1, 1)
        scores_BKGTE = torch.cat([scores_BKGTE, sinks_KG11.expand(*scores_BKGTE.shape[:-1], 1)], -1)
    weights_BKGTE = scores_BKGTE.softmax(-1)[..., : k_BKED.shape[2]]
    out_BKGTD = weights_BKGTE @ v_BKED[:, :, None].to(wide)
    return out_BKGTD.flatten(1, 2).to(q_BHTD.dtype)
