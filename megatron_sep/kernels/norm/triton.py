"""The norms fused: one read of the input gives one or two outputs, one pass back all gradients.

The backward pass adds the gradient of the residual stream to dX, and sums it over the tokens for the biases that were
added to the stream. Rows of C values, padded to P; statistics and sums in fp32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from megatron_sep.kernels.columns.triton import column_sums, num_programs
from megatron_sep.kernels.launch import Launch

FORWARD: dict[int, Launch] = {}
BACKWARD: dict[int, Launch] = {}
"""By padded size, where the rule below is not the best."""


def _forward_launch(padded: int) -> Launch:
    return FORWARD.get(padded) or Launch(rows=min(max(4096 // padded, 1), 16), warps=_warps(padded))


def _backward_launch(padded: int) -> Launch:
    warps = _warps(padded)
    return BACKWARD.get(padded) or Launch(rows=min(max(2048 // padded, 1), 16), warps=warps, programs=16 // warps)


def _warps(padded: int) -> int:
    """A thread reads 8 values at once, 16 bytes in 16-bit types."""
    return min(max(padded // 256, 1), 16)


@triton.jit
def _row_statistics(x, inside, eps, C: tl.constexpr, CENTRED: tl.constexpr):
    mean = tl.zeros([x.shape[0]], tl.float32)
    if CENTRED:
        mean = tl.sum(x, 1) / C
        x = tl.where(inside, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(x * x, 1) / C + eps)


@triton.jit
def _forward_norms(
    X, W1, B1, W2, B2, Y1, Y2, MEAN, RSTD, rows, eps,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, P)
    inside = (r < rows)[:, None] & (c < C)[None, :]
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    mean, rstd = _row_statistics(x, inside, eps, C, CENTRED)
    normal = (x - mean[:, None]) * rstd[:, None]
    tl.store(RSTD + r, rstd, mask=r < rows)
    if CENTRED:
        tl.store(MEAN + r, mean, mask=r < rows)
    y = normal * tl.load(W1 + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if CENTRED:
        y += tl.load(B1 + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(Y1 + at, y.to(Y1.dtype.element_ty), mask=inside)
    if TWO:
        y = normal * tl.load(W2 + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if CENTRED:
            y += tl.load(B2 + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        tl.store(Y2 + at, y.to(Y2.dtype.element_ty), mask=inside)


@triton.jit
def _backward_norms(
    DY1, DY2, DSTREAM, X, MEAN, RSTD, W1, W2, DX, PARTS, rows,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    CENTRED: tl.constexpr, TWO: tl.constexpr, STREAM: tl.constexpr, BIASES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dX, and this program's share of the sums over rows: of each norm dW and dB, then of the stream's gradient."""
    c = tl.arange(0, P)
    w1 = tl.load(W1 + c, mask=c < C, other=0.0).to(tl.float32)
    w2 = tl.load(W2 + c, mask=c < C, other=0.0).to(tl.float32)
    dw1 = tl.zeros([P], tl.float32)
    db1 = tl.zeros([P], tl.float32)
    dw2 = tl.zeros([P], tl.float32)
    db2 = tl.zeros([P], tl.float32)
    dbiases = tl.zeros([P], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = first + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & (c < C)[None, :]
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY1 + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + r, mask=r < rows, other=0.0)[:, None]
        if CENTRED:
            x = tl.where(inside, x - tl.load(MEAN + r, mask=r < rows, other=0.0)[:, None], 0.0)
        normal = x * rstd
        dnormal = dy * w1[None, :]
        dw1 += tl.sum(dy * normal, 0)
        if CENTRED:
            db1 += tl.sum(dy, 0)
        if TWO:
            dy = tl.load(DY2 + at, mask=inside, other=0.0).to(tl.float32)
            dnormal += dy * w2[None, :]
            dw2 += tl.sum(dy * normal, 0)
            if CENTRED:
                db2 += tl.sum(dy, 0)
        dx = dnormal - normal * (tl.sum(dnormal * normal, 1) / C)[:, None]
        if CENTRED:
            dx -= (tl.sum(dnormal, 1) / C)[:, None]
        dx *= rstd
        if STREAM:
            dstream = tl.load(DSTREAM + at, mask=inside, other=0.0).to(tl.float32)
            dx += dstream
            if BIASES:
                dbiases += tl.sum(dstream, 0)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
    part = PARTS + tl.program_id(0) * C + c
    step = tl.num_programs(0) * C
    tl.store(part, dw1, mask=c < C)
    part += step
    if CENTRED:
        tl.store(part, db1, mask=c < C)
        part += step
    if TWO:
        tl.store(part, dw2, mask=c < C)
        part += step
        if CENTRED:
            tl.store(part, db2, mask=c < C)
            part += step
    if BIASES:
        tl.store(part, dbiases, mask=c < C)


class LayerNorm(nn.Module):
    """A row of ``layernorm``: see ``norm.MakeNorm``."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return norms_forward(x, self.weight, self.bias, None, None, self.eps)[0]


class RMSNorm(nn.Module):
    """A row of ``rmsnorm``: see ``norm.MakeNorm``."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return norms_forward(x, self.weight, None, None, None, self.eps)[0]


def open_residual(x: Tensor, norms: Sequence[nn.Module], biases: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """See ``norm.OpenResidual``."""
    affine = [(norm.weight, getattr(norm, "bias", None)) for norm in norms] + [(None, None)] * (2 - len(norms))
    padded_biases = [*biases, *[None] * (2 - len(biases))]
    *outputs, stream = _Branches.apply(x, *affine[0], *affine[1], *padded_biases, norms[0].eps)
    # the backward pass above has the gradients of the biases, which are the sum of the stream's
    return tuple(outputs[: len(norms)]), sum((bias.detach() for bias in biases), stream)


class _Branches(torch.autograd.Function):
    """The outputs of the norms, an empty one for a second that is not there, and the stream as it came."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, bias, other_bias, eps):
        y1, y2, mean, rstd = norms_forward(x, w1, b1, w2, b2, eps)
        ctx.save_for_backward(x, mean, rstd, w1, w2)
        ctx.centred = b1 is not None
        ctx.biases = (bias is not None) + (other_bias is not None)
        return y1, y2, x.view_as(x)

    @staticmethod
    def backward(ctx, dy1, dy2, dstream):
        x, mean, rstd, w1, w2 = ctx.saved_tensors
        two = w2 is not None
        dx, sums = norms_backward(dy1, dy2 if two else None, dstream, x, mean, rstd, w1, w2, ctx.biases > 0)
        dw1, db1, dw2, db2, dbias = _named(sums, ctx.centred, two, ctx.biases > 0)
        other = dbias.clone() if ctx.biases > 1 else None
        return dx, dw1, db1, dw2, db2, dbias, other, None


def _named(sums, centred, two, biases):
    """dW1, dB1, dW2, dB2 and the biases' gradient, None where there is none."""
    rest = list(sums.unbind())
    return [rest.pop(0) if there else None for there in (True, centred, two, two and centred, biases)]


@torch.library.custom_op("megatron_sep::norms_forward", mutates_args=())
def norms_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output of one norm or two, and of each row mean and 1 / standard deviation, fp32; empty what is not there."""
    x = x.contiguous()
    y1, y2, mean, rstd = _forward_outputs(x, b1 is not None, w2 is not None)
    rows, size = x.numel() // x.shape[-1], x.shape[-1]
    padded = triton.next_power_of_2(size)
    launch = _forward_launch(padded)
    _forward_norms[(triton.cdiv(rows, launch.rows),)](
        x, w1, w1 if b1 is None else b1, w1 if w2 is None else w2, w1 if b2 is None else b2, y1, y2, mean, rstd,
        rows, eps, C=size, P=padded, ROWS=launch.rows, CENTRED=b1 is not None, TWO=w2 is not None,
        num_warps=launch.warps,
    )  # fmt: skip
    return y1, y2, mean, rstd


@torch.library.custom_op("megatron_sep::norms_backward", mutates_args=())
def norms_backward(
    dy1: Tensor, dy2: Tensor | None, dstream: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor,
    w1: Tensor, w2: Tensor | None, biases: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dX, and the sums over the rows [V, C]: dW, dB of each norm (RMSNorm: dW), with ``biases`` the stream's."""
    x, dy1 = x.contiguous(), dy1.contiguous()
    dy2, dstream = (None if given is None else given.contiguous() for given in (dy2, dstream))
    centred, size = mean.numel() > 0, x.shape[-1]
    rows, padded = x.numel() // size, triton.next_power_of_2(size)
    launch = _backward_launch(padded)
    programs = num_programs(x.device, launch.programs, triton.cdiv(rows, launch.rows))
    dx = torch.empty_like(x)
    parts = x.new_empty((_num_sums(centred, w2, biases), programs, size), dtype=torch.float32)
    _backward_norms[(programs,)](
        dy1, dy1 if dy2 is None else dy2, dy1 if dstream is None else dstream, x, mean, rstd,
        w1, w1 if w2 is None else w2, dx, parts, rows,
        C=size, P=padded, ROWS=launch.rows, CENTRED=centred, TWO=w2 is not None, STREAM=dstream is not None,
        BIASES=biases, STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip
    return dx, column_sums(parts, w1.dtype)


def _forward_outputs(x, centred, two):
    def contiguous():
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    rows = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(count, dtype=torch.float32) for count in (rows if centred else 0, rows))
    return contiguous(), contiguous() if two else x.new_empty(0), mean, rstd


def _num_sums(centred, w2, biases):
    return (1 if w2 is None else 2) * (2 if centred else 1) + biases


@norms_forward.register_fake
def _(x, _w1, b1, w2, _b2, _eps):
    return _forward_outputs(x, b1 is not None, w2 is not None)


@norms_backward.register_fake
def _(_dy1, _dy2, _dstream, x, mean, _rstd, w1, w2, biases):
    sums = w1.new_empty((_num_sums(mean.numel() > 0, w2, biases), x.shape[-1]))
    return torch.empty_like(x, memory_format=torch.contiguous_format), sums


def _keep(ctx, inputs, output):
    x, w1, b1, w2, _b2, _eps = inputs
    _, _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, w1, w2)
    ctx.centred = b1 is not None
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, dy1, dy2, _dmean, _drstd):
    x, mean, rstd, w1, w2 = ctx.saved_tensors
    two = w2 is not None
    dx, sums = norms_backward(dy1, dy2 if two else None, None, x, mean, rstd, w1, w2, False)
    dw1, db1, dw2, db2, _ = _named(sums, ctx.centred, two, False)
    return dx, dw1, db1, dw2, db2, None


norms_forward.register_autograd(_backward, setup_context=_keep)
