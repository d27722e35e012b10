"""What any process may call out at any moment and all must hear at the same step."""

from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor


class Flag(IntEnum):
    """What can be called out; the place of each in the tensor of all."""

    SAVE = 0
    """Write a checkpoint."""
    STOP = 1
    """Write a checkpoint and end."""
    BUSY = 2
    """A part of a checkpoint is still being written here."""


class Flags:
    """This process's flags; how many processes raise each is known to all one step later.

    They ride with the reduction of a step's loss, so they cost no message of their own, and the sums are copied to the
    host while the next step is computed, so nobody waits for the device.
    """

    def __init__(self, device: torch.device, ranks: int) -> None:
        self._own = torch.zeros(len(Flag), device=device)
        self._sums = torch.zeros(len(Flag), device=device)
        self._raised = [False] * len(Flag)
        self._ranks, self._rode = ranks, False
        self._coming: Coming | None = None

    def set(self, flag: Flag, up: bool) -> None:
        """Raise a flag of this process, or lower it; it stays so."""
        if self._raised[flag] != up:
            self._raised[flag] = up
            self._own[flag] = float(up)

    def ride(self, value: Tensor) -> Tensor:
        """The sum of a scalar over all processes, fp32; the flags go with it."""
        together = torch.cat([value.detach().float().reshape(1), self._own])
        dist.all_reduce(together)
        self._sums.copy_(together[1:])
        self._rode = True
        return together[0]

    def hear(self) -> frozenset[Flag]:
        """The flags that any process had raised in the step before this one; every process calls it once a step.

        With one process: those that are raised now.
        """
        if self._ranks == 1:
            return frozenset(flag for flag in Flag if self._raised[flag])
        if not self._rode:  # an engine that reduces its loss in its own way
            self._sums.copy_(self._own)
            dist.all_reduce(self._sums)
        heard, self._coming, self._rode = self._coming, Coming(self._sums), False
        return frozenset() if heard is None else heard.flags()


class Coming:
    """Sums on their way from the device."""

    def __init__(self, sums: Tensor) -> None:
        on_gpu = sums.device.type == "cuda"
        self._host = torch.empty(sums.shape, pin_memory=on_gpu)
        self._host.copy_(sums, non_blocking=True)
        self._there = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self._there is not None:
            self._there.record()

    def flags(self) -> frozenset[Flag]:
        """Those that some process had raised."""
        if self._there is not None:
            self._there.synchronize()
        return frozenset(flag for flag in Flag if self._host[flag] > 0)
