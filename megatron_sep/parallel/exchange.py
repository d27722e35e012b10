"""Keys and values of other context-parallel ranks, one exchange a layer, and the gradients back the same way."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Route:
    """Which of its tokens a rank sends to which other, and the slots of what it then holds. B rows, S own tokens each.

    Both sides of an exchange know it from the ids of the micro-batch; nothing about it is sent.
    """

    sent: Tensor
    """int64: own tokens, counted token by token and row by row (t * B + b), those for rank 0 first."""
    num_sent: tuple[int, ...]
    """By rank."""
    slots: Tensor
    """int64: where each received token goes (slot * B + b), those of rank 0 first."""
    num_received: tuple[int, ...]
    """By rank."""
    own_slots: tuple[range, ...]
    """Where the own tokens go."""
    num_slots: int

    def to(self, device: torch.device) -> "Route":
        """The same on another device."""
        sent, slots = (x.to(device, non_blocking=True) for x in (self.sent, self.slots))
        return Route(sent, self.num_sent, slots, self.num_received, self.own_slots, self.num_slots)


def gather_keys(k_SBND: Tensor, v_SBND: Tensor, route: Route, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Own keys and values [S, B, N, D] with what a route brings of the other ranks': [slots, B, N, D], zero elsewhere.

    Every rank of the group calls it together. Gradients go back to the ranks that hold the keys, are summed in fp32 in
    the order of the ranks, and so are the same bits every time.
    """
    k, v = _Gather.apply(k_SBND, v_SBND, route, group)  # type: ignore[no-untyped-call]
    return k, v


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k_SBND: Tensor, v_SBND: Tensor, route: Route, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, ...]:
        ctx.route, ctx.group = route, group
        rows = torch.stack([x.flatten(0, 1)[route.sent] for x in (k_SBND, v_SBND)], 1)
        received = _exchanged(rows, route.num_sent, route.num_received, group)
        return tuple(_in_slots(own, received[:, i], route) for i, own in enumerate((k_SBND, v_SBND)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        route: Route = ctx.route
        rows = torch.stack([x.flatten(0, 1)[route.slots] for x in gradients], 1)
        returned = _exchanged(rows, route.num_received, route.num_sent, ctx.group)
        return *(_summed(x, returned[:, i], route) for i, x in enumerate(gradients)), None, None


def _exchanged(
    rows: Tensor, num_sent: tuple[int, ...], num_received: tuple[int, ...], group: dist.ProcessGroup | None
) -> Tensor:
    received = rows.new_empty(sum(num_received), *rows.shape[1:])
    dist.all_to_all_single(received, rows, list(num_received), list(num_sent), group=group)
    return received


def _in_slots(own_SBND: Tensor, received: Tensor, route: Route) -> Tensor:
    found = own_SBND.new_zeros(route.num_slots, *own_SBND.shape[1:])
    found.flatten(0, 1)[route.slots] = received
    for chunk, slots in zip(own_SBND.chunk(len(route.own_slots)), route.own_slots, strict=True):
        found[slots.start : slots.stop] = chunk
    return found


def _summed(gradient: Tensor, returned: Tensor, route: Route) -> Tensor:
    """The gradient of the own tokens: what this rank's queries gave them, and each other rank's."""
    own = torch.cat([gradient[slots.start : slots.stop] for slots in route.own_slots])
    total = own.to(torch.promote_types(own.dtype, torch.float32))
    pieces = zip(*(torch.split(x, list(route.num_sent)) for x in (route.sent, returned)), strict=True)
    for tokens, piece in pieces:  # one rank asks for a token once, so no two rows of a piece meet
        total.flatten(0, 1)[tokens] += piece
    return total.to(own.dtype)
