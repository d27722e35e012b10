"""What a run reads, told apart by content, so that data may move and may not change."""

import hashlib
import json
from pathlib import Path

from megatron_sep.config.schema import DataConfig, TokenizerConfig
from megatron_sep.data.shards import bin_path, find_parts, idx_path

_BLOCK = 1 << 16
_BLOCKS = 64
"""Blocks of a file that are looked at, from its beginning to its end; a file of fewer is read whole."""


def contents(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, str]:
    """By the setting that names them: a sum of the sizes of the files and of blocks spread over each.

    Raises OSError, ShardError.
    """
    found = {"tokenizer.path": sum_of([tokenizer.path])}
    if data.instructions is not None:
        found["data.instructions.path"] = sum_of([data.instructions.path])
    elif data.path is not None:
        found["data.path"] = _shard(data.path)
    else:
        sources = [(_shard(source.path), source.weight) for source in data.blend]
        found["data.blend"] = hashlib.sha256(json.dumps(sources).encode()).hexdigest()
    return found


def _shard(prefix: Path) -> str:
    single = bin_path(prefix)
    return sum_of([idx_path(prefix), *([single] if single.exists() else find_parts(prefix))])


def sum_of(paths: list[Path]) -> str:
    """Of the sizes of files and of blocks spread over each. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            for start in _starts(size):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _starts(size: int) -> list[int]:
    if size <= _BLOCK * _BLOCKS:
        return list(range(0, size, _BLOCK))
    return [(size - _BLOCK) * number // (_BLOCKS - 1) for number in range(_BLOCKS)]
