"""From text files to a shard and its receipt."""

import json
from pathlib import Path

from megatron_sep.data.prepare import tokenize_files
from megatron_sep.data.shards import Shard
from megatron_sep.data.text import Limits
from megatron_sep.data.tokenizer import load_tokenizer


def test_files_become_documents_closed_by_the_end_token(tmp_path: Path, tokenizer_path: Path) -> None:
    """Each document decodes to its text and ends with the end-of-document token; the manifest counts them."""
    (tmp_path / "a.txt").write_text("The cat sat.\n")
    (tmp_path / "b.jsonl").write_text('{"text": "Is it?"}\n{"text": " "}\n{"text": "It is."}\n')
    manifest = tokenize_files(
        [tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer_path, tmp_path / "out", limits=Limits()
    )
    shard, tokenizer = Shard.open(tmp_path / "out"), load_tokenizer(tokenizer_path)
    texts = [tokenizer.decode(shard.document(i)[:-1].tolist()) for i in range(shard.num_documents)]
    assert texts == ["The cat sat.\n", "Is it?", "It is."]
    assert {shard.document(i)[-1] for i in range(3)} == {tokenizer.eod_id}
    assert manifest["documents"] == {"read": 4, "written": 3, "dropped": {"blank": 1}}
    assert json.loads((tmp_path / "out.manifest.json").read_text())["tokens"] == shard.num_tokens
