"""Make the quickstart's tokenizer and shard from the configuration classes of transformers: Python and plain English.

python -m megatron_sep.prepare.quickstart runs/quickstart

They are wherever the extra `hf` is, and one is much like the other: so a small model writes what looks like
another one after minutes.
"""

import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path

from megatron_sep.data.extras import MissingLibraryError
from megatron_sep.data.tokenizer import train_tokenizer
from megatron_sep.files import written_aside
from megatron_sep.prepare.prepare import tokenize_files

VOCAB_SIZE = 2048
LIBRARY = "transformers"


def documents() -> Iterator[str]:
    """Each module's text behind its licence. Raises MissingLibraryError."""
    library = importlib.util.find_spec(LIBRARY)
    if library is None or not library.submodule_search_locations:
        raise MissingLibraryError(
            f"{LIBRARY} is not installed, from whose sources the quickstart learns; pip install megatron_sep[hf]"
        )
    models = Path(library.submodule_search_locations[0]) / "models"
    for path in sorted(models.glob("*/configuration_*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        yield "\n".join(dropwhile(lambda line: not line or line.startswith("#"), lines)) + "\n"


def make_corpus(out: Path) -> None:
    """Write corpus.jsonl, tokenizer.json and the shard corpus into a folder, unless they are there, and say so.

    Raises MissingLibraryError.
    """
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
