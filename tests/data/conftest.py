"""Small data that every test of the data package can make."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_sep.data.shards import Shard, write_shards
from megatron_sep.data.tokenizer import train_tokenizer

MakeShard = Callable[..., Shard]

SENTENCES = (
    "The cat sat, as cats do; the dog barked!",
    "Is this it?\tYes: it is.\n",
    "Numbers such as 12, 34 and 5678 stand in lines.\nAnd lines end.\n\n",
    "Ünïcödé is text too — “quoted”.\n",
)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(SENTENCES * 20, 400, path)
    return path


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeShard:
    """Write a shard whose token at stream offset i is i modulo ``vocab_size``, or the documents given."""

    def make(lengths: list[int], name: str = "shard", vocab_size: int = 50_000, first: int = 0) -> Shard:
        stream = np.arange(first, first + sum(lengths)) % vocab_size
        return write_shards(tmp_path / name, np.split(stream, np.cumsum(lengths)[:-1]), vocab_size)

    return make
