"""`tools/neox_census.py` counts files of GPT-NeoX that are taken, and names why the others are not."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\npos_emb: rotary\n"


def census(*trees: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "neox_census.py"), *map(str, trees)], capture_output=True, text=True
    )


def test_each_file_is_counted_and_each_refusal_has_its_reason(tmp_path: Path) -> None:
    """A model, a setup and a pattern alone are taken; of a refused file the first reason, and how many more."""
    folder = tmp_path / "tree" / "below"
    folder.mkdir(parents=True)
    (folder / "model.yml").write_text(MODEL)
    (folder / "setup.yml").write_text("save: checkpoints\nlog-dir: logs\n")
    (folder / "pattern.yml").write_text("streamingLLM: True\nprefill_local_window_size: 64\n")
    (folder / "experts.yml").write_text(MODEL + "num_experts: 4\n")
    (folder / "wrong.yml").write_text(MODEL + "amp: {}\nwarmup_iters: 5\n")
    said = census(tmp_path / "tree")
    assert said.returncode == 0
    assert f"| {tmp_path / 'tree'} | 5 | 3 | 2 |" in said.stdout.splitlines()
    assert "1: num_experts=4 is refused: a mixture of experts is another architecture" in said.stdout
    assert "below/wrong.yml (and 1 more)" in said.stdout


def test_a_directory_without_files_is_named(tmp_path: Path) -> None:
    said = census(tmp_path)
    assert said.returncode == 2
    assert f"no *.yml below {tmp_path}" in said.stderr
