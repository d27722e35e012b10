"""torch's AdamW a parameter at a time: the truth that the other rows are held to."""

from torch import optim

from megatron_sep.kernels.adamw import AdamW, step_and_moments

ADAMW = AdamW("torch", optim.AdamW, {"foreach": False, "fused": False}, step_and_moments)
