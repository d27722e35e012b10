"""The GPU's quickstart, at a tiny size where there is none: from text to three lines of what was gained."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import full_run

ROOT = Path(__file__).parents[1]
TINY = (
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.sequence_length=512",
    "model.vocab_size=null", "attention.backend=auto", "train.precision=fp32", "train.steps=4",
    "train.global_batch_size=4", "train.micro_batch_size=2", "train.eval_batches=1", "metrics.every=1",
)  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script needs of the repository, with an environment that is set up already."""
    for name in ("scripts/quickstart_gpu.sh", "tools/gains.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "scripts" / "setup.sh").touch()
    return tmp_path


def start(checkout: Path, *words: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(checkout / "scripts" / "quickstart_gpu.sh"), *map(str, words)],
        cwd=checkout,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TEXTS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.skipif(not full_run(), reason="two trainings and a sample; run with --full")
def test_it_ends_with_what_was_gained(checkout: Path, corpus: Path, tmp_path: Path) -> None:
    """Corpus, both runs, sample, figures, and three lines whose numbers are positive; the cache is the smaller one."""
    line = json.dumps({"text": "alpha is not more than beta, and one is less than two. " * 20}) + "\n"
    (tmp_path / "text.jsonl").write_text(line * 200)
    done = start(checkout, corpus / "tokenizer.json", tmp_path / "text.jsonl", *TINY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = checkout / "runs" / "quickstart-gpu"
    training, cache, decoding = (run / "gains.txt").read_text().splitlines()
    assert done.stdout.endswith(f"{training}\n{cache}\n{decoding}\n")
    assert re.fullmatch(r"training: [\d,]+ tokens/s, [\d.]+ times full attention's [\d,]+", training)
    small, share, whole = re.fullmatch(
        r"cache: ([\d.]+) MiB a text of 512 tokens, 1/([\d.]+) of the full ([\d.]+)", cache
    ).groups()  # type: ignore[union-attr]
    assert 0 < float(small) < float(whole)
    assert float(share) > 1
    assert re.fullmatch(
        r"decoding 2 texts: [\d.]+ ms a step, [\d.]+ times as fast as the full cache's [\d.]+", decoding
    )
    assert (run / "figures" / "mass_sep.png").is_file()
    assert (run / "sample.txt").read_text().startswith("The")


def test_without_its_arguments_it_says_what_they_are(checkout: Path) -> None:
    """And a text that is not there is named."""
    done = start(checkout)
    assert (done.returncode, done.stdout) == (2, "")
    assert "quickstart_gpu.sh TOKENIZER TEXT" in done.stderr
    done = start(checkout, checkout / "none.json", checkout)
    assert done.returncode == 1
    assert "none.json" in done.stderr
