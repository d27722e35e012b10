"""What scores go through between their scale and the values, where that is more than a softmax."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.config.position import SelfAdjustingConfig


@dataclass(frozen=True, eq=False)
class DistanceBias:
    """ALiBi (arXiv 2108.12409): a scaled score falls by a head's slope with each step from the query to the key."""

    slopes_H: Tensor
    """fp32: of each query head."""
    position_BT: Tensor | None = None
    """int32: where the tokens of a plan stand, so far as distances are meant; None: at their index in the row."""

    def dense(self, plan: MaskPlan) -> Tensor:
        """What is added to the scores of a plan's queries: fp32 [B or 1, H, Q, T]."""
        position_BT = self.position_BT
        if position_BT is None:
            position_BT = torch.arange(plan.reach_BT.shape[1], device=self.slopes_H.device)[None]
        return distance_bias(self.slopes_H, position_BT[:, plan.queries.start : plan.queries.stop], position_BT)


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head, fp32 (arXiv 2108.12409, section 3): 2^(-8 h / H), h from 1, where H is a power of two.

    Otherwise those of the power below H, then every second one of the power above.
    """
    below = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    slopes += [2 ** (-8 * (2 * h + 1) / (2 * below)) for h in range(heads - below)]
    return torch.tensor(slopes, dtype=torch.float32)


def distance_bias(slopes_H: Tensor, query_BQ: Tensor, key_BT: Tensor) -> Tensor:
    """-slope x (query - key) of integer positions: fp32 [B, H, Q, T]."""
    distance_BQT = (key_BT[:, None] - query_BQ[:, :, None]).to(slopes_H.dtype)
    return slopes_H[:, None, None] * distance_BQT[:, None]


def weights(scores: Tensor, visible: Tensor, adjusting: SelfAdjustingConfig | None) -> Tensor:
    """The share of each key [..., Q, T] in a query's output, from its biased scores and who sees whom, a bool.

    With ``adjusting`` they do not sum to 1: it is the self-adjusting softmax (arXiv 2502.18277, section 3).
    """
    shares = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    if adjusting is None:
        return shares
    seen = scores.masked_fill(~visible, 0.0)
    if not adjusting.denominator:
        return shares * seen
    low = scores.masked_fill(~visible, torch.inf).amin(-1, keepdim=True).clamp(max=0)
    high = scores.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True).clamp(min=0) + adjusting.denominator_bias
    return shares * (seen - low + adjusting.numerator_bias) / (high - low)
