"""Which weights lie at a place: what is kept of a measurement is an answer for these alone."""

import hashlib
import json
from collections.abc import Iterator
from fnmatch import fnmatch
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
"""Bytes of the largest file that is read whole, in about a second."""
_PIECES, _PIECE = 64, 16 * 2**10
"""Of a larger file: how many pieces are read, and how many bytes each has."""


def weights_sum(place: Path) -> str:
    """SHA-256 of what tells the weights of a checkpoint or a Hugging Face directory from any others, in hexadecimal.

    Of a checkpoint it is the seal, thus the content of every file and all settings; whether the files fit it is for
    who opens the checkpoint. Of a Hugging Face directory it is made of the files that loading reads, tokenizer and
    settings too: a file up to 1 GiB counts with its content and nothing else. Of a larger one, so that 100 GB cost no
    more than one file, count size, time of change and 64 pieces of 16 KiB, its begin and end among them. So a copy of
    large files with times of its own counts as other weights, though it is none; and what is not noticed is a large
    file that was changed between the pieces alone, and put back under its old time.

    Raises SourceError where no such file is there, OSError.
    """
    if is_checkpoint(place):
        return seal_of(place)
    files = sorted(path for path in place.iterdir() if path.is_file() and _is_loaded(path))
    if not files:
        raise SourceError(f"{place}: has no manifest.json, and none of {', '.join(_LOADED)}; name a model's directory")
    records = [(path.name, _content(path)) for path in files]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def short(weights: Any) -> str:
    """The begin of a sum of weights, for people."""
    return str(weights)[:12]


def _is_loaded(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in _LOADED)


def _content(path: Path) -> Any:
    status = path.stat()
    if status.st_size <= _WHOLE:
        return sha256(path)
    pieces = hashlib.sha256()
    for piece in _pieces(path, status.st_size):
        pieces.update(piece)
    return status.st_size, status.st_mtime_ns, pieces.hexdigest()


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number in range(_PIECES):
            file.seek(number * (size - _PIECE) // (_PIECES - 1))
            yield file.read(_PIECE)
