"""Steps of one GPU that were measured, which plans are held to: the rows of the files in tests/config/measured.

A file has `date`, `gpu` as torch calls it, the `command`, and `rows` as tools/bench_sizes.py writes them: `name` (full
or sep), `ms`, `memory_gib` (null: not measured), `model`, `sequences`; of tools/bench_training.py, `layers`, `width`,
`heads` and `shape` in the place of the last two.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sep.config.gpus import GPUS
from megatron_sep.config.load import read_tree
from megatron_sep.config.schema import RunConfig

FOLDER = Path(__file__).parents[1] / "config" / "measured"
VOCAB = 50304
SEPARATOR_SHARE = 0.15
"""Of both programs, as their window of 64 and 4 sinks are."""
_SEP = {"window": 64, "sinks": 4, "separators": "default"}


@dataclass(frozen=True)
class Measured:
    """One step."""

    kind: str
    """Of the GPU, as `plan --gpu` names it."""
    config: RunConfig
    milliseconds: float
    gib: float | None
    """The most that the allocator took."""

    def __str__(self) -> str:
        model, train = self.config.model, self.config.train
        kind = "full" if self.config.attention.window is None else "sep"
        shape = f"{train.micro_batch_size}x{model.sequence_length}"
        return f"{self.kind} {model.num_layers}x{model.hidden_size} {shape} {kind}"


def measured_steps() -> Iterator[Measured]:
    """Of all files, in the order of their names."""
    for file in sorted(FOLDER.glob("*.json")):
        tree = json.loads(file.read_text())
        kind = next(kind for kind, gpu in GPUS.items() if tree["gpu"].endswith(gpu.name))
        assert tree["date"], f"{file}: has no date"
        assert tree["command"].startswith("python tools/"), f"{file}: has no command"
        for row in tree["rows"]:
            yield Measured(kind, _config(row), row["ms"], row["memory_gib"])


def _config(row: dict[str, Any]) -> RunConfig:
    if "model" in row:
        model, sequences = read_tree(Path(f"models/{row['model']}"))["model"], row["sequences"]
        model = {key: model[key] for key in ("num_layers", "hidden_size", "num_attention_heads")}
    else:
        sequences, length = map(int, row["shape"].split("x"))
        model = {"num_layers": row["layers"], "hidden_size": row["width"], "num_attention_heads": row["heads"]}
        model["sequence_length"] = length
    return RunConfig.model_validate(
        {
            "dir": "run",
            "tokenizer": {"path": "none"},
            "data": {"path": "none"},
            "model": model | {"vocab_size": VOCAB},
            "attention": _SEP if row["name"].startswith("sep") else {},
            "train": {"micro_batch_size": sequences, "global_batch_size": sequences},
        }
    )
