"""Sep-Attention through FlexAttention: an oracle for the fused kernel, and a fallback where Triton kernels fail.

The block table comes from the plan's reach in O(T + blocks^2); ``create_block_mask`` would evaluate all pairs. It
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
from megatron_sep.kernels.grouped import is_grouped
from megatron_sep.kernels.sep_attention.scores import DistanceBias

BLOCK = 128


def flex_sep_attention(
    q_BHQD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    plan: MaskPlan,
    scale: float,
    *,
    bias: DistanceBias | None = None,
) -> Tensor:
    """FlexAttention under the plan's rule, compiled: [B, H, Q, D]. On CPU there is no backward pass."""
    grouped = is_grouped(q_BHQD, k_BHTD)
    out: Tensor = _compiled()(
        q_BHQD,
        k_BHTD,
        v_BHTD,
        score_mod=None if bias is None else falling(bias, plan),
        block_mask=block_mask(plan, _block(q_BHQD.device, plan)),
        scale=scale,
        enable_gqa=grouped,
    )
    return out


def _block(device: torch.device, plan: MaskPlan) -> int:
    """On the CPU torch 2.13 computes wrong rows where a block is longer than what it cuts."""
    if device.type == "cuda":
        return BLOCK
    shortest = min(plan.num_queries, plan.reach_BT.shape[1])
    return min(BLOCK, 1 << (shortest.bit_length() - 1))


def falling(bias: DistanceBias, plan: MaskPlan) -> Callable[..., Tensor]:
    """FlexAttention's change of a score for ALiBi."""
    slopes_H, position_BT, first = bias.slopes_H, bias.position_BT, plan.queries.start

    def by_index(score: Tensor, _b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - slopes_H[h] * (q + first - k)

    def by_position(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert position_BT is not None
        return score - slopes_H[h] * (position_BT[b, q + first] - position_BT[b, k])

    return by_index if position_BT is None else by_position


def block_any_all(plan: MaskPlan, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Per block of queries (M) and of keys (N): does any pair see, do all pairs see? bool [B, M, N] each.

    A key j is seen from j to ``j + reach[j] - 1``. So a pair sees iff a key stands before the last query's next and the
    furthest reach goes past the first query, and all do iff no key stands after the first query and the shortest reach
    goes past the last one.
    """
    batch, length = plan.reach_BT.shape
    device = plan.reach_BT.device
    first_key_N, past_key_N = _edges(range(length), block, device)
    first_query_M1, past_query_M1 = (edge_M[:, None] for edge_M in _edges(plan.queries, block, device))
    end_BT = torch.arange(length, device=device) + plan.reach_BT
    missing = (0, -length % block)
    furthest_B1N = pad(end_BT, missing, value=0).view(batch, 1, -1, block).amax(3)
    shortest_B1N = pad(end_BT, missing, value=length).view(batch, 1, -1, block).amin(3)
    some = (first_key_N < past_query_M1) & (furthest_B1N > first_query_M1)
    every = (past_key_N <= first_query_M1 + 1) & (shortest_B1N >= past_query_M1)
    return some, every


def _edges(positions: range, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first position of each block of a span, and the one after its last."""
    first = torch.arange(positions.start, positions.stop, block, device=device)
    return first, (first + block).clamp(max=positions.stop)


def block_mask(plan: MaskPlan, block: int = BLOCK) -> BlockMask:
    """FlexAttention's mask for a plan, without looking at single pairs."""
    some, every = block_any_all(plan, block)
    first = plan.queries.start

    def mask_mod(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return plan.visible(b, q + first, k)

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(plan.num_queries, plan.reach_BT.shape[1]),
    )


def _ordered(table_BMN: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, 1, M] and column indices, chosen ones first, [B, 1, M, N], as FlexAttention wants them."""
    table = table_BMN[:, None].to(torch.int8)
    indices = table.argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32), indices.to(torch.int32)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
