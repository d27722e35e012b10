"""Whether a shard was made with the tokenizer that reads it: with another one separators and ends would be wrong."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megatron_sep.config.schema import ShardConfig
from megatron_sep.data.samples import DataError
from megatron_sep.data.shards import manifest_path
from megatron_sep.data.tokenizer import same_tokenizer
from megatron_sep.files import read_json, sha256


class MadeWith(NamedTuple):
    """The tokenizer that a shard's manifest names."""

    path: Path
    """Where the file lay."""
    digest: str
    """Its SHA-256."""


def check_tokenizer(sources: Iterable[ShardConfig], tokenizer: Path) -> None:
    """Raise DataError for a shard whose manifest names another tokenizer; one without a manifest passes."""
    digest = sha256(tokenizer)
    for source in sources:
        made_with = _made_with(source.path)
        if made_with is not None and made_with.digest != digest and not _says_the_same(made_with, tokenizer):
            raise DataError(
                f"{source.path}: was made with the tokenizer {made_with.path} (SHA-256 {made_with.digest[:12]}), "
                f"tokenizer.path={tokenizer} is another one ({digest[:12]}): set tokenizer.path to it, or prepare the "
                "text with this one"
            )


def unknown_tokenizers(sources: Iterable[ShardConfig], tokenizer: Path) -> list[str]:
    """What is assumed of shards without a manifest."""
    return [
        f"{source.path}: has no manifest that names its tokenizer; its ids are taken to be of {tokenizer}"
        for source in sources
        if _made_with(source.path) is None
    ]


def _says_the_same(made_with: MadeWith, tokenizer: Path) -> bool:
    """Whether the file that the shard was made with is there still, and only written otherwise."""
    there = made_with.path.is_file() and sha256(made_with.path) == made_with.digest
    return there and same_tokenizer(made_with.path, tokenizer)


def _made_with(prefix: Path) -> MadeWith | None:
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        return MadeWith(Path(found["settings"]["tokenizer"]["path"]), str(found["tokenizer"]["sha256"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no manifest of a shard ({error!r}); remove it if it is another file") from error
