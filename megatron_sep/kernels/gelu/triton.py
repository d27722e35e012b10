"""Bias and GELU in one pass, and in the backward pass both gradients in one: the bias's is summed where it is made.

In 16-bit types the tail of the normal distribution is its density times a polynomial of degree 5 in 1 / (1 + 0.375 |x|)
that was fitted to Mills's ratio (relative error 2.6e-5, where fp16 rounds by 4.9e-4). fp32 has the error function.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sep.kernels.columns.triton import column_sums, num_programs
from megatron_sep.kernels.launch import Launch

FORWARD = Launch(rows=8, columns=512, warps=4)
BACKWARD = Launch(rows=4, columns=512, warps=4, programs=8)


@triton.jit
def _density_and_distribution(x, PRECISE: tl.constexpr):
    """Of a standard normal variable at x."""
    density = 0.3989422804 * tl.exp2(-0.7213475204 * x * x)
    if PRECISE:
        distribution = 0.5 + 0.5 * tl.erf(x * 0.7071067812)
    else:
        t = 1.0 / (1.0 + 0.375 * tl.abs(x))
        ratio = 0.37352556 + t * (0.3964508 + t * (0.20608018 + t * (0.50639477 - t * 0.22916953)))
        tail = density * t * ratio
        distribution = tl.where(x < 0, tail, 1.0 - tail)
    return density, distribution


@triton.jit
def _forward_gelu(
    X, BIAS, OUT, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (r < rows)[:, None] & (c < columns)[None, :]
    at = r.to(tl.int64)[:, None] * columns + c[None, :]
    x = tl.load(X + at, mask=there, other=0.0).to(tl.float32)
    x += tl.load(BIAS + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    _, distribution = _density_and_distribution(x, PRECISE)
    tl.store(OUT + at, (x * distribution).to(OUT.dtype.element_ty), mask=there)


@triton.jit
def _backward_gelu(
    DOUT, X, BIAS, DX, PARTS, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dX, and this program's share of the bias's gradient."""
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(BIAS + c, mask=c < columns, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = first + tl.arange(0, ROWS)
        there = (r < rows)[:, None] & (c < columns)[None, :]
        at = r.to(tl.int64)[:, None] * columns + c[None, :]
        x = tl.load(X + at, mask=there, other=0.0).to(tl.float32) + bias[None, :]
        dout = tl.load(DOUT + at, mask=there, other=0.0).to(tl.float32)
        density, distribution = _density_and_distribution(x, PRECISE)
        dx = dout * (distribution + x * density)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=there)
        total += dx
    tl.store(PARTS + tl.program_id(0) * columns + c, tl.sum(total, 0), mask=c < columns)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """See ``gelu.BiasGelu``."""
    out: Tensor = bias_gelu_forward(x, bias)
    return out


@torch.library.custom_op("megatron_sep::bias_gelu_forward", mutates_args=())
def bias_gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    blocks = triton.cdiv(rows, FORWARD.rows), triton.cdiv(columns, FORWARD.columns)
    _forward_gelu[blocks](x, bias, out, rows, columns, **_constants(x, FORWARD))
    return out


@torch.library.custom_op("megatron_sep::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias."""
    dout, x = dout.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    across = triton.cdiv(columns, BACKWARD.columns)
    programs = num_programs(x.device, BACKWARD.programs, triton.cdiv(rows, BACKWARD.rows), across)
    parts = x.new_empty((1, programs, columns), dtype=torch.float32)
    _backward_gelu[(programs, across)](
        dout, x, bias, dx, parts, rows, columns, STAGES=BACKWARD.stages, **_constants(x, BACKWARD)
    )
    return dx, column_sums(parts, bias.dtype)[0]


def _constants(x, launch):
    return {
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "PRECISE": x.dtype == torch.float32,
        "num_warps": launch.warps,
    }


@bias_gelu_forward.register_fake
def _(x, _bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@bias_gelu_backward.register_fake
def _(_dout, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _keep(ctx, inputs, output):  # noqa: ARG001 - torch names it
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    return bias_gelu_backward(dout, *ctx.saved_tensors)


bias_gelu_forward.register_autograd(_backward, setup_context=_keep)
