"""Runs as training leaves them, with numbers that are known: settings in a manifest, losses in metrics.jsonl."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_sep.config import RunConfig
from megatron_sep.weights.sealed import Description, TrainState, checkpoint_name, write_manifest

VOCABULARY = 50304
STEPS, EVERY = 400, 20


def left_run(
    folder: Path,
    attention: dict[str, Any],
    *,
    gap: float = 0.0,
    step_seconds: float = 2.0,
    visible: float = 1.0,
    first: int = 0,
    last: int = STEPS,
    **sections: Any,
) -> Path:
    """A run whose loss is 3 + 4 exp(-step / 100) + ``gap``, with so many seconds a step and such a share visible.

    It has begun after step ``first``, and has come to step ``last``.
    """
    tree = {
        "dir": str(folder),
        "attention": attention,
        "tokenizer": {"path": "t.json"},
        "data": {"path": "corpus"},
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8},
    }
    config = RunConfig.model_validate(tree | sections)
    lines = []
    for step in range(first + EVERY, last + 1, EVERY):
        loss = 3 + 4 * math.exp(-step / 100) + gap
        rates = {"speed/step_seconds": step_seconds, "attention/visible": visible, "attention/separator_density": 0.125}
        lines += [{"step": step, "train/loss": loss, **rates}, {"step": step, "valid/loss": loss}]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = folder / "checkpoints" / checkpoint_name(STEPS)
    checkpoint.mkdir(parents=True)
    write_manifest(
        checkpoint, Description(TrainState(STEPS, STEPS * 8), config, VOCABULARY, "megatron", {}).record(1), {}
    )
    return folder
