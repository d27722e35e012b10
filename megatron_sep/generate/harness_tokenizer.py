"""The tokenizer of a model as transformers has it, for libraries that take nothing else."""

from pathlib import Path
from typing import Any

from megatron_sep.data.tokenizer import Tokenizer
from megatron_sep.weights.open_source import SourceError


def transformers_tokenizer(model: Path, tokenizer: Tokenizer) -> Any:
    """That of a Hugging Face directory with its own settings, else ``tokenizer``, which gives the same ids.

    Raises SourceError for a sentencepiece model without such settings: transformers would add tokens of its own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (model / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if tokenizer.path.suffix != ".json":
        raise SourceError(
            f"{tokenizer.path}: lm-eval needs a tokenizer of transformers; put a tokenizer_config.json beside it, or "
            "convert the model and copy both there"
        )
    from megatron_sep.data.tokenizer import open_library

    end = tokenizer.decode([tokenizer.eod_id])
    return PreTrainedTokenizerFast(tokenizer_object=open_library(tokenizer.path), eos_token=end)
