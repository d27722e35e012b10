"""Cross entropy of logits that the tensor-parallel ranks share: see ``cross_entropy.TokenLosses``.

None is traced from outside: they are autograd functions around collectives.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fused_token_losses(labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
    """Compiled by megatron-core; rounds its gradient to bf16."""
    losses_TB: Tensor = fused_vocab_parallel_cross_entropy(
        logits_TBV, labels_BT.T.contiguous(), get_tensor_model_parallel_group()
    )
    return losses_TB.T.contiguous()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def token_losses(labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
    """In fp32, one pass after another."""
    losses_TB: Tensor = vocab_parallel_cross_entropy(logits_TBV, labels_BT.T.contiguous())
    return losses_TB.T.contiguous()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def triton_token_losses(labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
    """Two numbers a token cross between the ranks; the logits are read once forward and once backward."""
    from megatron_sep.kernels.cross_entropy.triton import logits_summary, losses_or_nan

    group, labels_TB = get_tensor_model_parallel_group(), labels_BT.T.contiguous()
    part = logits_TBV.shape[2]
    lse_TB, target_TB = logits_summary(logits_TBV, labels_TB, group.rank() * part)
    losses_TB = _MergedLosses.apply(lse_TB, target_TB, group)  # type: ignore[no-untyped-call]
    return losses_or_nan(labels_TB, losses_TB, group.size() * part).T.contiguous()


class _MergedLosses(torch.autograd.Function):
    """Losses from each rank's log-sum-exp and label's logit; every rank has them, and the same gradient of them."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
        largest = lse.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        sums = torch.stack(((lse - largest).exp(), target))
        dist.all_reduce(sums, group=group)
        whole = largest + sums[0].log()
        ctx.save_for_backward((lse - whole).exp())
        return whole - sums[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (share,) = ctx.saved_tensors
        return gradients[0] * share, -gradients[0], None
