"""Attention as transformers calls it, computed by the cache of the model that the layer belongs to."""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_sep.errors import UserError

NAME = "sep_cache"
"""Of the attention in transformers' table."""


class AttachError(UserError):
    """A model or a policy that does not go together with the cache."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: q [B, H, T, D] and new k, v [B, K, T, D] to [B, T, H, D]. Raises AttachError."""
    del attention_mask
    strange = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if strange:
        raise AttachError(f"{type(module).__name__}: attention with {', '.join(strange)} is not known to the cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attachment: Any = module.sep_attachment
    return attachment.cache.attend(module.layer_idx, query, key, value, scale).transpose(1, 2), None
