"""What the end of a step does to the tables of slots: tensors alone, without a look at their results.

It is a function of its own so that it can be compiled as one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sep.generate.chunk import TokenPolicy


def count_step(
    reach_end_RC: Tensor, length_R: Tensor, seen_R: Tensor, live_R: Tensor, full_R: Tensor
) -> None:  # fmt: skip
    """Count the token of each row, which is in slot ``length``, and what it saw; in place."""
    slot = torch.arange(reach_end_RC.shape[1], device=reach_end_RC.device)
    live_R += ((reach_end_RC > seen_R[:, None]) & (slot <= length_R[:, None])).sum(1)
    seen_R += 1
    full_R += seen_R
    length_R += 1


def evict(
    policy: TokenPolicy, tables: Sequence[Tensor], length_R: Tensor, seen_R: Tensor, slack: int, back: int
) -> tuple[Tensor, Tensor]:
    """Let leave what nothing sees any more, where enough of it stands or the capacity is reached; in place.

    ``tables`` are place, end of reach, landmark of the slots, [R, C], and what else moves with them; ``back`` tokens
    may be taken back. Returns which slot each of the first slots takes its token from, int32 [R, C], and which rows
    moved, bool [R].
    """
    reach_end_RC, landmark_RC = tables[1:3]
    kept_RC = policy.survivors(landmark_RC, length_R)
    if policy.capacity is None:
        kept_RC = kept_RC & (reach_end_RC > seen_R[:, None] - back)
        due_R = length_R - kept_RC.sum(1) >= slack
    else:
        due_R = length_R >= policy.capacity
    slots = landmark_RC.shape[1]
    slot, rank_RC = torch.arange(slots, device=kept_RC.device), kept_RC.cumsum(1)
    source_RC = slot.new_zeros(len(kept_RC), slots + 1)
    source_RC.scatter_(1, torch.where(kept_RC, rank_RC - 1, slots), slot.expand_as(kept_RC))
    source_RC = torch.where(due_R[:, None], source_RC[:, :-1], slot)
    for table_RC in tables:
        table_RC.copy_(table_RC.gather(1, source_RC))
    length_R.copy_(torch.where(due_R, rank_RC[:, -1], length_R))
    return source_RC.to(torch.int32), due_R
