"""Small shards that every test of the data package can make."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_sep.data.shards import Shard, write_shards

MakeShard = Callable[..., Shard]


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeShard:
    """Write a shard whose token at stream offset i is i modulo ``vocab_size``."""

    def make(lengths: list[int], name: str = "shard", vocab_size: int = 50_000, first: int = 0) -> Shard:
        stream = np.arange(first, first + sum(lengths)) % vocab_size
        return write_shards(tmp_path / name, np.split(stream, np.cumsum(lengths)[:-1]), vocab_size)

    return make
