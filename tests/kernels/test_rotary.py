"""Queries, keys and values out of a packed matrix: every row against the formula in fp64."""

import pytest
import torch
from torch import Tensor

from megatron_sep.kernels.call import Call
from megatron_sep.kernels.registry import OPERATIONS
from megatron_sep.kernels.rotary import SplitRotated

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
CASES = {
    "a quarter turns": (3, 1, 16, 4, 1, True),
    "grouped heads, all turns": (2, 3, 8, 8, 1, False),
    "a position a row, odd sizes": (2, 2, 20, 10, 3, True),
    "nothing turns": (1, 4, 8, 0, 1, True),
}


def results(
    compute: SplitRotated, qkv: Tensor, bias: Tensor | None, angle: Tensor | None, groups: int, gradients: list[Tensor]
) -> list[Tensor]:
    """Queries, keys, values, and the gradients of the packed matrix and of the bias."""
    inputs = [given.detach().requires_grad_() for given in (qkv, bias) if given is not None]
    heads = compute(inputs[0], inputs[1] if bias is not None else None, angle, groups, gradients[0].shape[3])
    found = torch.autograd.grad(heads, inputs, [given.to(qkv.dtype) for given in gradients])
    return [*(x.detach() for x in heads), *found]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("row", ["triton", "reference"])
def test_rows_equal_the_formula(row: str, case: str, dtype: torch.dtype) -> None:
    """Heads and gradients, these laid out as attention lays them; every number of the matrix counts once."""
    groups, group, size, turning, angles, biased = CASES[case]
    length, batch = 13, 3
    generator = torch.Generator().manual_seed(size)
    columns = groups * (group + 2) * size
    qkv = torch.randn(length, batch, columns, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(columns, generator=generator).to(DEVICE, dtype) if biased else None
    angle = 9 * torch.randn(length, angles, turning, generator=generator).to(DEVICE) if turning else None
    angle = angle if angle is None else angle[..., : turning // 2]  # a view, as a layer gives it
    gradients = [
        torch.randn(batch, heads, length, size, generator=generator).to(DEVICE, dtype).permute(2, 0, 1, 3)
        for heads in (groups * group, groups, groups)
    ]
    table = OPERATIONS["split_rotated"]
    compute = table.resolve(Call.on(DEVICE, dtype, training=True), row)
    exact = table.resolve(Call("cpu", torch.float64), "reference")
    wide = [None if given is None else given.double() for given in (bias, angle)]
    found = results(compute, qkv, bias, angle, groups, gradients)
    expected = results(exact, qkv.double(), *wide, groups, [given.double() for given in gradients])
    for name, value, wanted in zip(("q", "k", "v", "qkv", "bias"), found, expected, strict=False):
        assert value.shape == wanted.shape
        assert value.dtype == dtype, name
        error = (value.double() - wanted).norm() / wanted.norm()
        assert error <= TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize("row", ["triton", "reference"])
def test_a_head_lies_where_it_lay_in_the_matrix(row: str) -> None:
    """Of each group its queries, its key, its value, untouched where nothing turns: compared bit by bit."""
    qkv = torch.arange(2 * 1 * 2 * 5 * 4, dtype=torch.float32, device=DEVICE).view(2, 1, 40)
    q, k, v = OPERATIONS["split_rotated"].resolve(Call.on(DEVICE, torch.float32), row)(qkv, None, None, 2, 4)
    heads = qkv.view(2, 1, 10, 4)
    assert torch.equal(q, heads[:, :, [0, 1, 2, 5, 6, 7]])
    assert torch.equal(k, heads[:, :, [3, 8]])
    assert torch.equal(v, heads[:, :, [4, 9]])
