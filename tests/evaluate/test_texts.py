"""Texts are told to be wrong before a model's weights are read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sep.data.samples import DataError
from megatron_sep.data.shards import manifest_path, write_shards
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.evaluate.texts import EvaluationError, Known, know, read_ids
from megatron_sep.weights.open_source import SourceError


@pytest.fixture
def known(tokenizer_path: Path) -> Known:
    return Known(load_tokenizer(tokenizer_path), 400, 64, Path())


def test_text_and_shard_are_the_same_ids(known: Known, tmp_path: Path) -> None:
    """JSON lines, compressed too, and the shard of the same documents."""
    zstandard = pytest.importorskip("zstandard", reason="needs zstandard: the extra `data`")
    texts = ["The cat sat, as cats do.", "Is this it?"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "text.jsonl").write_bytes(lines)
    (tmp_path / "text.jsonl.zst").write_bytes(zstandard.compress(lines))
    eod, ids = known.tokenizer.eod_id, [known.tokenizer.encode(text) for text in texts]
    write_shards(tmp_path / "shard", [[*ids[0], eod], ids[1]], 400)
    expected = torch.tensor([*ids[0], eod, *ids[1]])
    for name in ("text.jsonl", "text.jsonl.zst", "shard"):
        assert torch.equal(read_ids(tmp_path / name, known), expected)
        assert torch.equal(read_ids(tmp_path / name, known, 5), expected[:5])


def test_wrong_texts_are_named(known: Known, tmp_path: Path) -> None:
    """Missing, too short, of ids that the model does not know, of another tokenizer."""
    with pytest.raises(EvaluationError, match=r"none: no such file, and no none\.idx beside it"):
        read_ids(tmp_path / "none", known)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat.")
    with pytest.raises(EvaluationError, match=r"text\.txt: has \d+ tokens, 1,000 are asked for"):
        read_ids(text, known, 1000)
    with pytest.raises(EvaluationError, match=r"holds the token \d+, the model's embedding has 20 rows"):
        read_ids(text, replace(known, rows=20))
    write_shards(tmp_path / "shard", [[1, 2, 3]], 400)
    receipt = {"settings": {"tokenizer": {"path": "other.json"}}, "tokenizer": {"sha256": "0" * 64}}
    manifest_path(tmp_path / "shard").write_text(json.dumps(receipt))
    with pytest.raises(DataError, match=r"was made with the tokenizer other\.json"):
        read_ids(tmp_path / "shard", known)


def test_a_tokenizer_of_another_model(tokenizer_path: Path, tmp_path: Path) -> None:
    """Ordinary tokens beyond the embedding, a model without a tokenizer, and files that describe no model."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300, "max_position_embeddings": 64}))
    with pytest.raises(SourceError, match="has no tokenizer"):
        know(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    with pytest.raises(EvaluationError, match="from id 300 on that the model does not know"):
        know(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match=r"config\.json: does not describe a language model"):
        know(tmp_path)
