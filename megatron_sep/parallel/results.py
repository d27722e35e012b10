"""Where megatron-core's writers of checkpoints leave what they wrote: in this process.

megatron-core starts a process of its own for that queue, which costs seconds at the first save and outlives a
process that is killed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def results_into(results: Any) -> Iterator[None]:
    """Within it a save takes ``results`` for its queue."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = filesystem_async._results_queue
    filesystem_async._results_queue = results
    try:
        yield
    finally:
        filesystem_async._results_queue = before
