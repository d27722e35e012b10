"""Texts to measure a model on, as token ids; whatever does not fit the model is told before its weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sep.config.schema import ShardConfig
from megatron_sep.data.shard_tokenizer import check_tokenizer
from megatron_sep.data.shards import Shard, idx_path
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.errors import UserError
from megatron_sep.files import read_json
from megatron_sep.generate.load import no_tokenizer
from megatron_sep.prepare.text import read_documents
from megatron_sep.weights.hugging_face import declared_end
from megatron_sep.weights.open_source import SourceError, open_source
from megatron_sep.weights.sealed import is_checkpoint, tokenizer_in


class EvaluationError(UserError):
    """Something that cannot be evaluated as asked."""


@dataclass(frozen=True)
class Known:
    """What is known of a model without its weights."""

    tokenizer: Tokenizer
    rows: int
    """Of its embedding: one more than the largest id that it takes."""
    trained_length: int
    """Tokens of a training sequence; 0: its files do not say."""
    place: Path
    """Of its weights: of a run's dir the newest checkpoint."""


def know(model: Path) -> Known:
    """Look at what ``load`` would load. Raises SourceError and what opening raises; EvaluationError for a tokenizer
    with ordinary tokens that the model has no row for."""
    tokenizer, eod, rows, length, place = _from_config(model) if _is_hugging_face(model) else _from_source(model)
    if tokenizer is None:
        raise no_tokenizer(model)
    opened = load_tokenizer(tokenizer, eod)
    beyond = [i for i in range(rows, opened.vocab_size) if i not in opened.special_ids]
    if beyond:
        raise EvaluationError(
            f"{tokenizer}: has {len(beyond):,} tokens from id {beyond[0]} on that the model does not know, its "
            f"embedding has {rows:,} rows; put the model's own tokenizer there"
        )
    return Known(opened, rows, length, place)


def _is_hugging_face(model: Path) -> bool:
    return (model / "config.json").is_file() and not is_checkpoint(model)


def _from_config(model: Path) -> tuple[Path | None, str | None, int, int, Path]:
    try:
        tree: dict[str, Any] = read_json(model / "config.json")
        text = tree | tree.get("text_config", {})
        length = int(text.get("max_position_embeddings") or 0)
        return tokenizer_in(model), declared_end(model), int(text["vocab_size"]), length, model
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{model / 'config.json'}: does not describe a language model: {error!r}") from error


def _from_source(model: Path) -> tuple[Path | None, str | None, int, int, Path]:
    source = open_source(model)
    if source.vocab_size is None:
        raise SourceError(f"{model}: does not say how many rows its embedding has")
    return source.tokenizer, source.eod, source.vocab_size, source.config.sequence_length, source.place


def read_ids(source: Path, known: Known, tokens: int | None = None) -> Tensor:
    """Ids of a file of text, as `prepare` reads them, or of a shard by its prefix: int64 [N] on the host.

    A document's end is the tokenizer's end-of-document token, between documents and not behind the last. ``tokens``:
    the first so many; None: all. Raises EvaluationError for a text that is shorter or holds ids that the model does not
    know, DataError for a shard of another tokenizer, TextError and ShardError.
    """
    ids_N = _of_shard(source, known, tokens) if idx_path(source).is_file() else _of_text(source, known, tokens)
    if tokens is not None and len(ids_N) < tokens:
        raise EvaluationError(f"{source}: has {len(ids_N):,} tokens, {tokens:,} are asked for; pass fewer")
    if len(ids_N) < 2:
        raise EvaluationError(f"{source}: has {len(ids_N)} tokens; nothing in it can be predicted from what is before")
    if int(ids_N.max()) >= known.rows:
        raise EvaluationError(
            f"{source}: holds the token {int(ids_N.max())}, the model's embedding has {known.rows:,} rows; the text "
            "was made for another model, or the tokenizer belongs to another one"
        )
    return ids_N


def _of_shard(prefix: Path, known: Known, tokens: int | None) -> Tensor:
    check_tokenizer([ShardConfig(path=prefix)], known.tokenizer.path)
    shard = Shard.open(prefix)
    stop = shard.num_tokens if tokens is None else min(tokens, shard.num_tokens)
    return torch.from_numpy(shard.tokens(0, stop).astype("int64"))


def _of_text(path: Path, known: Known, tokens: int | None) -> Tensor:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file, and no {idx_path(path).name} beside it; name a text or a shard")
    ids: list[int] = []
    for document in read_documents(path):
        ids += [*([known.tokenizer.eod_id] if ids else []), *known.tokenizer.encode(document.text)]
        if tokens is not None and len(ids) >= tokens:
            break
    return torch.tensor(ids[:tokens], dtype=torch.int64)
