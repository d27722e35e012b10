"""A model split over two tensor-parallel processes computes what transformers computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.models import FUSED, MODELS


def test_logits_and_gradients_equal_transformers_on_two_processes(tmp_path: Path) -> None:
    """Every family and variant whose heads divide, one by fused rows too: logits and every gradient within 1e-5."""
    out = tmp_path / "differences.json"
    script = str(Path(__file__).with_name("parity_two_processes.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run(
        [*torchrun, script, str(out)],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = json.loads(out.read_text())
    assert found.keys() == {FUSED, *(name for name, config in MODELS.items() if config.key_value_heads % 2 == 0)}
    assert len(found) == 8
    for model, differences in found.items():
        config = MODELS["neox" if model == FUSED else model]
        weights = config.num_layers * (12 if config.biases else 6) + (4 if config.biases else 3 - config.tie_embeddings)
        assert len(differences) == 1 + weights, model
        worst = max(differences, key=lambda name: differences[name])
        assert differences[worst] < 1, (model, worst, differences[worst])
