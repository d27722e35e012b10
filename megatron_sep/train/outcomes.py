"""What became of each step, read a step later: the device has the next one to work on while it is waited for."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """A step that is over on the device."""

    step: int
    loss: float
    grad_norm: float
    """Before clipping; not finite: the step was skipped."""

    @property
    def applied(self) -> bool:
        """Did the weights change?"""
        return math.isfinite(self.grad_norm)


class Outcomes:
    """Losses and gradient norms on their way to the host."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Scalars on the device; nothing is waited for."""
        values = torch.stack([loss, grad_norm.to(loss)])
        if values.device.type != "cuda":
            self._waiting.append((step, values, None))
            return
        copied = torch.empty(2, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._waiting.append((step, copied, event))

    def over(self, *, all_of_them: bool) -> Iterator[Outcome]:
        """Those of all steps but the last that was added, or of that one too, each once, in order."""
        while len(self._waiting) > (0 if all_of_them else 1):
            step, values, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            yield Outcome(step, *values.tolist())
