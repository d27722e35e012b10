"""The plan of a layer for the tokens that one context-parallel rank holds: what it needs of the others, and sees of it.

A query sees a window of keys before it and the landmarks before that. So a rank needs of the others the window before
each of its two chunks, and the landmarks of what comes before; all of it is known from the ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.attention.compact import Compacted, compact
from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.parallel.exchange import Route
from megatron_sep.parallel.share import Share


@dataclass(frozen=True, eq=False)
class ContextPlan:
    """Of a layer, for one rank: an exchange of keys, and a plan over them for each of the rank's chunks of queries."""

    parts: tuple[MaskPlan, ...]
    """The queries of a chunk among the first of the gathered keys: as many as there are up to its last query."""
    route: Route

    def num_visible(self) -> Tensor:
        """Keys each of the rank's queries sees, int64 [B, T / ranks]."""
        return torch.cat([part.num_visible() for part in self.parts], 1)

    def to(self, device: torch.device) -> "ContextPlan":
        """The same on another device."""
        return ContextPlan(tuple(part.to(device) for part in self.parts), self.route.to(device))


def context_plans(plans: Sequence[MaskPlan], share: Share, device: torch.device) -> tuple[ContextPlan, ...]:
    """Of the plans of a model's layers over whole sequences: layers that share a plan share its part too.

    It waits for the device of ``plans``, so make those on the host; what it returns is on ``device``.
    """
    made = {plan: context_plan(plan, share).to(device) for plan in dict.fromkeys(plans)}
    return tuple(made[plan] for plan in plans)


def context_plan(plan: MaskPlan, share: Share) -> ContextPlan:
    """One rank's part of a plan over the whole sequence."""
    needed_BT = _needed(plan, share, range(share.length))
    for span in share.spans:
        needed_BT[:, span.start : span.stop] = False
    here = compact(plan, needed_BT, share.spans)
    parts = tuple(here.plan.of_first_keys(span.stop).of_queries(span) for span in here.spans)
    return ContextPlan(parts, _route(plan, share, here))


def _needed(plan: MaskPlan, by: Share, *of: range) -> Tensor:
    """Which keys of some spans a rank's queries see: bool [B, keys of the spans]."""
    early, late = by.spans
    return torch.cat([plan.seen_by(early, keys) | plan.seen_by(late, keys) for keys in of], 1)


def _route(plan: MaskPlan, share: Share, here: Compacted) -> Route:
    batch = len(plan.reach_BT)
    sent, slots = [], []
    for rank in range(share.size):
        other = share.of_rank(rank)
        apart = rank != share.rank
        b, t = (_needed(plan, other, *share.spans) & apart).nonzero(as_tuple=True)
        sent.append(t * batch + b)
        b, t = (_needed(plan, share, *other.spans) & apart).nonzero(as_tuple=True)
        slots.append(other.take(here.slot_BT)[b, t] * batch + b)
    return Route(
        sent=torch.cat(sent),
        num_sent=tuple(map(len, sent)),
        slots=torch.cat(slots),
        num_received=tuple(map(len, slots)),
        own_slots=here.spans,
        num_slots=here.plan.num_queries,
    )
