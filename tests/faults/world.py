"""What all trials share: a corpus, a tokenizer, a tiny run, and what it gives when nothing happens to it."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from faults.verbs import NOTHING, Ended, Verb, call

STEPS, EVERY = 12, 3
"""Steps of the run, and steps between its checkpoints."""
EXACT = ("train/loss", "train/lr", "train/grad_norm", "train/consumed", "train/skipped", "train/loss_scale")
Numbers = list[dict[str, float]]

RUN: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "sequence_length": 32,
        "hidden_dropout": 0.1,
    },
    "attention": {"window": 8, "sinks": 2, "separators": "default", "full_layers": [0]},
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "eval_every": 0},
    "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup": 0.2},
    "checkpoint": {"every": EVERY},
    "metrics": {"every": 1},
}


@dataclass(frozen=True)
class World:
    """A folder with run.yaml, tokenizer.json, corpus.bin/.idx, and straight/, the run that nothing happened to."""

    folder: Path

    @property
    def straight(self) -> Path:
        return self.folder / "straight"

    @property
    def pair(self) -> Path:
        """The same run on two processes."""
        return self.folder / "pair"

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def words(self, run_dir: Path, *settings: str) -> list[str]:
        """Of `train`, for the run in another dir and with other settings."""
        return ["train", str(self.folder / "run.yaml"), f"dir={run_dir}", *settings]

    def start(
        self,
        run_dir: Path,
        *settings: str,
        before: Callable[[], None] | None = None,
        env: Mapping[str, str] = NOTHING,
    ) -> Verb:
        """Begin to train, or to go on."""
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        count = len(list(run_dir.parent.glob(f"{run_dir.name}-*.log")))
        log = run_dir.parent / f"{run_dir.name}-{count}.log"
        return Verb(log, *self.words(run_dir, *settings), before=before, env=env)

    def train(self, run_dir: Path, *settings: str, before: Callable[[], None] | None = None) -> Ended:
        """Train to the end."""
        return self.start(run_dir, *settings, before=before).wait()

    def copy(self, run_dir: Path) -> Path:
        """The finished run, to be damaged or continued: its checkpoints say what dir they are of, and may lie here."""
        shutil.copytree(self.straight, run_dir)
        return run_dir

    def config(self, run_dir: Path, *settings: str) -> Any:
        """The run's configuration."""
        from megatron_sep.config import load_config

        return load_config(self.folder / "run.yaml", [f"dir={run_dir}", *settings])


def make_world(folder: Path) -> World:
    """Write everything but ``pair``; the straight run is trained by the verb itself."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder)
    made = os.fork()
    if made == 0:
        try:
            _write_corpus(world)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(made, 0)[1]:
        raise RuntimeError(f"{folder}: the corpus could not be written")
    paths = {"dir": "unset", "tokenizer": {"path": str(world.tokenizer)}, "data": {"path": str(world.corpus)}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, **paths}))
    ended = call(folder / "straight.log", *world.words(world.straight))
    if ended.code:
        raise RuntimeError(f"the run that nothing happens to failed: {ended.text}")
    return world


def _write_corpus(world: World) -> None:
    from megatron_sep.data.shards import write_shards
    from megatron_sep.data.tokenizer import train_tokenizer

    random, words = Random(0), ["alpha", "beta", "gamma", "delta", "one", "two", "three", "is", "not", "more"]
    texts = [
        " ".join(random.choice(words) + random.choice(("", "", "", ",", ".", ";")) for _ in range(120))
        for _ in range(60)
    ]
    tokenizer = train_tokenizer(texts, 300, world.tokenizer)
    write_shards(world.corpus, [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts], 300)


def lines(run_dir: Path) -> list[dict[str, float]]:
    """The whole lines of a run's metrics that have a training loss."""
    path = run_dir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return [line for line in found if "train/loss" in line]


def numbers(run_dir: Path) -> Numbers:
    """What must be the same to the last bit, step by step."""
    return [{key: line[key] for key in ("step", *EXACT)} for line in lines(run_dir)]


def tensor_sums(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the files of the newest checkpoint that hold tensors: weights, both moments, loss scale."""
    newest = sorted((run_dir / "checkpoints").glob("step-????????"))[-1]
    files: dict[str, dict[str, str]] = json.loads((newest / "manifest.json").read_text())["files"]
    return {f"{newest.name}/{name}": file["sha256"] for name, file in files.items() if name.endswith(".distcp")}
