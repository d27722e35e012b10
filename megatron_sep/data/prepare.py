"""Text files and a tokenizer into one shard, with its manifest."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sep.data.manifest import manifest_path, sha256, versions, write_json
from megatron_sep.data.shards import bin_path, idx_path, write_shards
from megatron_sep.data.text import Limits, Tally, read_documents
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer


def tokenize_files(
    files: Sequence[Path], tokenizer: Path, prefix: Path, eod: str | None = None, limits: Limits | None = None
) -> dict[str, Any]:
    """Write the documents of ``files`` to PREFIX.bin and .idx, each closed by the end-of-document token.

    Returns the manifest, which PREFIX.manifest.json holds too. Raises TextError, TokenizerError or ShardError.
    """
    encoder, tally = load_tokenizer(tokenizer, eod), Tally()
    limits = limits or Limits()
    texts = (document.text for file in files for document in read_documents(file, limits, tally))
    shard = write_shards(prefix, _encoded(texts, encoder), encoder.vocab_size)
    manifest = {
        "documents": {"read": tally.read, "written": tally.kept, "dropped": dict(tally.dropped)},
        "tokens": shard.num_tokens,
        "tokenizer": {"path": tokenizer, "sha256": sha256(tokenizer), "eod_id": encoder.eod_id},
        "sources": [{"path": file, "sha256": sha256(file)} for file in files],
        "files": {path.name: sha256(path) for path in (bin_path(prefix), idx_path(prefix))},
        "versions": versions("megatron_sep", "tokenizers", "sentencepiece", "numpy"),
    }
    write_json(manifest_path(prefix), manifest)
    return manifest


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, 256)):
        yield from ([*ids, tokenizer.eod_id] for ids in tokenizer.encode_batch(batch))
