"""Attention maps are what the model computes, and what goes to each kind of key adds up to all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.cli import app
from megatron_sep.config import RunConfig
from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.load import load
from megatron_sep.generate.watched import WatchedCache, attention_weights
from megatron_sep.parallel.groups import topology
from megatron_sep.reproduce.attention_mass import KINDS, SINKS, WINDOW, figure2, mass
from megatron_sep.reproduce.item import Inputs

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def run(tiny: Callable[..., RunConfig]) -> Path:
    """A trained SepLLM, H."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    config = tiny(train={"steps": 2, "eval_every": 0}, model={"num_layers": 3})
    train(build_run(config, topology()))
    return config.dir


def test_the_weights_are_those_of_the_attention(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights times values is the output of every layer, under its own pattern: 1e-5; hidden keys get nothing."""
    loaded = load(run, torch.device("cpu"))
    ids = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    patterns = list(loaded.rules().patterns)
    outputs: dict[int, Any] = {}
    attend = WatchedCache.attend

    def noted(self: WatchedCache, layer: int, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        out = attend(self, layer, q, k, v, *rest)
        outputs[layer] = (out, v)
        return out

    monkeypatch.setattr(WatchedCache, "attend", noted)
    before = loaded.model(ids).logits
    weights = attention_weights(loaded.model, patterns, ids)
    assert torch.equal(loaded.model(ids).logits, before), "the model is left as it was"
    for layer, pattern in enumerate(patterns):
        out, v = outputs[layer]
        assert torch.allclose(weights[layer] @ v.float(), out.float(), atol=1e-5)
        assert torch.allclose(weights[layer].sum(-1), torch.ones(2, 4, 40), atol=1e-5)
        hidden = ~pattern.plan(ids).dense()
        assert int(hidden.sum()) > 0
        assert float((weights[layer] * hidden[:, None]).max()) == 0


def test_key_heads_that_queries_share() -> None:
    """A Llama with two query heads for each key head: the weights are those that transformers itself computes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    ids = torch.randint(50, (2, 24))
    found = attention_weights(model, [AttentionPattern()] * 2, ids)
    for weights, expected in zip(found, model(ids, output_attentions=True).attentions, strict=True):
        assert torch.allclose(weights, expected, atol=1e-5)


def test_full_attention_of_a_known_query() -> None:
    """The watched attention of one layer against torch's, which computes no weights."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 30, 8, generator=generator) for _ in range(3))
    cache = WatchedCache([AttentionPattern()], vocab_size=10)
    cache.visible = (torch.ones(30, 30, dtype=torch.bool).tril()[None],)
    cache.begin(torch.zeros(1, 30, dtype=torch.int64))
    cache.attend(0, q, k, v, 8**-0.5)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(cache.weights[0] @ v, expected, atol=1e-5)
    with pytest.raises(AttachError, match="a softmax alone"):
        cache.attend(0, q, k, v, 1.0, object())  # type: ignore[arg-type]


def test_mass_of_a_map_that_is_known() -> None:
    """Uniform causal attention pays to each kind as many keys as it has; a key on a separator pays it all."""
    tokens = 60
    separator_T = torch.zeros(tokens, dtype=torch.bool)
    separator_T[[1, 20, 21]] = True
    uniform = torch.ones(tokens, tokens).tril()[None]
    uniform = uniform / uniform.sum(-1, keepdim=True)
    found = mass(uniform, separator_T)
    queries = range(SINKS + WINDOW, tokens)
    assert sum(found.values()) == pytest.approx(1)
    assert found["first tokens"] == pytest.approx(sum(SINKS / (i + 1) for i in queries) / len(queries))
    seps = sum(((i >= 20) + (i >= 21)) / (i + 1) for i in queries) / len(queries)
    assert found["separators"] == pytest.approx(seps)
    only = torch.zeros(1, tokens, tokens)
    only[:, :, 20] = 1
    assert mass(only, separator_T) == {name: float(name == "separators") for name in KINDS}


def test_figures_of_a_run(run: Path, tmp_path: Path) -> None:
    """`reproduce` writes pictures, Markdown and JSON; a layer that is not there is refused."""
    table = figure2(Inputs(checkpoints=(run,))).tables[0]
    assert len(table.rows) == 3
    assert all(0 < row.ours < 100 for row in table.rows if row.ours is not None)
    words = ["reproduce", "figure2", "figure14", "figure3", "--checkpoint", str(run), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"{stem}.{kind}" for stem in ("figure2", "figure3", "figure14-run") for kind in ("png", "svg")}
    assert names == pictures | {
        f"{item}.{kind}" for item in ("figure2", "figure3", "figure14") for kind in ("md", "json")
    }
    assert "| layer 0 |" in done.stdout
