"""Full causal attention: torch's kernels against softmax over the dense mask, alone and through the front door."""

import pytest
import torch
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.registry import OPERATIONS
from megatron_sep.kernels.sep_attention import sep_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(batch: int, heads: int, groups: int, length: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, as views of megatron's [S, B, H, D]."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, batch, n, size) for n in (heads * groups, heads, heads, heads * groups)]
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).permute(1, 2, 0, 3) for s in shapes]


@pytest.mark.parametrize("row", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("length", "groups"), [(1, 1), (33, 1), (64, 3)])
def test_rows_equal_softmax_over_earlier_keys(length: int, groups: int, dtype: torch.dtype, row: str) -> None:
    """Outputs and every gradient, grouped heads and odd lengths, against the softmax written out in fp64."""
    attend = OPERATIONS["full_attention"].resolve(Call.on(DEVICE, dtype, head_size=16, training=True), row)
    plan = AttentionPattern().plan(torch.zeros(2, length, dtype=torch.long, device=DEVICE))
    *inputs, gradient = drawn(2, 2, groups, length, 16, dtype)
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = attend(q, k, v, plan, 0.3)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    keys, values = (x.repeat_interleave(groups, 1) for x in wide[1:])
    later = torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)
    expected = (wide[0] @ keys.mT * 0.3).masked_fill(later, -torch.inf).softmax(-1) @ values
    tolerance = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(out, expected, **tolerance)
    found = torch.autograd.grad(out, (q, k, v), gradient)
    for a, e in zip(found, torch.autograd.grad(expected, wide, gradient.double()), strict=True):
        torch.testing.assert_close(a, e, **tolerance)


def test_a_vanilla_plan_takes_it_whatever_the_backend() -> None:
    """Bit for bit torch's kernel, by auto and by the name of any row of Sep-Attention."""
    plan = AttentionPattern().plan(torch.zeros(2, 20, dtype=torch.long, device=DEVICE))
    q, k, v, _ = drawn(2, 2, 2, 20, 16, torch.float32)
    attend = OPERATIONS["full_attention"].resolve(Call.on(DEVICE, torch.float32, head_size=16), "torch")
    expected = attend(q, k, v, plan, 0.25)
    for backend in ("auto", "reference", "flex", "triton"):
        assert torch.equal(sep_attention(q, k, v, plan, backend=backend), expected), backend
