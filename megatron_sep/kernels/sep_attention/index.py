"""The landmarks of a plan in the order in which the fused kernel reads them: made once, for all heads and layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from megatron_sep.attention.context import ContextPlan
from megatron_sep.attention.pattern import MaskPlan

GAP = 128
"""A power of two. No block of the fused kernel has more keys than this, so none holds landmarks and other keys."""


@dataclass(frozen=True, eq=False)
class KeyIndex:
    """Where a plan's landmarks are."""

    seen_BT: Tensor
    """int32 [B, T]: landmarks up to each position, itself included."""
    sorted_2BG: Tensor
    """int32 [2, B, T + GAP]: positions and reaches of the row's landmarks, ascending, then from the next multiple of
    GAP on those of its other keys, ascending. Zero where there is no key: a key's reach is at least 1."""

    @classmethod
    def of(cls, plan: MaskPlan) -> "KeyIndex":
        """A few O(T) operations on the device, no host synchronisation."""
        landmark_BT, reach_BT = plan.landmark_BT, plan.reach_BT
        batch, length = reach_BT.shape
        position_T = torch.arange(length, device=reach_BT.device)
        seen_BT = landmark_BT.cumsum(1)
        others_from_B1 = (seen_BT[:, -1:] + (GAP - 1)) & -GAP
        slot_BT = torch.where(landmark_BT, seen_BT - 1, position_T + others_from_B1 - seen_BT)
        sorted_2BG = reach_BT.new_zeros(2, batch, length + GAP)
        sorted_2BG[0].scatter_(1, slot_BT, position_T.to(torch.int32).expand(batch, length))
        sorted_2BG[1].scatter_(1, slot_BT, reach_BT)
        return cls(seen_BT.to(torch.int32), sorted_2BG)


@overload
def indexed(plan: MaskPlan) -> MaskPlan: ...
@overload
def indexed(plan: ContextPlan) -> ContextPlan: ...
def indexed(plan: MaskPlan | ContextPlan) -> MaskPlan | ContextPlan:
    """The plan with its index; a plan that the fused kernel never gets, plain causal or uneven, as it is."""
    if isinstance(plan, ContextPlan):
        return replace(plan, parts=tuple(map(indexed, plan.parts)))
    if plan.index is not None or plan.causal or not plan.even:
        return plan
    return replace(plan, index=KeyIndex.of(plan))


@overload
def indexed_layers(plans: Sequence[MaskPlan]) -> tuple[MaskPlan, ...]: ...
@overload
def indexed_layers(plans: Sequence[ContextPlan]) -> tuple[ContextPlan, ...]: ...
def indexed_layers(plans: Sequence[Any]) -> tuple[Any, ...]:
    """The plans of a model's layers with their indices: layers that share a plan share its index too."""
    made = {plan: indexed(plan) for plan in dict.fromkeys(plans)}
    return tuple(made[plan] for plan in plans)
