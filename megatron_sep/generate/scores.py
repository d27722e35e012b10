"""Attention whose scores go through more than a scale and a softmax, in plain torch and without a look at the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.config.position import SelfAdjustingConfig
from megatron_sep.kernels.sep_attention.scores import weights


@dataclass(frozen=True, eq=False)
class Scoring:
    """What the scores of a layer go through."""

    softcap: float | None = None
    """Scores x become softcap * tanh(x / softcap)."""
    sinks_H: Tensor | None = None
    """A score of each head that takes a share of the attention and brings no value."""
    slopes_H: Tensor | None = None
    """fp32: how much a score falls with each step from the query to the key (ALiBi)."""
    adjusting: SelfAdjustingConfig | None = None
    """Weights are multiplied by their scores; not together with sinks."""
    bias_scale: float | None = None
    """As ``ModelPositions`` has it: then what counts is where a key stands, and not how far off."""

    @property
    def plain(self) -> bool:
        """Is there nothing but a scale and a softmax?"""
        return all(x is None for x in (self.softcap, self.sinks_H, self.slopes_H, self.adjusting))

    def __str__(self) -> str:
        names = {
            "softcap": self.softcap,
            "attention sinks of the model": self.sinks_H,
            "ALiBi": self.slopes_H,
            "self-adjusting softmax": self.adjusting,
        }
        return " and ".join(name for name, value in names.items() if value is not None)

    def of_heads(self, heads: slice) -> "Scoring":
        """The same for some of the heads."""
        sinks_H, slopes_H = (None if x is None else x[heads] for x in (self.sinks_H, self.slopes_H))
        return Scoring(self.softcap, sinks_H, slopes_H, self.adjusting, self.bias_scale)

    def falls(self, slopes: Tensor, distance: Tensor) -> Tensor:
        """What ALiBi adds to scores, for slopes and integer distances that broadcast."""
        if self.bias_scale is None:
            return -slopes * distance
        return (slopes.bfloat16() * -distance).to(slopes.dtype) * self.bias_scale


def attend_shaped(
    q_BHTD: Tensor,
    k_BKED: Tensor,
    v_BKED: Tensor,
    visible: Tensor,
    scale: float,
    scoring: Scoring,
    distance: Tensor | None = None,
) -> Tensor:
    """Attention of T queries to the entries that are visible: [B, H, T, D]. ``visible``: bool, [B, K, T or 1, E].

    ``distance``: integers of the same shape, from each entry to the query; slopes need it.
    """
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    q_BKGTD = q_BHTD.to(wide).reshape(len(q_BHTD), k_BKED.shape[1], -1, *q_BHTD.shape[2:])
    scores_BKGTE = q_BKGTD @ k_BKED[:, :, None].to(wide).mT * scale
    if scoring.softcap is not None:
        scores_BKGTE = (scores_BKGTE / scoring.softcap).tanh() * scoring.softcap
    if scoring.slopes_H is not None and distance is not None:
        slopes_KG11 = scoring.slopes_H.to(wide).view(*q_BKGTD.shape[1:3], 1, 1)
        scores_BKGTE = scores_BKGTE + scoring.falls(slopes_KG11, distance[:, :, None])
    if scoring.adjusting is not None:
        shares_BKGTE = weights(scores_BKGTE, visible[:, :, None], scoring.adjusting)
        return (shares_BKGTE @ v_BKED[:, :, None].to(wide)).flatten(1, 2).to(q_BHTD.dtype)
    scores_BKGTE = scores_BKGTE.masked_fill(~visible[:, :, None], torch.finfo(wide).min)
    if scoring.sinks_H is not None:
        sinks_KG11 = scoring.sinks_H.to(wide).view(*q_BKGTD.shape[1:3], 1, 1)
        scores_BKGTE = torch.cat([scores_BKGTE, sinks_KG11.expand(*scores_BKGTE.shape[:-1], 1)], -1)
    weights_BKGTE = scores_BKGTE.softmax(-1)[..., : k_BKED.shape[2]]
    out_BKGTD = weights_BKGTE @ v_BKED[:, :, None].to(wide)
    return out_BKGTD.flatten(1, 2).to(q_BHTD.dtype)
