"""The engine is an interface: another one takes a class and a row, and everything around it holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.engines import PlainEngine

from megatron_sep.config import RunConfig
from megatron_sep.config.engines import ENGINES
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl
from megatron_sep.weights.open_source import SourceError, open_source
from megatron_sep.weights.sealed import CheckpointError, describe, fault_of, newest_verified

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def plain(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """Configurations that train with PlainEngine."""
    monkeypatch.setitem(ENGINES, PlainEngine.name, f"{PlainEngine.__module__}:PlainEngine")

    def make(**sections: Any) -> RunConfig:
        return tiny(**sections | {"parallel": {"engine": PlainEngine.name}})

    return make


def train(config: RunConfig) -> list[dict[str, float]]:
    from megatron_sep.train.loop import train as loop
    from megatron_sep.train.run import build_run

    loop(build_run(config, topology()))
    return [line for line in read_jsonl(config.dir / "metrics.jsonl") if "train/loss" in line]


def test_a_second_engine_trains_as_the_first(
    plain: Callable[..., RunConfig], tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The same data, weights, schedule and losses from two implementations of AdamW, within 1e-4 after 8 steps."""
    settings = {"optimizer": {"weight_decay": 0.0}}
    first = train(tiny(dir=str(tmp_path / "megatron"), **settings))
    second = train(plain(dir=str(tmp_path / "plain"), **settings))
    assert len(first) == len(second) == 8
    for a, b in zip(first, second, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-3)


def test_its_checkpoints_are_sealed_and_resumed(plain: Callable[..., RunConfig], tmp_path: Path) -> None:
    """8 steps at once equal 4 steps and 4 more; the manifest names the engine, every file has its sum."""
    straight = train(plain(dir=str(tmp_path / "straight")))
    short = plain(dir=str(tmp_path / "cut"), train={"steps": 4}, optimizer={"decay_steps": 8})
    train(short)
    cut = train(plain(dir=str(tmp_path / "cut")))
    assert [line["train/loss"] for line in cut] == [line["train/loss"] for line in straight]
    newest = newest_verified(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    assert describe(newest).engine == "plain"
    assert list(json.loads((newest / "manifest.json").read_text())["files"]) == ["plain.pt"]
    (newest / "plain.pt").write_bytes(b"other")
    assert "plain.pt" in (fault_of(newest) or "")


def test_an_engine_is_not_given_another_ones_checkpoint(
    plain: Callable[..., RunConfig], tiny: Callable[..., RunConfig]
) -> None:
    """Resuming with another engine, and reading weights that no reader knows, name the engine and the way out."""
    config = plain()
    train(config)
    with pytest.raises(CheckpointError, match=r"was written by the engine 'plain', parallel.engine is 'megatron'; set"):
        train(tiny())
    with pytest.raises(SourceError, match=r"written by the engine 'plain'; weights are read from those of weights, m"):
        open_source(config.dir)
