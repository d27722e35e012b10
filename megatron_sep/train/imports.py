"""What was imported is no garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_kept() -> Iterator[None]:
    """Leave all that is there now out of garbage collections, until the end of the block.

    megatron-core collects at each save, a third of a second over the 700,000 objects of what a training imports. They
    are given back afterwards: an interpreter that ends without collecting them has libraries complain of leaks.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
