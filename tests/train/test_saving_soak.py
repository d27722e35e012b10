"""Saving beside the steps, again and again, takes no more memory, threads or files than the first time."""

import json
from collections.abc import Callable
from pathlib import Path

from support.cases import full_run
from support.forked import run

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.weights.sealed import finished_checkpoints

STEPS = 2000 if full_run() else 100
"""With a save every ten."""


def test_memory_stays_flat_over_many_saves(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """200 saves in 2,000 steps (10 in 100 in the gate): in its second half memory grows by less than 15 MB."""
    config = tiny(train={"eval_every": 0}, checkpoint={"keep": 2}, metrics={"every": 50})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    out = tmp_path / "memory.json"
    script = Path(__file__).with_name("saving_soak.py")
    ended = run(script, tmp_path / "run.yaml", STEPS, out, folder=tmp_path, timeout=3600)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())
    assert len(found["bytes"]) == 10
    half, end = found["bytes"][4], found["bytes"][-1]
    assert end - half < 15e6, found
    assert found["threads"] < 12, found
    assert found["files"][-1] <= found["files"][4] + 2, found  # a save may be on its way
    assert [path.name for path in finished_checkpoints(config.dir / "checkpoints")] == [
        f"step-{STEPS - 10:08d}",
        f"step-{STEPS:08d}",
    ]
