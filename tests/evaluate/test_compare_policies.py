"""`tools/compare_policies.py` leaves a file that `reproduce` reads, and that names the weights it was measured with."""

import json
import subprocess
import sys
from pathlib import Path

from megatron_sep.reproduce.policies import read
from megatron_sep.weights.identity import weights_sum

TOOL = Path(__file__).parents[2] / "tools" / "compare_policies.py"


def test_a_comparison_names_its_weights(model_dir: Path, tmp_path: Path) -> None:
    """The sum is that of the model as it lies there; every policy is beside it."""
    out = tmp_path / "policies.json"
    (tmp_path / "book.txt").write_text("The cat sat, as cats do; the dog barked! Is this it? Yes: it is.\n" * 40)
    words = [model_dir, "--books", tmp_path, "--length", 64, "--prompt", 56, "--window", 8, "--out", out]
    done = subprocess.run([sys.executable, TOOL, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(out.read_text())
    assert entry["weights"] == weights_sum(model_dir)
    assert len(read(tmp_path)[str(model_dir)]) == 9
