"""A plan over some of its keys is a plan again: the keys that are left move together, and each reach with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.attention.pattern import MaskPlan


@dataclass(frozen=True, eq=False)
class Compacted:
    """The kept keys of a plan in slots, in the order of the text; each span of queries is whole among them."""

    plan: MaskPlan
    """Of the slots, all of which are queries."""
    slot_BT: Tensor
    """int64: where each kept key is; without meaning for the others."""
    spans: tuple[range, ...]
    """The slots of the spans."""


def compact(plan: MaskPlan, kept_BT: Tensor, spans: tuple[range, ...]) -> Compacted:
    """Keep the keys ``kept_BT`` and all of some spans of positions, and let the queries of the spans see what they saw.

    What the queries of a span see must be kept, and nothing that is kept comes after the last span. Rows differ in how
    many keys they keep before a span: the slots of those that keep fewer begin with empty ones, which no span sees.
    Between a key that is seen because it is near and the query that sees it, all keys are seen and kept, so no distance
    inside a window changes; in a row of one document none beyond it becomes one within. Waits for the device: meant for
    ids on the host.
    """
    slot_BT, in_slots, count = _slots(kept_BT, spans)
    batch, length = plan.reach_BT.shape
    next_BT = torch.full((batch, length + 1), count, device=slot_BT.device)
    within_BT = torch.zeros_like(plan.landmark_BT)
    within_BT[:, : spans[-1].stop] = kept_BT[:, : spans[-1].stop]
    for span in spans:
        within_BT[:, span.start : span.stop] = True
    next_BT[:, :length] = torch.where(within_BT, slot_BT, count)
    next_BT = next_BT.flip(1).cummin(1).values.flip(1)
    b, t = within_BT.nonzero(as_tuple=True)
    slot = slot_BT[b, t]
    reach_BK = plan.reach_BT.new_ones(batch, count)
    reach_BK[b, slot] = (next_BT[b, t + plan.reach_BT[b, t]] - slot).to(torch.int32)
    landmark_BK = plan.landmark_BT.new_zeros(batch, count)
    landmark_BK[b, slot] = plan.landmark_BT[b, t]
    start_BK = None
    if plan.start_BT is not None:
        start_BK = torch.arange(count, dtype=torch.int32, device=slot.device).repeat(batch, 1)
        start_BK[b, slot] = next_BT[b, plan.start_BT[b, t].long()].to(torch.int32)
    most = int(landmark_BK.sum(1).max())
    window = min(plan.window, count)
    return Compacted(MaskPlan(window, landmark_BK, reach_BK, False, start_BK, most), slot_BT, in_slots)


def _slots(kept_BT: Tensor, spans: tuple[range, ...]) -> tuple[Tensor, tuple[range, ...], int]:
    """A slot for each key, the slots of the spans, and their number."""
    slot_BT = torch.zeros_like(kept_BT, dtype=torch.int64)
    found: list[range] = []
    first = past = 0
    for span in spans:
        before_BL = kept_BT[:, past : span.start]
        count_B1 = before_BL.sum(1, keepdim=True)
        width = int(count_B1.max())
        slot_BT[:, past : span.start] = first + width - count_B1 + before_BL.cumsum(1) - 1
        found.append(range(first + width, first + width + len(span)))
        slot_BT[:, span.start : span.stop] = torch.arange(found[-1].start, found[-1].stop, device=slot_BT.device)
        first, past = found[-1].stop, span.stop
    return slot_BT, tuple(found), first
