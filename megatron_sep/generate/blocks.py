"""Which blocks of the paper's section 3.2 the tokens in slots belong to."""

from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.pattern import FOREVER


def blocks_of(slots: Any) -> dict[str, Tensor]:
    """Slots in use by block, int64 [R] each; a separator in the window counts as window.

    Where an eviction is due at a capacity, those of the past window, which have come since the last one, are told
    from those that it left: between them and the newest token nothing is missing.
    """
    slot = torch.arange(slots.num_slots, device=slots.device)
    used_RC = slot < slots.length_R[:, None]
    sink_RC = used_RC & (slots.place_RC - slots.document_R[:, None] < slots.policy.sinks)
    window = slots.policy.window
    since_R = slots.seen_R - (FOREVER if window is None else window)
    window_RC = used_RC & ~sink_RC & (slots.place_RC >= since_R[:, None])
    kept_RC = used_RC & ~sink_RC & ~window_RC & slots.landmark_RC
    past_RC = used_RC & ~sink_RC & ~window_RC & ~kept_RC
    dead_RC = past_RC & (slots.reach_end_RC <= slots.seen_R[:, None])
    since_RC = slots.place_RC - slot == (slots.seen_R - slots.length_R)[:, None]
    new_RC = kept_RC & since_RC if slots.policy.capacity is not None else torch.zeros_like(kept_RC)
    masks = {
        "sinks": sink_RC,
        "separators": kept_RC & ~new_RC,
        "separators of the past window": new_RC,
        "past window": past_RC & ~dead_RC,
        "to be freed": dead_RC,
        "window": window_RC,
    }
    return {name: mask_RC.sum(1) for name, mask_RC in masks.items()}
