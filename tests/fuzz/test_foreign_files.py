"""Whatever is in a file that somebody else made, reading it ends in a right result or in one message."""

from pathlib import Path

import pytest
from support.cases import full_run

from fuzz.bounded import fuzz
from fuzz.readers import READERS

INPUTS = 900 if full_run() else 12
"""Of each reader; 24 readers make 21,600 and 288."""


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    """No traceback, crash or hang, and no memory past twice the file, whatever bits, lengths or words have changed."""
    assert fuzz(READERS[name], tmp_path, range(INPUTS), name) == []
