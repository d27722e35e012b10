"""GELU of a product and its bias: every row against the formula in fp64."""

import pytest
import torch
from torch import Tensor

from megatron_sep.kernels.call import Call
from megatron_sep.kernels.gelu import BiasGelu
from megatron_sep.kernels.registry import OPERATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = ["triton", "torch", "reference"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def results(compute: BiasGelu, x: Tensor, bias: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """The output and both gradients."""
    inputs = [given.detach().requires_grad_() for given in (x, bias)]
    out = compute(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_rows_equal_the_formula(row: str, dtype: torch.dtype) -> None:
    """Output, dX and the bias's gradient: rows and columns that fill no block, strided inputs, values to 30."""
    call = Call.on(DEVICE, dtype, training=True)
    reason = {r.name: r for r in OPERATIONS["bias_gelu"].implementations}[row].why_not(call)
    if reason is not None:
        pytest.skip(reason)
    compute = OPERATIONS["bias_gelu"].resolve(call, row)
    exact = OPERATIONS["bias_gelu"].resolve(Call("cpu", torch.float64), "reference")
    for shape in ((1, 1), (3, 7), (17, 2, 530)):
        generator = torch.Generator().manual_seed(len(shape))
        x, gradient = torch.randn(2, *shape, 2, generator=generator).to(DEVICE, dtype)[..., 0]
        x = x * torch.logspace(-1, 1, x.numel(), device=DEVICE, dtype=dtype).view_as(x)
        bias = torch.randn(shape[-1], generator=generator).to(DEVICE, dtype)
        found = results(compute, x, bias, gradient)
        expected = results(exact, x.double(), bias.double(), gradient.double())
        for name, value, wanted in zip(("out", "x", "bias"), found, expected, strict=True):
            assert value.dtype == dtype, name
            error = (value.double() - wanted).norm() / (wanted.norm() + wanted.numel() ** 0.5)
            assert error <= TOLERANCE[dtype], (shape, name, error)


def test_the_16_bit_tail_is_as_good_as_its_type() -> None:
    """Far below 0, where 1 - erf would cancel: within 1 % of the true value, not merely close to 0."""
    call = Call.on(DEVICE, torch.bfloat16, training=True)
    compute = OPERATIONS["bias_gelu"].resolve(call, "triton")
    x = -torch.linspace(0.5, 12, 64, device=DEVICE).to(torch.bfloat16)[None]
    found = compute(x, torch.zeros_like(x[0])).double()
    wide = x.double()
    expected = 0.5 * wide * torch.special.erfc(-wide / 2**0.5)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_gradients_are_the_same_bits_every_time() -> None:
    """Two calls of the fused row in fp32, over more rows than a program takes."""
    compute = OPERATIONS["bias_gelu"].resolve(Call.on(DEVICE, torch.float32, training=True), "triton")
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, 200, 40, generator=generator).to(DEVICE)
    bias = torch.randn(40, generator=generator).to(DEVICE)
    for first, second in zip(*(results(compute, x, bias, gradient) for _ in range(2)), strict=True):
        assert torch.equal(first, second)
