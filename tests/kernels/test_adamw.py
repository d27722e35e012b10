"""AdamW: every row that can run here against the update written out in fp64."""

import pytest
import torch
from support.fakes import installed
from torch import Tensor
from torch.optim import Optimizer

from megatron_sep.kernels.adamw import AdamW
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.registry import OPERATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = ["torch", "transformer_engine", "apex", "reference"]
SHAPES = [(3, 5), (7,), (1,), (64, 33)]
LR, DECAY, BETAS, EPS = 0.01, 0.1, (0.9, 0.95), 1e-8


def written_out(parameters: list[Tensor], steps: list[list[Tensor]]) -> list[Tensor]:
    """Of parameters in fp64 after all gradients (arXiv 1711.05101, algorithm 2)."""
    found = []
    for index, start in enumerate(parameters):
        value, first, second = start.double(), torch.zeros_like(start.double()), torch.zeros_like(start.double())
        for number, gradients in enumerate(steps, 1):
            gradient = gradients[index].double()
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            size = (second / (1 - BETAS[1] ** number)).sqrt() + EPS
            value = value - LR * DECAY * value - LR * first / (1 - BETAS[0] ** number) / size
        found.append(value)
    return found


def stepped(adamw: AdamW, parameters: list[Tensor], steps: list[list[Tensor]]) -> Optimizer:
    """An optimizer as an engine makes it, after all gradients."""
    optimizer = adamw.kind(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for group in optimizer.param_groups:
        group.update(adamw.settings)
    for parameter in parameters:
        optimizer.state[parameter].update(adamw.start(parameter))
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer


def drawn() -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    draws = [[torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES] for _ in range(8)]
    return [x.requires_grad_() for x in draws[0]], draws[1:]


def check(adamw: AdamW) -> None:
    parameters, steps = drawn()
    expected = written_out([x.detach() for x in parameters], steps)
    optimizer = stepped(adamw, parameters, steps)
    for found, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found.detach().double(), wanted, atol=1e-6, rtol=1e-5)
        assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[found].keys() == adamw.start(found).keys()


@pytest.mark.parametrize("row", ROWS)
def test_rows_equal_the_update_written_out(row: str) -> None:
    """Seven steps, parameters of any shape; and the state has the names that its row says it starts with."""
    call = Call.on(DEVICE, torch.float32, training=True)
    reason = {r.name: r for r in OPERATIONS["adamw"].implementations}[row].why_not(call)
    if reason is not None:
        pytest.skip(reason)
    check(OPERATIONS["adamw"].resolve(call, row))


def test_torchs_row_skips_by_itself() -> None:
    """Gradients are divided by ``grad_scale``; where ``found_inf`` is 1 nothing changes and no step is counted."""
    call = Call.on(DEVICE, torch.float32, training=True)
    adamw = OPERATIONS["adamw"].resolve(call, "torch")
    assert adamw.skips_by_itself
    parameters, steps = drawn()
    optimizer = stepped(adamw, parameters, [])
    expected = written_out([x.detach() for x in parameters], [[g / 4 for g in steps[0]], steps[1]])
    for gradients, scale, found_inf in ((steps[0], 4.0, 0.0), (steps[2], 1.0, 1.0), (steps[1], 1.0, 0.0)):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * (torch.nan if found_inf else 1)
        optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=DEVICE) for x in (scale, found_inf))
        optimizer.step()
    for found, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found.detach().double(), wanted, atol=1e-6, rtol=1e-5)
        assert float(optimizer.state[found]["step"]) == 2


@pytest.mark.parametrize("row", ["transformer_engine", "apex"])
def test_rows_of_packages_are_found_where_they_are_installed(row: str) -> None:
    """By name alone, and told as their class wants it; auto stays with torch's."""
    call = Call("cuda", torch.bfloat16, (9, 0))
    with installed(row):
        adamw = OPERATIONS["adamw"].resolve(call, row)
        assert OPERATIONS["adamw"].choose(call).name == "torch"
    assert adamw.library == row == adamw.kind.__module__.split(".")[0]
    check(adamw)
