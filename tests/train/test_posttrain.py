"""A trained model changes its attention and goes on: the loss jumps and comes back."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sep.config import RunConfig
from megatron_sep.convert.run import convert
from megatron_sep.train.checkpoint import CheckpointError
from megatron_sep.train.metrics import read_jsonl
from megatron_sep.train.start import StartError

pytestmark = pytest.mark.usefixtures("single_process")

WIDE = {"model": {"num_layers": 3}, "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "warmup": 0.05}}


def train_here(config: RunConfig) -> None:
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    train(build_run(config))


def valid(config: RunConfig) -> list[float]:
    return [line["valid/loss"] for line in read_jsonl(config.dir / "metrics.jsonl") if "valid/loss" in line]


@pytest.fixture(scope="module")
def themes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose documents each keep to four words of forty: earlier sentences tell which."""
    from megatron_sep.data.shards import write_shards
    from megatron_sep.data.tokenizer import train_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=4)) for _ in range(40)]

    def document() -> str:
        theme = draw.sample(words, 4)
        return "".join(" ".join(draw.choices(theme, k=3)) + draw.choice(".,;") + " " for _ in range(24))

    texts = [document() for _ in range(400)]
    folder = tmp_path_factory.mktemp("themes")
    tokenizer = train_tokenizer(texts, 400, folder / "tokenizer.json")
    write_shards(folder / "corpus", [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts], 400)
    return folder


@pytest.fixture
def run(tiny: Callable[..., RunConfig], themes: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes runs on ``themes``."""

    def make(name: str, **sections: Any) -> RunConfig:
        shared = {"tokenizer": {"path": str(themes / "tokenizer.json")}, "data": {"path": str(themes / "corpus")}}
        return tiny(**WIDE | shared | {"dir": str(tmp_path / name)} | sections)

    return make


def test_converted_weights_start_a_run_at_a_step(run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """From a Hugging Face directory: the same first loss, a new optimizer, and schedule and data of the given step."""
    first = run("first", train={"steps": 4, "eval_every": 4})
    train_here(first)
    convert(first.dir, tmp_path / "theirs")
    counts = {"steps": 6, "eval_every": 2}
    for source in (first.dir, tmp_path / "theirs"):
        go_on = run(f"from {source.name}", train=counts, checkpoint={"init_from": str(source), "init_step": 4})
        train_here(go_on)
        lines = read_jsonl(go_on.dir / "metrics.jsonl")
        assert valid(go_on)[0] == pytest.approx(valid(first)[-1], rel=1e-6)
        assert [line["step"] for line in lines if "train/loss" in line] == [5, 6]
        assert [line["train/consumed"] for line in lines if "train/loss" in line] == [40, 48]
        train_here(go_on)  # it is done, and starts nothing anew


def test_what_does_not_fit_is_refused_before_training(run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Another shape, another tokenizer, a vocabulary too small for the tokenizer, and a directory that is not there."""
    from megatron_sep.train.run import build_run

    vanilla = run("vanilla", train={"steps": 1, "eval_every": 0})
    train_here(vanilla)
    theirs = tmp_path / "theirs"
    convert(vanilla.dir, theirs)

    def refused(message: str, source: Path, **sections: Any) -> None:
        with pytest.raises((StartError, CheckpointError), match=message):
            build_run(run("again", checkpoint={"init_from": str(source)}, **sections))
        assert not (tmp_path / "again" / "checkpoints").exists()

    refused(
        "model.num_attention_heads is 4 there and 8 here", theirs, model={"num_layers": 3, "num_attention_heads": 8}
    )
    refused("no such directory", tmp_path / "nowhere")
    settings = json.loads((theirs / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (theirs / "tokenizer.json").write_text(json.dumps(settings))
    refused("which the weights were trained with; set tokenizer.path to it", theirs)
