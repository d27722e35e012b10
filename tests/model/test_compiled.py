"""Compiled layers stay compiled, and right, while the window of an annealing shrinks."""

from functools import partial

import pytest
import torch

from megatron_sep.attention.annealing import Annealing
from megatron_sep.attention.context import context_plans
from megatron_sep.attention.layers import layer_patterns, plan_layers
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import AnnealingConfig, ModelConfig
from megatron_sep.kernels.sep_attention.index import indexed_layers
from megatron_sep.parallel.device import current_device
from megatron_sep.parallel.groups import topology
from megatron_sep.parallel.share import Share

pytestmark = pytest.mark.usefixtures("single_process")

LENGTH = 64
PATTERN = AttentionPattern(1, 2, (5, 9))
RULES = LayerRules(layer_patterns(PATTERN, 2, (0,)), AttentionPattern(separator_ids=PATTERN.separator_ids), None)


def test_every_window_of_an_annealing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a whole sequence to one token through the fused kernel: never torch's limit, never another loss or gradient.

    Inductor's share is left out on a CPU: what is compiled anew is decided before it.
    """
    from megatron_sep.model.build import build_model

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, sequence_length=LENGTH)
    build = partial(build_model, config, topology(), vocab_size=64, precision="fp32", seed=1)
    plain, compiled = build(backend="reference"), build(backend="triton", compiled=True)
    ids = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0)).to(current_device())
    position = torch.arange(LENGTH, device=ids.device).expand_as(ids)
    annealing = Annealing(RULES, AnnealingConfig(start=LENGTH, steps=6), 0)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step in range(1, 8):
            plans = indexed_layers(annealing(step).plans(ids))
            assert plans[1].window == LENGTH >> (step - 1)
            losses = [model(ids, position, plans, labels=ids).mean() for model in (plain, compiled)]
            torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
            for loss in losses:
                loss.backward()
        with torch.no_grad():
            plans = indexed_layers(RULES.plans(ids))
            both = [model.eval()(ids, position, plans, labels=ids) for model in (plain, compiled)]
            torch.testing.assert_close(both[1], both[0], atol=1e-5, rtol=1e-5)
    for expected, found in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4)


def test_a_layer_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers, full and Sep, are two graphs without a break; the third is the loss."""
    from torch._dynamo.utils import counters

    from megatron_sep.model.build import build_model

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=2, sequence_length=LENGTH)
    model = build_model(config, topology(), vocab_size=64, precision="fp32", seed=1, backend="triton", compiled=True)
    ids = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0)).to(current_device())
    plans = plan_layers(layer_patterns(AttentionPattern(9, 2, (5, 9)), 4, (0, -1)), ids)
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        model(ids, torch.arange(LENGTH, device=ids.device)[None], plans, labels=ids).mean().backward()
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("parallel_residual", [True, False])
def test_fused_rows_stay_in_the_graph(monkeypatch: pytest.MonkeyPatch, parallel_residual: bool) -> None:
    """A layer of fused norms, rotation and GELU is one graph still, with the losses and gradients of the plain one."""
    from torch._dynamo.utils import counters

    from megatron_sep.model.build import build_model

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        sequence_length=LENGTH,
        parallel_residual=parallel_residual,
        rotary_fraction=0.25,
    )
    build = partial(build_model, config, topology(), vocab_size=64, precision="fp32", seed=1)
    plain, fused = build(backend="reference"), build(backend="triton", compiled=True, other_backends=FUSED)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, generator=torch.Generator(parameter.device).manual_seed(len(name)))
    ids = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0)).to(current_device())
    plans = indexed_layers(plan_layers(layer_patterns(PATTERN, 2, (0,)), ids))
    position = torch.arange(LENGTH, device=ids.device)[None]
    torch._dynamo.reset()
    counters.clear()
    found = [model(ids, position, plans, labels=ids) for model in (plain, fused)]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    for losses in found:
        losses.mean().backward()
    for (name, expected), value in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(value.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=partial("{}: {}".format, name))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


FUSED = dict.fromkeys(("layernorm", "open_residual", "split_rotated", "bias_gelu", "cross_entropy"), "triton")


def test_the_plans_of_a_context_parallel_rank_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three micro-batches with other landmarks, of a rank alone: loss and gradients of whole plans, graphs of one."""
    from torch._dynamo.utils import counters

    from megatron_sep.model.build import build_model

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, sequence_length=LENGTH)
    build = partial(build_model, config, topology(), vocab_size=64, precision="fp32", seed=1, backend="reference")
    plain, compiled = build(), build(compiled=True, recompute="selective")
    graphs = []
    torch._dynamo.reset()
    counters.clear()
    for seed in range(3):
        ids = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
        plans = RULES.plans(ids)
        parts = indexed_layers(context_plans(plans, Share(0, 1, LENGTH), current_device()))
        ids, whole = ids.to(current_device()), [plan.to(current_device()) for plan in plans]
        position = torch.arange(LENGTH, device=ids.device).expand_as(ids)
        losses = [model(ids, position, of, labels=ids).mean() for model, of in ((plain, whole), (compiled, parts))]
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
        for loss in losses:
            loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2] > 0
    for expected, found in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4)
