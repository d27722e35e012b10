"""Make the quickstart's tokenizer and shard from text that every Python brings: manual pages, docstrings, sources.

python -m megatron_sep.prepare.quickstart runs/quickstart
"""

import ast
import json
import pydoc_data.topics
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_sep.data.tokenizer import train_tokenizer
from megatron_sep.files import written_aside
from megatron_sep.prepare.prepare import tokenize_files

VOCAB_SIZE = 2048
SOURCE_BYTES = 300_000
SHORTEST = 200


def manual_pages() -> Iterator[str]:
    """The pages of Python's `help()`."""
    yield from pydoc_data.topics.topics.values()


def modules() -> Iterator[str]:
    """The sources of the standard library's top-level modules."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and functions."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield text


def documents() -> Iterator[str]:
    """Manual pages, docstrings, and as many whole sources as fit in SOURCE_BYTES."""
    yield from manual_pages()
    left = SOURCE_BYTES
    for source in modules():
        yield from docstrings(source)
        if len(source) <= left:
            left -= len(source)
            yield source


def make_corpus(out: Path) -> None:
    """Write corpus.jsonl, tokenizer.json and the shard corpus into a folder, unless they are there, and say so."""
    corpus, tokenizer, manifest = out / "corpus.jsonl", out / "tokenizer.json", out / "corpus.manifest.json"
    if manifest.is_file():
        print(f"{manifest}: is there already")
        return
    texts = shuffled_documents()
    if not corpus.is_file():  # what a killed run has finished stays: its tokens are of these very files
        write_corpus(texts, corpus)
    if not tokenizer.is_file():
        train_tokenizer(texts, VOCAB_SIZE, tokenizer)
    made = tokenize_files([corpus], tokenizer, out / "corpus")
    print(f"{out / 'corpus'}: {made['documents']['written']} documents, {made['tokens']:,} tokens")


def shuffled_documents() -> list[str]:
    """In an order in which the last documents, which are the validation split, are like the others."""
    texts = list(documents())
    random.Random(0).shuffle(texts)
    return texts


def write_corpus(texts: list[str], path: Path) -> None:
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_corpus(Path(sys.argv[1]))
