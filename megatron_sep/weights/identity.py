"""Which weights lie at a place: what is kept of a measurement is an answer for these alone."""

import hashlib
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_sep.files import sha256
from megatron_sep.weights.open_source import SourceError
from megatron_sep.weights.sealed import is_checkpoint, seal_of

WEIGHTS = "weights"
"""Key of what is kept of a measurement: the sum of the weights that were measured."""
_LOADED = (
    *("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
)
"""Files of a Hugging Face directory that a loaded model depends on; what is written beside them changes nothing."""
_WHOLE = 2**30
"""Bytes of a directory that are read, in about a second: its smallest files."""
_PIECES, _PIECE = 64, 16 * 2**10
"""Of a file beyond those: how many pieces are read, and how many bytes each has."""


def weights_sum(place: Path) -> str:
    """SHA-256 of what tells the weights of a checkpoint or a Hugging Face directory from any others, in hexadecimal.

    Of a checkpoint it is the seal, thus the content of every file and all settings; whether the files fit it is for
    who opens the checkpoint. Of a Hugging Face directory it is made of the files that loading reads, tokenizer and
    settings too. The smallest of them, up to 1 GiB together, count with their content and nothing else; of one beyond,
    so that 100 GB cost no more than 1, count size, time of change and 64 pieces of 16 KiB, its begin and end among
    them. So a copy of so large a directory with times of its own counts as other weights, though it has none; and what
    is not noticed is a file beyond that was changed between the pieces alone, and put back under its old time.

    Raises SourceError where no such file is there, OSError.
    """
    if is_checkpoint(place):
        return seal_of(place)
    loaded = (path for path in place.iterdir() if path.is_file() and _is_loaded(path))
    sizes = sorted((path.stat().st_size, path.name) for path in loaded)
    if not sizes:
        raise SourceError(f"{place}: has no manifest.json, and none of {', '.join(_LOADED)}; name a model's directory")
    ends = accumulate(size for size, _ in sizes)
    records = [(name, _content(place / name, end <= _WHOLE)) for (_, name), end in zip(sizes, ends, strict=True)]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def short(weights: Any) -> str:
    """The begin of a sum of weights, for people."""
    return str(weights)[:12]


def _is_loaded(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in _LOADED)


def _content(path: Path, whole: bool) -> Any:
    if whole:
        return sha256(path)
    status, pieces = path.stat(), hashlib.sha256()
    for piece in _pieces(path, status.st_size):
        pieces.update(piece)
    return status.st_size, status.st_mtime_ns, pieces.hexdigest()


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number in range(_PIECES):
            file.seek(number * max(0, size - _PIECE) // (_PIECES - 1))
            yield file.read(_PIECE)
