"""The loop trains, skips what is not finite, and refuses what cannot be trained on."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sep.attention.separators import SeparatorError
from megatron_sep.config import RunConfig
from megatron_sep.data.samples import DataError
from megatron_sep.data.shards import ShardError, write_shards
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl

pytestmark = pytest.mark.usefixtures("single_process")


def build(config: RunConfig) -> "Run":  # noqa: F821
    from megatron_sep.train.run import build_run

    return build_run(config, topology())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_loss_falls_in_every_precision(tiny: Callable[..., RunConfig], precision: str) -> None:
    """40 steps take the loss of a two-layer model well below its start, and the logged numbers are those of the run."""
    from megatron_sep.train.loop import train

    train_section = {"steps": 40, "precision": precision, "eval_every": 20}
    config = tiny(train=train_section, optimizer={"lr": 3e-3}, checkpoint={"every": 40})
    train(build(config))
    lines = read_jsonl(config.dir / "metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(384), rel=0.1)
    assert losses[-1] < 0.6 * losses[0]
    assert [line["step"] for line in lines if "valid/loss" in line] == [0, 20, 40]
    last = [line for line in lines if "train/loss" in line][-1]
    assert 0 < last["attention/visible"] < 1
    assert last["train/consumed"] == 320


def test_accumulation_does_not_change_the_gradient(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Micro-batches of 2 and of 8 give the same losses and gradient norms."""
    from megatron_sep.train.loop import train

    runs = [
        tiny(train={"micro_batch_size": size, "steps": 4}, dir=str(tmp_path / str(size)), checkpoint={"every": 99})
        for size in (2, 8)
    ]
    for config in runs:
        train(build(config))
    small, large = ([x for x in read_jsonl(c.dir / "metrics.jsonl") if "train/loss" in x] for c in runs)
    for a, b in zip(small, large, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-5)


def test_a_gradient_that_is_not_finite_changes_no_weight(tiny: Callable[..., RunConfig]) -> None:
    """The step is counted as skipped; after max_skipped_steps in a row the run stops and says why."""
    from megatron_sep.train.loop import DivergedError, train

    run = build(tiny(train={"max_skipped_steps": 3, "eval_every": 0}))
    model = run.engine._modules[0]
    with torch.no_grad():
        model.output_layer.weight[5, 5] = math.inf
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(DivergedError, match="step 3: the gradient was not finite 3 steps in a row"):
        train(run)
    assert run.state.skipped == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_document_boundaries_reach_the_plan(tiny: Callable[..., RunConfig]) -> None:
    """On: no token sees another document, in full layers too. Off: it does."""
    for on in (True, False):
        run = build(tiny(attention={"document_boundaries": on}))
        batch = next(iter(run.train_data.take(1, 0)))
        end = run.train_data.rules(1).document_end
        ends = batch.ids_BT == 0
        assert (end == 0) == on
        assert ends[:, :-1].any()
        number = ends.cumsum(1) - ends.long()
        across = number[:, :, None] != number[:, None, :]
        assert bool((batch.plans[0].dense() & across).any()) != on
        assert bool((batch.plans[1].dense() & across).any()) != on


def test_unusable_inputs_are_named(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A separator of several tokens, a shard that is not there, ids beyond the vocabulary, too little text."""
    with pytest.raises(SeparatorError, match=r"'\.\.\.\?' is \d tokens"):
        build(tiny(attention={"separators": [".", "...?"]}))
    with pytest.raises(ShardError, match="nowhere"):
        build(tiny(data={"path": str(tmp_path / "nowhere")}))
    write_shards(tmp_path / "foreign", [np.full(500, 400)] * 20, 500)
    with pytest.raises(DataError, match=r"document \d+.*token id 400 is not in the vocabulary of 300"):
        next(build(tiny(data={"path": str(tmp_path / "foreign")})).train_data.take(1, 0))
    write_shards(tmp_path / "short", [[1, 2, 3]], 500)
    with pytest.raises(DataError, match="train split is 1 of 1 documents with 3 tokens, one sample takes 65"):
        build(tiny(data={"path": str(tmp_path / "short"), "split": [1, 0, 0]}))
