"""Tells megatron-core whose Adam it works with; what happens to be installed has no say.

megatron-core decides when it is imported: Transformer Engine's Adam, else apex's, else torch's. It then builds
an optimizer of that class and, in checkpoints, looks for the number of the step where that library keeps it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer


@contextlib.contextmanager
def adam_of(library: str, kind: type[Optimizer]) -> Iterator[None]:
    """Within it megatron-core builds, saves and loads optimizers of this class, as ``library`` wants it.

    ``library`` is "torch", "apex" or "transformer_engine".
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        _changed(optimizer, Adam=kind, USING_PYTORCH_OPTIMIZER=library == "torch"),
        _changed(
            distrib_optimizer,
            Adam=kind,
            HAVE_APEX_OR_TE=library != "torch",
            USING_TE_OPTIMIZER=library == "transformer_engine",
            USING_APEX_OPTIMIZER=library == "apex",
        ),
    ):
        yield


@contextlib.contextmanager
def _changed(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
