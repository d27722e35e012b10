"""Muon turns whole matrices, whatever they lie in and whoever holds their parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from pydantic import ValidationError
from torch import nn

from megatron_sep.config import RunConfig
from megatron_sep.config.schema import OptimizerConfig
from megatron_sep.kernels.adamw.native import ADAMW
from megatron_sep.parallel.groups import topology
from megatron_sep.train.muon import Blocks, MuonWithAdamW, matrices
from megatron_sep.train.written import read_jsonl
from megatron_sep.weights.sealed import CheckpointError

pytestmark = pytest.mark.usefixtures("single_process")

MUON = {"kind": "muon", "decay_steps": 6}


def train(config: RunConfig) -> list[dict[str, float]]:
    from megatron_sep.train.loop import train as loop
    from megatron_sep.train.run import build_run

    loop(build_run(config, topology()))
    keys = ("step", "train/loss", "train/grad_norm", "valid/loss")
    lines = [line for line in read_jsonl(config.dir / "metrics.jsonl") if "time/save" not in line]
    return [{key: line[key] for key in keys if key in line} for line in lines]


def test_a_matrix_is_stepped_as_torchs_own() -> None:
    """Three steps with momentum and decay equal torch.optim.Muon's at the same size of update; a vector has AdamW's."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(24, 16, generator=generator), torch.randn(16, generator=generator)
    ours, theirs = (tuple(nn.Parameter(x.clone()) for x in (matrix, vector)) for _ in range(2))
    config = OptimizerConfig(lr=0.02, weight_decay=0.1)
    groups = [
        {"params": [ours[0]], "blocks": [Blocks((24,), None)], "muon": True, "weight_decay": 0.1},
        {"params": [ours[1]], "muon": False, "weight_decay": 0.0},
    ]
    optimizer = MuonWithAdamW(groups, ADAMW, config, None)
    optimizer.start()
    muon = torch.optim.Muon([theirs[0]], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs[1]], lr=0.02, weight_decay=0.0, betas=config.betas, eps=config.eps)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    assert torch.allclose(ours[0], theirs[0], atol=1e-6)
    assert torch.allclose(ours[1], theirs[1], atol=1e-6)
    assert not torch.allclose(ours[0], matrix, atol=1e-2)


def core(gated: bool) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=gated,
        ffn_hidden_size=24,
        use_cpu_initialization=True,
    )


def test_query_key_value_and_gate_are_matrices_of_their_own() -> None:
    """Each is taken from its place in the joined weight, and put back there."""
    weight = nn.Parameter(torch.arange(32 * 16.0).view(32, 16))
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    ((_, blocks),) = matrices([(name, weight), ("embedding.word_embeddings.weight", weight)], core(gated=True))
    assert blocks == Blocks((8, 4, 4), None)
    query, key, value = blocks.take(weight)
    assert torch.equal(query, torch.cat([weight[0:8], weight[16:24]]))
    assert torch.equal(key, torch.cat([weight[8:12], weight[24:28]]))
    assert torch.equal(value, torch.cat([weight[12:16], weight[28:32]]))
    assert torch.equal(blocks.put([query, key, value]), weight)
    ((_, gated),) = matrices(
        [("decoder.layers.0.mlp.linear_fc1.weight", nn.Parameter(torch.zeros(48, 16)))], core(True)
    )
    ((_, plain),) = matrices(
        [("decoder.layers.0.mlp.linear_fc1.weight", nn.Parameter(torch.zeros(24, 16)))], core(False)
    )
    assert (gated.rows, plain.rows) == ((24, 24), (24,))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_and_goes_on_where_it_stopped(tiny: Callable[..., RunConfig], tmp_path: Path, precision: str) -> None:
    """6 steps at once equal 3, a new start and 3 more, and the loss falls faster than AdamW's at the same rate."""
    short = {"steps": 6, "precision": precision, "eval_every": 3}
    once = {"every": 99}
    straight = train(tiny(dir=str(tmp_path / "straight"), optimizer=MUON, train=short, checkpoint=once))
    half = tiny(dir=str(tmp_path / "cut"), optimizer=MUON, train=short | {"steps": 3}, checkpoint=once)
    train(half)
    assert train(tiny(dir=str(tmp_path / "cut"), optimizer=MUON, train=short, checkpoint=once)) == straight
    with pytest.raises(CheckpointError, match=r"has the state of optimizer.kind=muon, which adamw has no use for"):
        train(tiny(dir=str(tmp_path / "cut"), optimizer={"decay_steps": 6}, train=short))
    losses = [line["valid/loss"] for line in straight if "valid/loss" in line]
    assert losses[-1] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"engine": "deepspeed"}}, r"which parallel.engine=deepspeed cuts into pieces"),
        ({"train": {"precision": "fp16"}}, r"optimizer.kind=muon trains in bf16 or fp32"),
    ],
)
def test_layouts_that_cut_matrices_are_refused(tiny: Callable[..., RunConfig], sections: Any, message: str) -> None:
    """By name, with the way out."""
    with pytest.raises(ValidationError, match=message):
        tiny(optimizer=MUON, **sections)
