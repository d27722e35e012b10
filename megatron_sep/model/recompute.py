"""Activations that are computed a second time in the backward pass instead of being kept."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """What ``function`` returns; its backward pass calls it again, with the same dropout."""
    kept = partial(_same_dropout, tensor_parallel.get_cuda_rng_tracker().get_states())
    found: Tensor = checkpoint(function, *inputs, use_reentrant=False, context_fn=kept)
    return found


def _same_dropout(states: dict[str, Tensor]) -> tuple[Any, Any]:
    """Contexts for torch's checkpoint: the recomputation draws from megatron-core's random states as they were."""
    return contextlib.nullcontext(), _restored(states)


@contextlib.contextmanager
def _restored(states: dict[str, Tensor]) -> Iterator[None]:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    now = tracker.get_states()
    tracker.set_states(states)
    try:
        yield
    finally:
        tracker.set_states(now)
