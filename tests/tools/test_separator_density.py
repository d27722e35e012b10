"""`tools/separator_density.py` trains a tokenizer that merges as Llama-3's does, and its table is what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sep.attention.cut import measure
from megatron_sep.attention.separators import PAPER_SEPARATORS, merged_separators, separator_ids
from megatron_sep.data.tokenizer import load_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "separator_density.py"
TEXT = '"Stay," he said.\n\nThey went ; and stayed 1234.\nNo. '


def density(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, words)], capture_output=True, text=True, timeout=120)


def rows(lines: list[str]) -> dict[str, list[str]]:
    """The cells of a table behind the first of each row."""
    cells = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return {name: rest for name, *rest in cells}


@pytest.fixture
def done(tokenizer_path: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT * 40)
    out = tmp_path / "out.json"
    done = density(tokenizer_path, out, "--train", tmp_path, "--vocab-size", 320, "--text", tmp_path / "text.txt")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.usefixtures("done")
def test_the_trained_tokenizer_splits_as_llama_3s(tmp_path: Path) -> None:
    """A mark and the newlines after it are one token; a number is cut after three digits, however often it stands."""
    tokenizer = load_tokenizer(tmp_path / "out.json")
    assert {".\n", ".\n\n", ',"', " ;"} <= set(merged_separators(tokenizer).values())
    assert [tokenizer.decode([number]) for number in tokenizer.encode("1234")] == ["123", "4"]


def test_the_table_is_what_measure_says(done: list[str], tmp_path: Path) -> None:
    """One for each tokenizer; the trained one has Llama-3's lists too. Of this text merged tokens miss nothing."""
    (first, second) = (place for place, line in enumerate(done) if " under " in line)
    given, trained = rows(done[first:second]), rows(done[second:])
    assert list(given) == ["default", "{texts: default, merged: true}"]
    assert list(trained) == ["default", "llama-3-training-free", "llama-3-streaming", "{texts: default, merged: true}"]
    tokenizer = load_tokenizer(tmp_path / "out.json")
    cut = measure([tokenizer.encode(TEXT * 40)], separator_ids(PAPER_SEPARATORS, tokenizer), tokenizer)
    assert trained["default"][:4] == ["9", f"{cut.density:.1%}", f"{cut.coverage:.1%}", str(cut.largest_gap)]
    assert trained["{texts: default, merged: true}"][2] == "100.0%"
    assert cut.coverage < 0.5


def test_without_text_to_train_on_it_says_so(tokenizer_path: Path, tmp_path: Path) -> None:
    """A tokenizer that is not there and nothing to train it on."""
    failed = density(tokenizer_path, tmp_path / "none.json", "--text", tmp_path)
    assert failed.returncode == 2
    assert "none.json: is not there; pass --train" in failed.stderr
