"""The weights that a new run starts from, where they are not drawn."""

from pathlib import Path

from megatron_sep.config.schema import ModelConfig
from megatron_sep.data.tokenizer import same_tokenizer
from megatron_sep.weights.open_source import OpenedSource, SourceError, open_source


def open_first_weights(path: Path, model: ModelConfig, tokenizer: Path, tokens: int) -> OpenedSource:
    """``checkpoint.init_from``, once weights, tokenizer and vocabulary are seen to fit; ``tokens``: of the tokenizer.

    Raises SourceError, and what ``open_source`` raises.
    """
    source = open_source(path, model)
    if source.vocab_size < tokens:
        raise SourceError(
            f"{source.place}: its embedding has {source.vocab_size} rows, tokenizer.path={tokenizer} has "
            f"{tokens} tokens: use the tokenizer it was trained with"
        )
    if source.tokenizer is not None:
        _check_tokenizer(source.tokenizer, tokenizer)
    return source


def _check_tokenizer(theirs: Path, ours: Path) -> None:
    """Raise SourceError where two tokenizers give other ids to the same text."""
    if theirs.suffix == ours.suffix and theirs.is_file() and not same_tokenizer(theirs, ours):
        raise SourceError(
            f"tokenizer.path={ours} is not {theirs}, which the weights were trained with; set tokenizer.path to it"
        )
