"""Streams through a small model: what a table says is what the model does under that cache."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_sep.config import RunConfig
from megatron_sep.evaluate.perplexity import score
from megatron_sep.generate.load import load
from megatron_sep.parallel.groups import topology
from megatron_sep.reproduce import streams
from megatron_sep.reproduce.cache_sizes import sep
from megatron_sep.reproduce.item import Inputs, ReproduceError, Result
from megatron_sep.reproduce.items import ITEMS
from megatron_sep.reproduce.separator_choice import CHOICES, separator_ids, table16
from megatron_sep.reproduce.streams import (
    TABLE_5,
    TABLE_8,
    Measured,
    Stream,
    measure,
    read_tokens,
    side_by_side,
    streamed,
)
from megatron_sep.reproduce.write import write

pytestmark = pytest.mark.usefixtures("single_process")
CPU = torch.device("cpu")


@pytest.fixture
def run(tiny: Callable[..., RunConfig]) -> Path:
    """A model with random weights, of its first step."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    config = tiny(train={"steps": 1, "eval_every": 0}, optimizer={"warmup": 0})
    train(build_run(config, topology()))
    return config.dir


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("alpha beta, gamma two; one is. delta three? " * 60)
    return path


def test_perplexities_of_a_stream(run: Path, text: Path) -> None:
    """Everything kept is the plain model's loss, at each quarter; a bounded cache is another one and stays bounded."""
    loaded = load(run, CPU)
    ids = read_tokens(text, loaded.tokenizer, 120, "x")
    full = measure(loaded.model, TABLE_5[0].policy, ids)
    with torch.no_grad():
        losses = cross_entropy(loaded.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")[1:]
    quarters = [math.exp(float(losses[: round(q * len(losses))].mean())) for q in (0.25, 0.5, 0.75, 1)]
    assert full.perplexities == pytest.approx(quarters, rel=1e-4)
    assert full.seconds > 0
    ids_of = separator_ids(loaded, (".", ","))
    bounded = measure(loaded.model, Stream("x", sep(2, 4, 8, 20)).of(ids_of), ids)
    assert bounded.perplexities != pytest.approx(quarters, rel=1e-4)
    assert 12 < bounded.live < 20 < full.live
    assert full.live == pytest.approx(60, abs=1)


def test_streams_side_by_side(run: Path, text: Path) -> None:
    """Parts that are read together have the perplexities that each has alone, at each quarter, and the same caches."""
    loaded = load(run, CPU)
    ids_RT = side_by_side(read_tokens(text, loaded.tokenizer, 123, "x"), 3)
    policy = Stream("x", sep(2, 4, 8, 20)).of(separator_ids(loaded, (".", ",")))
    together = measure(loaded.model, policy, ids_RT)
    alone = [measure(loaded.model, policy, row[None]) for row in ids_RT]
    means = [
        math.exp(sum(map(math.log, quarter)) / 3) for quarter in zip(*(m.perplexities for m in alone), strict=True)
    ]
    assert together.perplexities == pytest.approx(means, rel=1e-5)
    assert together.live == pytest.approx(sum(m.live for m in alone) / 3)
    with pytest.raises(ReproduceError, match=r"--streams 2: 123 tokens .* pass --tokens 122"):
        side_by_side(ids_RT.view(1, -1), 2)
    with pytest.raises(ReproduceError, match=r"--streams 20: 120 tokens .* pass --tokens 160"):
        side_by_side(ids_RT.view(1, -1)[:, :120], 20)


def test_tables_of_streams(run: Path, text: Path) -> None:
    """Four perplexities, sizes and times, beside the paper's; without a text only what is arithmetic."""
    rows = (Stream("StrmLLM", TABLE_8[0].policy, (13.2, 11.5, 8.9, 8.9)), Stream("SepLLM", sep(2, 4, 8, 20)))
    result = streamed(rows, "table6")(Inputs(checkpoints=(run,), text=text, tokens=100))
    assert [table.title.split(": ")[1] for table in result.tables] == [
        "perplexity after 25 tokens", "perplexity after 50 tokens", "perplexity after 75 tokens",
        "perplexity after 100 tokens", "mean tokens in the cache", "time (s)",
    ]  # fmt: skip
    assert result.tables[0].rows[0].paper == 13.2
    alone = Result(notes=("alone",))
    assert streamed(rows, "table6", lambda _: alone)(Inputs(checkpoints=(run,))) is alone
    with pytest.raises(ReproduceError, match=r"table6: reads a long text; pass --text"):
        streamed(rows, "table6")(Inputs(checkpoints=(run,)))
    (text.parent / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ReproduceError, match=r"bad.txt: is no UTF-8 text"):
        streamed(rows, "table6")(Inputs(checkpoints=(run,), text=text.parent / "bad.txt"))
    with pytest.raises(ReproduceError, match=r"tokens, 90,000 are asked for"):
        streamed(rows, "table6")(Inputs(checkpoints=(run,), text=text, tokens=90_000))


def test_a_killed_table_goes_on(run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that were measured are not measured again; another text or number of streams is."""
    rows = (Stream("StrmLLM", TABLE_8[0].policy), Stream("SepLLM", sep(2, 4, 8, 20)))
    inputs = Inputs(checkpoints=(run,), text=text, tokens=100, out=tmp_path)
    measured = []

    def counted(*given: Any) -> Measured:
        measured.append(given)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return Measured((1.0, 2.0, 3.0, 4.0), 5.0, 6.0)

    monkeypatch.setattr(streams, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        streamed(rows, "table6")(inputs)
    result = streamed(rows, "table6")(inputs)
    assert len(measured) == 3
    assert [row.ours for row in result.tables[1].rows] == [2.0, 2.0]
    write(next(item for item in ITEMS if item.name == "table6"), result, tmp_path)
    assert not (tmp_path / "table6.parts").exists()
    streamed(rows, "table6")(inputs)
    streamed(rows, "table6")(replace(inputs, streams=2))
    assert len(measured) == 7


def test_a_stream_of_other_weights_is_measured_anew(
    run: Path, text: Path, tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was trained anew in its dir: its streams are measured, those of the first are no answer."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    measured = []
    monkeypatch.setattr(streams, "measure", lambda *_: measured.append(1) or Measured((1.0,) * 4, 5.0, 6.0))
    inputs = Inputs(checkpoints=(run,), text=text, tokens=100, out=tmp_path)
    for expected in (1, 1):
        streamed([Stream("StrmLLM", TABLE_8[0].policy)], "table6")(inputs)
        assert len(measured) == expected
    shutil.rmtree(run)
    train(build_run(tiny(train={"steps": 1, "eval_every": 0, "seed": 2}, optimizer={"warmup": 0}), topology()))
    streamed([Stream("StrmLLM", TABLE_8[0].policy)], "table6")(inputs)
    assert len(measured) == 2


def test_ablation_of_positions_and_first_tokens() -> None:
    """Table 8 has eight different caches, half of them without first tokens, half with frozen positions."""
    policies = [stream.policy for stream in TABLE_8]
    assert len(set(policies)) == 8
    assert sum(policy.sinks == 0 for policy in policies) == 4
    assert sum(policy.positions == "frozen" for policy in policies) == 4


def test_choice_of_separators(run: Path, text: Path) -> None:
    """Fewer separators keep fewer keys; each loss is that of its pattern."""
    result = table16(Inputs(checkpoints=(run,), text=text, tokens=130))
    shares, above = result.tables
    assert [row.name for row in shares.rows] == list(CHOICES)
    kept = [row.ours for row in shares.rows]
    assert kept == sorted(kept, reverse=True)  # type: ignore[type-var]
    assert len(above.rows) == 4
    loaded = load(run, CPU)
    assert len(separator_ids(loaded, (".", "?"))) == 2
    ids = read_tokens(text, loaded.tokenizer, 128, "x").view(-1, 64)
    full = score(loaded.model, TABLE_5[0].policy, ids, 32)
    assert full.retention.share == 1
