"""Measure what each choice of separators holds of real text, under a tokenizer and under one that merges as Llama-3's.

The second is a byte-level BPE with Llama-3's splitting, trained on TRAIN and saved to OUT; where OUT is there already,
it is read. Its ids are its own, so Llama-3's lists are taken by their texts: the tokens that are spelled so.

python tools/separator_density.py TOKENIZER OUT --train TRAIN ... --text TEXT ...
"""

import argparse
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_sep.attention.cut import measure
from megatron_sep.attention.separator_lists import LISTS
from megatron_sep.attention.separators import (
    PAPER_SEPARATORS,
    SeparatorError,
    list_ids,
    merged_separators,
    separator_ids,
)
from megatron_sep.data.tokenizer import DEFAULT_EOD, Tokenizer, load_tokenizer
from megatron_sep.files import written_aside
from megatron_sep.prepare.readings import expand
from megatron_sep.prepare.text import Limits, read_documents

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
NUMBERS = r"\p{N}{1,3}"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3_SPLITTING = "|".join((CONTRACTIONS, WORDS, NUMBERS, PUNCTUATION, BLANKS))
"""Unlike GPT-NeoX's, it leaves newlines with the punctuation before them, and runs of them together."""
BATCH = 64
Choices = dict[str, Sequence[int]]
"""Ids by what a configuration writes for them."""


def texts_of(paths: Sequence[str], option: str) -> Iterator[str]:
    limits = Limits(on_bad="skip")
    return (document.text for file in expand(paths, option) for document in read_documents(file, limits))


def train(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Save a byte-level BPE with Llama-3's splitting."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library: Any = Library(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3_SPLITTING), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[DEFAULT_EOD[0]], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    with written_aside(path) as aside:
        library.save(str(aside))


def lists_by_id(tokenizer: Tokenizer) -> Choices:
    """The lists that are for this tokenizer."""
    found: Choices = {}
    for name in LISTS:
        with suppress(SeparatorError):
            found[name] = list_ids(name, tokenizer)
    return found


def lists_by_text(tokenizer: Tokenizer) -> Choices:
    """Llama-3's lists, as far as this vocabulary has tokens that are spelled so."""
    texts = [tokenizer.decode([number]) for number in range(tokenizer.vocab_size)]
    return {
        name: [number for number, text in enumerate(texts) if text in chosen.texts.values()]
        for name, chosen in LISTS.items()
        if chosen.tokenizer == "Llama-3"
    }


def choices(tokenizer: Tokenizer, lists: Choices) -> Choices:
    nine = separator_ids(PAPER_SEPARATORS, tokenizer)
    return {"default": nine, **lists, "{texts: default, merged: true}": [*nine, *merged_separators(tokenizer)]}


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    """The ids of each document, in little memory."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield from (array("i", ids) for ids in tokenizer.encode_batch(batch))
            batch = []
    yield from (array("i", ids) for ids in tokenizer.encode_batch(batch))


def table(text: str, tokenizer: Tokenizer, lists: Choices) -> Iterator[str]:
    documents = list(encoded(texts_of([text], "--text"), tokenizer))
    yield f"\n{text} under {tokenizer.path}: {sum(map(len, documents)):,} tokens\n"
    yield "| separators | ids | density | coverage | largest gap | missed most |"
    yield "|---|---|---|---|---|---|"
    for name, ids in choices(tokenizer, lists).items():
        cut = measure(documents, ids, tokenizer)
        missed = " ".join(f"`{tokenizer.decode([token])!r}`" for token in cut.missed[:4])
        yield f"| `{name}` | {len(ids)} | {cut.density:.1%} | {cut.coverage:.1%} | {cut.largest_gap:,} | {missed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json, GPT-NeoX's for example")
    parser.add_argument("out", type=Path, help="tokenizer.json that is trained, or was")
    parser.add_argument("--train", nargs="+", default=(), help="text to train it on: files, folders or globs")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--text", nargs="+", required=True, help="text to measure on; a table for each")
    options = parser.parse_args()
    if not options.out.exists():
        if not options.train:
            parser.error(f"{options.out}: is not there; pass --train, text to train it on")
        train(texts_of(options.train, "--train"), options.vocab_size, options.out)
    for path, lists_of in ((options.tokenizer, lists_by_id), (options.out, lists_by_text)):
        tokenizer = load_tokenizer(path)
        for text in options.text:
            for line in table(text, tokenizer, lists_of(tokenizer)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
