"""Cross entropy of logits that the tensor-parallel ranks share: see ``cross_entropy.TokenLosses``.

None is traced from outside: they are autograd functions around collectives.
"""

from functools import partial

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


def triton_token_losses(labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
    """Three numbers a token cross between the ranks; the logits are read once forward and overwritten backward."""
    from megatron_sep.kernels.cross_entropy.triton import part_losses

    group, part = get_tensor_model_parallel_group(), logits_TBV.shape[2]
    losses_BT: Tensor = part_losses(
        labels_BT, logits_TBV, group.rank() * part, group.size() * part, partial(_merged, group)
    )
    return losses_BT


def _merged(group: dist.ProcessGroup, summary: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit, sum of exponentials and label's logit of a token from those of each rank."""
    here, total, target = summary
    largest = here.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    sums = torch.stack((total * (here - largest).exp(), target))
    dist.all_reduce(sums, group=group)
    return largest, sums[0], sums[1]
