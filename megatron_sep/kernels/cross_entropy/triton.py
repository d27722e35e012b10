"""The loss of each token from one read of its logits, and their gradient from another.

In fp32 there are but a token's sums. The forward kernel gives what a vocabulary in parts needs too: the log-sum-exp of
the part, and the label's logit where the part holds it. A label that is not in the vocabulary gives a loss of NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sep.kernels.launch import Launch

FORWARD = Launch(rows=1, columns=4096, warps=8)
BACKWARD = Launch(rows=1, columns=4096, warps=8)


@triton.jit
def _forward_cross_entropy(LOGITS, LABELS, LSE, TARGET, first, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    largest = float("-inf")
    total = 0.0
    for start in tl.range(0, V, BLOCK):
        x = tl.load(LOGITS + row * V + start + c, mask=start + c < V, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, 0))
        finite = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(x - finite), 0)
        largest = above
    label = tl.load(LABELS + row) - first
    held = (label >= 0) & (label < V)
    tl.store(LSE + row, largest + tl.log(total))
    tl.store(TARGET + row, tl.load(LOGITS + row * V + label, mask=held, other=0.0).to(tl.float32))


@triton.jit
def _backward_cross_entropy(LOGITS, LABELS, LSE, DLSE, DTARGET, DLOGITS, first, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(LOGITS + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - tl.load(LSE + row)) * tl.load(DLSE + row)
    label = tl.load(LABELS + row) - first
    gradient += tl.where(c == label, tl.load(DTARGET + row), 0.0)
    tl.store(DLOGITS + row * V + c, gradient.to(DLOGITS.dtype.element_ty), mask=c < V)


def token_losses(labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
    """See ``cross_entropy.TokenLosses``; the whole vocabulary."""
    labels_TB = labels_BT.T.contiguous()
    lse_TB, target_TB = logits_summary(logits_TBV, labels_TB, 0)
    return losses_or_nan(labels_TB, lse_TB - target_TB, logits_TBV.shape[2]).T.contiguous()


def losses_or_nan(labels: Tensor, losses: Tensor, vocab_size: int) -> Tensor:
    """NaN for labels that are no token."""
    return losses.masked_fill((labels < 0) | (labels >= vocab_size), torch.nan)


@torch.library.custom_op("megatron_sep::logits_summary", mutates_args=())
def logits_summary(logits_TBV: Tensor, labels_TB: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """For each token, fp32 [T, B]: the log-sum-exp of the logits, and that of its label, 0 where it is not among them.

    The logits are those of tokens ``first`` on.
    """
    logits, labels = logits_TBV.contiguous(), labels_TB.contiguous()
    lse, target = (torch.empty(labels.shape, dtype=torch.float32, device=labels.device) for _ in range(2))
    _forward_cross_entropy[(labels.numel(),)](
        logits, labels, lse, target, first, logits.shape[2], BLOCK=FORWARD.columns, num_warps=FORWARD.warps
    )
    return lse, target


@torch.library.custom_op("megatron_sep::logits_gradient", mutates_args=())
def logits_gradient(
    logits_TBV: Tensor, labels_TB: Tensor, lse_TB: Tensor, dlse_TB: Tensor, dtarget_TB: Tensor, first: int
) -> Tensor:
    """The gradient of the logits from those of ``logits_summary``'s results, contiguous."""
    logits = logits_TBV.contiguous()
    labels, lse, dlse, dtarget = (x.contiguous() for x in (labels_TB, lse_TB, dlse_TB, dtarget_TB))
    dlogits = torch.empty_like(logits)
    _backward_cross_entropy[(labels.numel(), triton.cdiv(logits.shape[2], BACKWARD.columns))](
        logits, labels, lse, dlse, dtarget, dlogits, first, logits.shape[2],
        BLOCK=BACKWARD.columns, num_warps=BACKWARD.warps,
    )  # fmt: skip
    return dlogits


@logits_summary.register_fake
def _(_logits, labels, _first):
    return tuple(torch.empty(labels.shape, dtype=torch.float32, device=labels.device) for _ in range(2))


@logits_gradient.register_fake
def _(logits, _labels, _lse, _dlse, _dtarget, _first):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    logits, labels, ctx.first = inputs
    ctx.save_for_backward(logits, labels, output[0])


def _backward(ctx, dlse, dtarget):
    return logits_gradient(*ctx.saved_tensors, dlse, dtarget, ctx.first), None, None


logits_summary.register_autograd(_backward, setup_context=_keep)
