"""FusedAdam of NVIDIA's apex, which is AdamW by default."""

from apex.optimizers import FusedAdam

from megatron_sep.kernels.adamw import AdamW, moments

ADAMW = AdamW("apex", FusedAdam, {}, moments)
