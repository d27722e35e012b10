"""megatron-core's cross entropy, for logits that the tensor-parallel ranks share: see ``cross_entropy.TokenLosses``.

Neither is traced from outside: they are autograd functions around collectives.
"""

import torch
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
