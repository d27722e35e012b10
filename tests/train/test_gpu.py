"""The same configurations on a GPU: bf16, the fused kernel, compiled layers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sep.attention.layers import layer_patterns, plan_layers
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config import RunConfig
from megatron_sep.config.schema import ModelConfig
from megatron_sep.kernels.sep_attention.index import indexed_layers
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process")]

QUICKSTART = {"num_layers": 4, "hidden_size": 192, "num_attention_heads": 6, "sequence_length": 256}


def losses(config: RunConfig) -> list[float]:
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    train(build_run(config, topology()))
    return [line["train/loss"] for line in read_jsonl(config.dir / "metrics.jsonl") if "train/loss" in line]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_configuration_of_the_cpu_trains_unchanged(tiny: Callable[..., RunConfig], precision: str) -> None:
    """Compiled layers, fused kernel and fused loss: the loss falls as it does on the CPU."""
    found = losses(tiny(train={"steps": 40, "precision": precision, "eval_every": 20}, optimizer={"lr": 3e-3}))
    assert found[0] == pytest.approx(math.log(384), rel=0.1)
    assert found[-1] < 0.6 * found[0]


def test_triton_and_reference_give_the_same_curve(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A quickstart-size run, fp32 as the quickstart's: 200 steps within 1e-2 of each other."""
    curves = {
        backend: losses(
            tiny(
                dir=str(tmp_path / backend),
                model=QUICKSTART,
                attention={"window": 64, "sinks": 3, "full_layers": [0, -1], "backend": backend},
                train={"steps": 200, "micro_batch_size": 8, "eval_every": 0},
                checkpoint={"every": 1000},
            )
        )
        for backend in ("triton", "reference")
    }
    worst = max(abs(a - b) for a, b in zip(curves["triton"], curves["reference"], strict=True))
    print(f"largest difference over 200 steps: {worst:.2e}; last losses {curves['triton'][-1]:.4f}")
    assert worst < 1e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_every_layer_computes_its_own_pattern(compiled: bool) -> None:
    """Hidden states and gradients after each layer of H/T equal those of a model that uses the dense reference."""
    ids = torch.randint(0, 128, (2, 256), generator=torch.Generator().manual_seed(0)).cuda()
    patterns = layer_patterns(AttentionPattern(16, 3, (1, 2, 3, 4, 5, 6, 7, 8)), 4, (0, -1))
    plans = indexed_layers(plan_layers(patterns, ids))
    fused, fused_grads = hidden_states("triton", compiled, ids, plans)
    dense, dense_grads = hidden_states("reference", False, ids, plans)
    wrong = hidden_states("reference", False, ids, plans[::-1][1:] + plans[:1])[0]
    for number, (a, b) in enumerate(zip(fused, dense, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda m, n=number: f"layer {n}: {m}")
    for name, gradient in dense_grads.items():
        torch.testing.assert_close(fused_grads[name], gradient, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(wrong[-1], dense[-1], atol=1e-3)


def hidden_states(backend: str, compiled: bool, ids: Tensor, plans: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    from megatron_sep.model.build import build_model

    model = build_model(
        ModelConfig(**QUICKSTART),
        topology(),
        vocab_size=128,
        precision="fp32",
        seed=1,
        backend=backend,
        compiled=compiled,
    )
    found: list[Tensor] = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _, __, output: found.append(output[0].detach()))
    model(ids, torch.arange(ids.shape[1], device="cuda")[None], plans, labels=ids.roll(-1, 1)).mean().backward()
    return found, {name: p.grad for name, p in model.named_parameters()}
