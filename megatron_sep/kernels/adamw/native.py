"""torch's AdamW, all parameters of a type in one fused kernel."""

from torch import optim

from megatron_sep.kernels.adamw import AdamW, step_and_moments

ADAMW = AdamW("torch", optim.AdamW, {"fused": True}, step_and_moments, skips_by_itself=True)
