import contextlib
from collections.abc import Callable
from typing import Any


def get_cpu_offload_context(*_: Any) -> tuple[contextlib.AbstractContextManager[None], Callable[[Any], Any]]:
    """Of no offloading."""
    return contextlib.nullcontext(), lambda tensor: tensor
