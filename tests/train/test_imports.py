"""What a training has imported is in no collection's way, and is given back."""

from pathlib import Path

from support.forked import run

PROGRAM = """
import gc
from megatron_sep.train.imports import imports_kept
gc.unfreeze()
try:
    with imports_kept():
        print(gc.get_freeze_count() > 100_000)
        raise KeyError
except KeyError:
    print(gc.get_freeze_count())
"""


def test_imports_are_kept_from_collections_until_the_end(tmp_path: Path) -> None:
    """However the training ends."""
    assert run("-c", PROGRAM, folder=tmp_path).stdout == "True\n0\n"
