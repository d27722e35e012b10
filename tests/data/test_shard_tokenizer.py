"""A shard is read with the tokenizer that it was made with."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_sep.config.schema import DataConfig, ShardConfig
from megatron_sep.data.open_data import open_data
from megatron_sep.data.samples import DataError
from megatron_sep.data.shard_tokenizer import check_tokenizer, unknown_tokenizers
from megatron_sep.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_sep.prepare.prepare import tokenize_files

TEXTS = ["One two three. Four, five!", "Six seven; eight nine?"] * 40


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A prepared shard beside its tokenizer."""
    train_tokenizer(TEXTS, 300, tmp_path / "tokenizer.json")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenize_files([tmp_path / "text.jsonl"], tmp_path / "tokenizer.json", tmp_path / "shard", workers=1)
    return tmp_path / "shard"


def test_another_tokenizer_is_refused(made: Path, tmp_path: Path) -> None:
    """Same size, other merges: separators and ends would be other tokens. The message names both files."""
    other = tmp_path / "other.json"
    train_tokenizer([text[::-1] for text in TEXTS], 300, other)
    data = DataConfig(path=made, split=(1, 0, 0))
    assert open_data(data, "train", 16, load_tokenizer(tmp_path / "tokenizer.json"), 1).num_samples
    with pytest.raises(DataError, match=r"shard: was made with the tokenizer .*tokenizer\.json .*other\.json is ano"):
        open_data(data, "train", 16, load_tokenizer(other), 1)


def test_the_same_tokenizer_in_another_file_is_taken(made: Path, tmp_path: Path) -> None:
    """A copy, and a file of the same vocabulary that another program has written anew."""
    copy = shutil.copy(tmp_path / "tokenizer.json", tmp_path / "copy.json")
    check_tokenizer([ShardConfig(path=made)], Path(copy))
    rewritten = tmp_path / "rewritten.json"
    rewritten.write_text(json.dumps(json.loads((tmp_path / "tokenizer.json").read_text())))
    check_tokenizer([ShardConfig(path=made)], rewritten)


def test_a_shard_without_a_manifest_is_taken_and_said(made: Path, tmp_path: Path) -> None:
    """What is assumed of it is one line."""
    sources = [ShardConfig(path=made)]
    assert unknown_tokenizers(sources, tmp_path / "tokenizer.json") == []
    made.with_name("shard.manifest.json").unlink()
    check_tokenizer(sources, tmp_path / "tokenizer.json")
    (line,) = unknown_tokenizers(sources, tmp_path / "tokenizer.json")
    assert line.startswith(f"{made}: has no manifest that names its tokenizer; its ids are taken to be of")


def test_a_manifest_that_is_none_is_named(made: Path, tmp_path: Path) -> None:
    """Another file under its name is an error, not a shard of any tokenizer."""
    made.with_name("shard.manifest.json").write_text("[]")
    with pytest.raises(DataError, match=r"shard\.manifest\.json: is no manifest of a shard"):
        check_tokenizer([ShardConfig(path=made)], tmp_path / "tokenizer.json")
