"""Whether the kernels of a step are launched while the one before them still ends (programmatic dependent launch)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from megatron_sep.kernels.call import Call
from megatron_sep.kernels.operation import BackendError
from megatron_sep.kernels.why_not import dependent_launches

BY_DEFAULT = True
"""For who does not say, where they can be. No bit of a text depends on it (tests/generate/test_dependent.py)."""
DEPENDENT: ContextVar[bool] = ContextVar("dependent", default=False)
"""Are the kernels that this thread launches for a step?"""


def chosen(device: torch.device, wanted: bool | None) -> bool:
    """As ``wanted``; None: ``BY_DEFAULT``, where they can be. Raises BackendError for True where they cannot."""
    reason = dependent_launches(Call.on(device, torch.bfloat16))
    if wanted and reason is not None:
        raise BackendError(f"dependent=True: {reason}; pass None or False")
    return BY_DEFAULT and reason is None if wanted is None else wanted


@contextmanager
def launching(dependent: bool) -> Iterator[None]:
    """Meanwhile this thread's kernels are, or are not."""
    token = DEPENDENT.set(dependent)
    try:
        yield
    finally:
        DEPENDENT.reset(token)
