"""The loss of each token from one read of its logits; the backward pass reads them again and writes the gradient there.

The logits are nobody else's: the matrix product that made them does not look at its output. In fp32 there are but three
numbers a token: its largest logit, the sum of exp(logit - largest), and its label's logit. They are what the parts of a
split vocabulary must tell each other, too.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sep.kernels.launch import Launch

FORWARD = Launch(rows=1, columns=4096, warps=4)
BACKWARD = Launch(rows=1, columns=2048, warps=4)

Summary = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _token(row, T, B):
    """Where a row of logits [T, B] has its token [B, T]."""
    return row % B * T + row // B


@triton.jit
def _forward_cross_entropy(
    LOGITS, LABELS, LARGEST, TOTAL, TARGET, T, B, first, vocab, V, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = _token(row, T, B)
    c = tl.arange(0, BLOCK)
    largest = float("-inf")
    total = 0.0
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        x = tl.load(LOGITS + row * V + start + c, mask=start + c < V, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, 0))
        finite = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(x - finite), 0)
        largest = above
    label = tl.load(LABELS + token)
    held = (label >= first) & (label < first + V)
    absent = tl.where((label >= 0) & (label < vocab), 0.0, float("nan"))
    target = tl.load(LOGITS + row * V + label - first, mask=held, other=0.0).to(tl.float32)
    tl.store(LARGEST + token, largest)
    tl.store(TOTAL + token, total)
    tl.store(TARGET + token, target + absent)


@triton.jit
def _backward_cross_entropy(LOGITS, LABELS, LARGEST, TOTAL, DLOSS, OUT, T, B, first, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = _token(row, T, B)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(LOGITS + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32)
    probability = tl.exp(x - tl.load(LARGEST + token)) / tl.load(TOTAL + token)
    label = tl.load(LABELS + token) - first
    gradient = (probability - tl.where(c == label, 1.0, 0.0)) * tl.load(DLOSS + token)
    tl.store(OUT + row * V + c, gradient.to(OUT.dtype.element_ty), mask=c < V)


@torch.compiler.disable
def token_losses(labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
    """See ``cross_entropy.TokenLosses``; the whole vocabulary. The backward pass overwrites the logits."""
    return part_losses(labels_BT, logits_TBV, 0, logits_TBV.shape[2], _alone)


@torch.compiler.disable
def part_losses(
    labels_BT: Tensor, logits_TBV: Tensor, first: int, vocab: int, merged: Callable[[Summary], Summary]
) -> Tensor:
    """See ``TokenLosses``. Never traced, also where what calls it is compiled: a graph may not overwrite its inputs."""
    return TokenLosses.apply(logits_TBV, labels_BT, first, vocab, merged)


def _alone(summary: Summary) -> Summary:
    return summary


class TokenLosses(torch.autograd.Function):
    """fp32 losses [B, T] from the logits [T, B, V] of the tokens ``first`` on, of a vocabulary of ``vocab``.

    ``merged`` makes the summary of the whole vocabulary from that of these logits. A label that is no token has a loss
    of NaN. Logits that are a leaf, or a view of one, keep their values: their gradient gets memory of its own.
    """

    @staticmethod
    def forward(
        ctx, logits: Tensor, labels: Tensor, first: int, vocab: int, merged: Callable[[Summary], Summary]
    ) -> Tensor:
        ctx.owned = logits.is_contiguous() and not (logits if logits._base is None else logits._base).is_leaf
        ctx.first, ctx.overwritten = first, False
        logits, labels = logits.contiguous(), labels.contiguous()
        largest, total, target = merged(logits_summary(logits, labels, first, vocab))
        ctx.save_for_backward(logits, labels, largest, total)
        return total.log() - (target - largest)

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.overwritten:
            raise RuntimeError(
                "cross_entropy: the first backward pass wrote the gradient over the logits, a second one finds none; "
                "build the model with other_backends={'cross_entropy': 'torch'}"
            )
        logits, labels, largest, total = ctx.saved_tensors
        ctx.overwritten = ctx.owned
        out = logits.detach() if ctx.owned else torch.empty_like(logits)
        write_logits_gradient(logits, labels, largest, total, dloss.contiguous(), out, ctx.first)
        return out, None, None, None, None


def logits_summary(logits: Tensor, labels: Tensor, first: int, vocab: int) -> Summary:
    """For each token, fp32 [B, T]: the largest logit, the sum of exp(logit - largest), the label's logit or 0."""
    T, B, V = logits.shape
    summary = tuple(torch.empty((B, T), dtype=torch.float32, device=logits.device) for _ in range(3))
    _forward_cross_entropy[(T * B,)](
        logits,
        labels,
        *summary,
        T,
        B,
        first,
        vocab,
        V,
        BLOCK=FORWARD.columns,
        STAGES=FORWARD.stages,
        num_warps=FORWARD.warps,
    )
    return summary


def write_logits_gradient(
    logits: Tensor, labels: Tensor, largest: Tensor, total: Tensor, dloss: Tensor, out: Tensor, first: int
) -> None:
    """Fill ``out``, which may be the logits, with the gradient of all losses times ``dloss`` [B, T]."""
    T, B, V = logits.shape
    _backward_cross_entropy[(T * B, triton.cdiv(V, BACKWARD.columns))](
        logits, labels, largest, total, dloss, out, T, B, first, V, BLOCK=BACKWARD.columns, num_warps=BACKWARD.warps
    )
