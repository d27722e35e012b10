"""Context parallelism on one process: what each of several ranks would hold, get and compute."""

import torch
from torch import Tensor

from megatron_sep.attention.context import ContextPlan, context_plan
from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.kernels.sep_attention import sep_attention
from megatron_sep.parallel.share import Share


def shares(length: int, ranks: int) -> list[Share]:
    return [Share(rank, ranks, length) for rank in range(ranks)]


def gathered(whole_BHTD: Tensor, share: Share, plans: list[ContextPlan]) -> Tensor:
    """What a rank has in its slots after the exchange, from what every rank sends: differentiable, no processes."""
    batch, heads, length, size = whole_BHTD.shape
    route = plans[share.rank].route
    of_ranks = [other.take(whole_BHTD.permute(0, 2, 1, 3)).transpose(0, 1) for other in shares(length, share.size)]
    slots = whole_BHTD.new_zeros(route.num_slots * batch, heads, size)
    own = torch.cat([torch.arange(span.start * batch, span.stop * batch) for span in route.own_slots])
    sent = [
        of_ranks[rank].flatten(0, 1)[plan.route.sent.split(plan.route.num_sent)[share.rank]]
        for rank, plan in enumerate(plans)
    ]
    places = torch.cat([own.to(slots.device), route.slots])
    filled = slots.index_put((places,), torch.cat([of_ranks[share.rank].flatten(0, 1), *sent]))
    return filled.unflatten(0, (-1, batch)).permute(1, 2, 0, 3)


def attend_in_ranks(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, plan: MaskPlan, ranks: int, backend: str = "reference"
) -> Tensor:
    """Attention of the whole sequence, each rank's queries over the keys that it holds and is sent: [B, H, T, D]."""
    places = shares(q_BHTD.shape[2], ranks)
    plans = [context_plan(plan, share) for share in places]
    found: dict[int, Tensor] = {}
    wide = torch.promote_types(k_BHTD.dtype, torch.float32)  # in which the exchange sums gradients
    keys, values = k_BHTD.to(wide), v_BHTD.to(wide)
    for share, mine in zip(places, plans, strict=True):
        k, v = (gathered(x, share, plans).to(q_BHTD.dtype) for x in (keys, values))
        for span, part in zip(share.spans, mine.parts, strict=True):
            q = q_BHTD[:, :, span.start : span.stop]
            found[span.start] = sep_attention(
                q, k[:, :, : part.num_keys], v[:, :, : part.num_keys], part, backend=backend
            )
    return torch.cat([found[start] for start in sorted(found)], 2)
