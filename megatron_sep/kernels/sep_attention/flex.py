"""Sep-Attention through FlexAttention: an oracle for the fused kernel, and a fallback where Triton kernels fail.

The block table comes from the plan's reach in O(S + blocks^2); ``create_block_mask`` would evaluate S x S pairs. It
saves little work all the same: separators are so dense that nearly every causal block holds one.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from megatron_sep.attention.pattern import MaskPlan

BLOCK = 128


def flex_sep_attention(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, plan: MaskPlan, scale: float) -> Tensor:
    """FlexAttention under the plan's rule, compiled: [B, H, S, D]. On CPU there is no backward pass."""
    grouped = q_BHSD.shape[1] != k_BHSD.shape[1]
    out: Tensor = _compiled()(q_BHSD, k_BHSD, v_BHSD, block_mask=block_mask(plan), scale=scale, enable_gqa=grouped)
    return out


def block_any_all(plan: MaskPlan, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Per block of queries (second axis) and keys (third): does any pair see, do all pairs see? bool [B, N, N] each.

    A key j is seen from j to ``j + reach[j] - 1``, so left of the diagonal a block is touched iff its furthest key
    reaches the block's first query, and full iff its shortest key reaches the block's last query.
    """
    batch, length = plan.reach_BT.shape
    blocks = -(-length // block)
    position = torch.arange(length, device=plan.reach_BT.device)
    end_BT = position + plan.reach_BT
    missing = (0, blocks * block - length)
    furthest_BN = pad(end_BT, missing, value=0).view(batch, blocks, block).amax(2)
    shortest_BN = pad(end_BT, missing, value=length).view(batch, blocks, block).amin(2)
    n = torch.arange(blocks, device=plan.reach_BT.device)
    left = n[None, :] < n[:, None]
    some = (left & (furthest_BN[:, None, :] > n[:, None] * block)) | (n[None, :] == n[:, None])
    past_last = ((n + 1) * block).clamp(max=length)
    every = left & (shortest_BN[:, None, :] >= past_last[:, None])
    single = (n[None, :] == n[:, None]) & (past_last - n * block == 1)
    return some, every | single


def block_mask(plan: MaskPlan, block: int = BLOCK) -> BlockMask:
    """FlexAttention's mask for a plan, without looking at single pairs."""
    some, every = block_any_all(plan, block)
    length = plan.reach_BT.shape[1]

    def mask_mod(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return plan.visible(b, q, k)

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def _ordered(table_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, 1, N] and column indices, chosen ones first, [B, 1, N, N], as FlexAttention wants them."""
    table = table_BNN[:, None].to(torch.int8)
    indices = table.argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32), indices.to(torch.int32)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
