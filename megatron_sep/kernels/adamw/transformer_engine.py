"""Transformer Engine's FusedAdam, which is AdamW by default."""

from transformer_engine.pytorch.optimizers import FusedAdam

from megatron_sep.kernels.adamw import AdamW, moments

ADAMW = AdamW("transformer_engine", FusedAdam, {}, moments)
