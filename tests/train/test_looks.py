"""Shares of attention by kind of key are those of the model, and looking at them changes nothing in training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_sep.attention.key_kinds import KINDS, KeyKinds
from megatron_sep.attention.pattern import is_separator
from megatron_sep.config import RunConfig
from megatron_sep.config.mass import first_and_near
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.generate.load import load
from megatron_sep.generate.watched import attention_weights
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl

pytestmark = pytest.mark.usefixtures("single_process", "no_compilations")
OFF = {"eval_every": 0, "steps": 4}


def trained(config: RunConfig) -> tuple[list[dict[str, Any]], Any]:
    """The lines of a run and the run itself."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    run = build_run(config, topology())
    train(run)
    return read_jsonl(config.dir / "metrics.jsonl"), run


def looks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of looks at the attention."""
    return [line for line in lines if any(name.startswith("attention/mass/") for name in line)]


def weights_of(run: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for part in run.engine.decoders for weight in part.parameters()]


@pytest.mark.parametrize("compile_", ["off", "on"])
def test_training_is_the_same_to_the_bit(tiny: Callable[..., RunConfig], tmp_path: Path, compile_: str) -> None:
    """Losses, norms and weights with a look after every second step, under dropout, of a compiled layer too."""
    settings: dict[str, Any] = {
        "train": OFF | {"compile": compile_},
        "model": {"num_layers": 1, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "attention": {"full_layers": []},
    }
    plain, one = trained(tiny(**settings, dir=str(tmp_path / "plain")))
    looked, other = trained(tiny(**settings, dir=str(tmp_path / "looked"), metrics={"attention_mass_every": 2}))
    for name in ("train/loss", "train/grad_norm"):
        found, expected = ([(line["step"], line[name]) for line in lines if name in line] for lines in (looked, plain))
        assert len(found) == 4
        assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(other), strict=True))
    assert [line["step"] for line in looks(looked)] == [2, 4]
    assert all(line["time/attention_mass"] > 0 for line in looks(looked))


def test_shares_are_those_of_the_exported_model(tiny: Callable[..., RunConfig]) -> None:
    """As transformers' model under the same patterns computes them of the first rows; each group adds up to 1."""
    lines, run = trained(tiny(train=OFF, metrics={"attention_mass_every": 4}, attention={"sinks": 1}))
    (look,) = looks(lines)
    loaded = load(run.config.dir, torch.device("cpu"))
    (batch,) = run.train_data.first(1, 1)
    rules = loaded.rules()
    place_BT = torch.arange(64).expand_as(batch.ids_BT)
    separator_BT = is_separator(batch.ids_BT, rules.separators.separator_ids)
    for group, weights in zip(
        ("full", "sep"), attention_weights(loaded.model, list(rules.patterns), batch.ids_BT), strict=True
    ):
        *paid, counted = KeyKinds(1, 8).paid(weights, place_BT, separator_BT, range(64)).tolist()
        assert counted == 2 * 4 * (64 - 9)
        found = [look[f"attention/mass/{group}/{kind}"] for kind in KINDS]
        assert found == pytest.approx([share / counted for share in paid], abs=1e-5)
        assert sum(found) == pytest.approx(1, abs=1e-6)
    assert look["attention/mass/sep/rest"] == 0, "a Sep layer sees nothing else"
    assert look["attention/mass/full/rest"] > 0


def test_chunks_of_queries_and_documents(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A few queries at a time give what all at once give, with ALiBi and packed documents too."""
    from megatron_sep.train import attention_mass

    config = tiny(
        train=OFF | {"steps": 1}, metrics={"attention_mass_every": 1}, attention={"document_boundaries": True},
        model={"position": {"kind": "alibi"}},
    )  # fmt: skip
    lines, run = trained(config)
    (look,) = looks(lines)
    monkeypatch.setattr(attention_mass, "_SCORES", 5000)
    again = run.mass.values(run.train_data, 1)
    assert again == {name: pytest.approx(look[name], abs=1e-6) for name in again}
    assert len(again) == 8


def test_full_attention_is_told_by_the_kinds_of_n64(tiny: Callable[..., RunConfig]) -> None:
    """Without a pattern: 3 first tokens, the paper's separators, 64 neighbours, of all layers."""
    assert first_and_near(AttentionConfig()) == (3, 64)
    lines, _ = trained(
        tiny(
            train=OFF | {"steps": 1},
            metrics={"attention_mass_every": 1},
            model={"sequence_length": 128},
            attention={"window": None, "full_layers": [], "separators": [], "sinks": 0},
        )
    )
    (look,) = looks(lines)
    assert {name.split("/")[2] for name in look if name.startswith("attention/mass/")} == {"full"}
    assert look["attention/mass/full/separators"] > 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"parallel": {"context": 2}}, "parallel.context=2"),
        ({"model": {"self_adjusting_softmax": {}}}, "model.self_adjusting_softmax"),
        ({"model": {"sequence_length": 8}}, "no query of model.sequence_length=8"),
    ],
)
def test_what_cannot_be_told_is_refused(tiny: Callable[..., RunConfig], settings: dict[str, Any], why: str) -> None:
    """By name, before anything is built; without the setting the same configuration stands."""
    tiny(**settings)
    with pytest.raises(ValidationError, match=why) as refused:
        tiny(**settings, metrics={"attention_mass_every": 5})
    assert "metrics.attention_mass_every=5" in str(refused.value)


def test_an_engine_that_does_not_show_its_layers_is_named(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step."""
    from megatron_sep.train.engine import Engine, EngineError
    from megatron_sep.train.megatron_engine import MegatronEngine
    from megatron_sep.train.run import build_run

    monkeypatch.setattr(MegatronEngine, "decoders", Engine.decoders)
    with pytest.raises(EngineError, match=r"'megatron' does not show its layers; set metrics\.attention_mass"):
        build_run(tiny(metrics={"attention_mass_every": 1}), topology())
