"""What the page about data names: text in several forms, test sets, sets in parts like the Pile's, and a run."""

import hashlib
import json
from pathlib import Path

import zstandard
from support.pages import TEXT

from megatron_sep.data.pile import split
from megatron_sep.data.shards import bin_path, write_shards
from megatron_sep.data.tokenizer import load_tokenizer, train_tokenizer

PILE = "pile_0.87_deduped_text_document"
RUN = """
extends: {configs}/runs/quickstart.yaml
model: {{sequence_length: 1024}}
tokenizer: {{path: tokenizer.json}}
data: {{path: data/corpus, order: samples, split: [1, 0, 0]}}
"""


def furnish_raw_text(folder: Path, configs: Path) -> None:
    """Below ``folder``, under the names on the page."""
    for name in ("text/books", "text/web", "eval/tasks", "pile", "whole", "runs"):
        (folder / name).mkdir(parents=True)
    train_tokenizer([TEXT], 400, folder / "tokenizer.json")
    for number in range(20):
        (folder / "text" / "books" / f"{number}.txt").write_text(f"Chapter {number}. {TEXT[number * 50 :][:4000]}")
    lines = [json.dumps({"text": f"Page {number}: {TEXT[number * 90 :][:500]}"}) for number in range(40)]
    (folder / "text" / "web" / "pages.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    (folder / "text" / "manual.txt").write_text("Turn the handle, and wait. The light is green.")
    question = {"question": "Which way is it to the harbour?", "text": "Down the hill."}
    (folder / "eval" / "tasks" / "ways.jsonl").write_text(json.dumps(question))
    (folder / "runs" / "my-run.yaml").write_text(RUN.format(configs=configs))
    for name in ("document", PILE):
        furnish_parts(folder, name)


def furnish_parts(folder: Path, name: str) -> None:
    """A set in three parts in pile/, and sums.txt, which knows what its parts are joined."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    documents = [[*tokenizer.encode(TEXT), tokenizer.eod_id]] * 9
    write_shards(folder / "whole" / name, documents, tokenizer.vocab_size)
    joined = bin_path(folder / "whole" / name).read_bytes()
    split(folder / "whole" / name, folder / "pile" / name, len(joined) // 3 + 1)
    sums = (folder / "pile" / f"{name}.sha256").read_text()
    (folder / "sums.txt").write_text(f"{sums}{hashlib.sha256(joined).hexdigest()}  {name}.bin\n")
