"""The pages of the documents, their blocks, and a folder in which those of a page can be run.

What a page names and a test does not have is stood in for by this rule, and nothing else is changed: `pythia-160m/`,
`pythia-1.4b/` and `llama-3-8b/` are tiny models of random weights, `20B_tokenizer.json` their tokenizer, `text/`,
`book.txt` and `prompts.txt` made-up sentences, `data/corpus` a shard of them, and `configs/`, `scripts/` and `tools/`
the repository's. The program, torchrun and sbatch are scripts of `support/standins`: behind `train` and `quickstart`
they put ``SMALL``, end `watch` once its page is there, start two processes for torchrun, and read what SLURM is given.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_sep.data.shards import write_shards
from megatron_sep.data.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
STANDINS = Path(__file__).parent / "standins"
PAGES = sorted(
    path
    for place in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "megatron_sep/**/README.md")
    for path in ROOT.glob(place)
)
SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=4 model.vocab_size=null model.vocab_multiple=1 "
    "model.sequence_length=128 train.steps=4 train.global_batch_size=4 train.micro_batch_size=2 train.precision=fp32 "
    "train.eval_every=2 train.eval_batches=1 checkpoint.every=2 metrics.every=1"
)
MARK = r"^(?:<!-- only read: (?P<needs>[^\n]+) -->\n)?"
BLOCK = re.compile(MARK + r"```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SENTENCES = (
    "The captain said that the sea was calm, and the sun was low; nobody answered.",
    "Is this the way to the harbour? It is: go down the hill, past the church.",
    'Once upon a time, there was a cat. "It sleeps," said the child!\n',
)
TEXT = "\n".join(sentence.replace("the ", f"the {number} ") for number in range(60) for sentence in SENTENCES)
SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Block:
    """Fenced text of a page."""

    language: str
    text: str
    needs: str | None
    """Why it is only read; None: it is run."""


def blocks(page: Path) -> list[Block]:
    """In their order."""
    return [Block(each["language"], each["text"], each["needs"]) for each in BLOCK.finditer(page.read_text())]


def commands(page: Path) -> Iterator[str]:
    """Lines of the page's blocks of bash, without comments; continued lines are one."""
    for block in blocks(page):
        if block.language == "bash":
            for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                if command := re.sub(r"(^|\s+)#.*", "", line).strip():
                    yield command


def own_files(page: Path) -> dict[str, str]:
    """Text of the YAML files that the page writes, by name: blocks that begin with `# NAME`."""
    named = [(block, re.match(r"# (\S+\.yaml)\n", block.text)) for block in blocks(page) if block.language == "yaml"]
    return {name[1]: block.text for block, name in named if name}


def furnish(folder: Path) -> None:
    """Put there what the pages name."""
    (folder / "text").mkdir()
    for name in ("configs", "scripts", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    for number in range(120):
        (folder / "text" / f"{number}.txt").write_text(f"Chapter {number}.\n{TEXT[:4000]}")
    (folder / "text" / "book.txt").write_text(TEXT)
    (folder / "book.txt").write_text(TEXT)
    (folder / "prompts.txt").write_text("The captain\nOnce upon a time,\n")
    torch.manual_seed(0)
    pythia = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE))
    for name in ("pythia-160m", "pythia-1.4b"):
        _save(pythia, folder / name, "<|endoftext|>")
    _save(LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SHAPE)), folder / "llama-3-8b", "<|end_of_text|>")
    (folder / "20B_tokenizer.json").write_text((folder / "pythia-160m" / "tokenizer.json").read_text())
    tokenizer = load_tokenizer(folder / "20B_tokenizer.json")
    write_shards(folder / "data" / "corpus", [[*tokenizer.encode(TEXT), tokenizer.eod_id]] * 200, tokenizer.vocab_size)


def _save(model: Any, folder: Path, end: str) -> None:
    model.save_pretrained(folder)
    path = folder / "tokenizer.json"
    train_tokenizer([TEXT], 400, path)
    path.write_text(path.read_text().replace("<|endoftext|>", end))
    PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=end).save_pretrained(folder)


def run_page(page: Path, folder: Path) -> str:
    """Run the blocks of a page in order, in ``folder``, which is the working directory. Returns what its commands said.

    Its own files are written first, wherever they stand on the page.
    """
    all_blocks = [block for block in blocks(page) if block.needs is None]
    write_own_files(page, folder)
    names: dict[str, Any] = {"__name__": page.stem}
    said = ""
    for block in all_blocks:
        if block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
        elif block.language == "bash":
            said += shell(block.text, folder)
    return said


def write_own_files(page: Path, folder: Path) -> None:
    """Each below ``folder``, under the name that it has on the page."""
    for name, text in own_files(page).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def shell(command: str, folder: Path) -> str:
    """What a command said that went well."""
    path = os.pathsep.join([str(STANDINS), str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", "SMALL": SMALL}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder, env=os.environ | ours, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout
