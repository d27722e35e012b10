"""Attention as transformers calls it, computed by the cache of the forward pass that runs."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from megatron_sep.errors import UserError
from megatron_sep.generate.scores import Scoring

NAME = "sep_cache"
"""Of the attention in transformers' table."""


class AttachError(UserError):
    """A model, a policy or a call that does not go together with the cache."""


@dataclass
class Pass:
    """One forward pass through a model."""

    attachment: Any
    """What is installed on the model."""
    cache: Any
    """SepCache: what its layers attend with."""
    keeps: bool
    """Does the cache outlive the pass? If not, layers may run again for the backward pass, as often as they like."""
    former: "Pass | None"
    """The pass of another model that this one stands inside."""
    attended: set[int] = field(default_factory=set)
    """Layers that are through."""
    over: bool = False

    def mask(self, ids_BT: Tensor) -> Tensor:
        """A stand-in for a mask [B, 1, T, 1]: transformers hands it on to each layer, also to one that runs again."""
        mask = torch.empty(*ids_BT.shape, device="meta")[:, None, :, None]
        mask.sep_pass = self  # type: ignore[attr-defined]
        return mask


RUNNING: ContextVar[Pass | None] = ContextVar("running", default=None)
"""The pass that this thread is in. One model may run in many threads, each with a cache of its own."""


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
    current = _pass_of(module, attention_mask)
    if attention_mask is not None and not hasattr(attention_mask, "sep_pass"):
        raise AttachError(
            f"{type(module).__name__}, layer {module.layer_idx}: adds something of its own to the scores, a tensor of "
            f"shape {tuple(attention_mask.shape)}; such a model cannot be attached, detach() lets it run as it was"
        )
    width, expected = kwargs.get("sliding_window"), current.attachment.widths[module.layer_idx]
    if width is not None and width != expected:
        raise AttachError(
            f"{type(module).__name__}, layer {module.layer_idx}: attends within sliding_window={width}, and its "
            f"configuration said {expected}; such a model cannot be attached, detach() lets it run as it was"
        )
    positions = current.attachment.positions
    scoring = Scoring(
        kwargs.get("softcap"), kwargs.get("s_aux"), positions.slopes_H, positions.adjusting, positions.bias_scale
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    own = value.shape[-1]
    size = max(key.shape[-1], own)  # latent attention has values of another size than keys: zeros change nothing
    query, key, value = (pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in (query, key, value))
    out_BHTD = current.cache.attend(module.layer_idx, query, key, value, scale, None if scoring.plain else scoring)
    return out_BHTD[..., :own].transpose(1, 2), None


def _pass_of(module: nn.Module, attention_mask: Tensor | None) -> Pass:
    """The pass that the layer is called in. Raises AttachError for a second call of a layer in the same pass."""
    current: Pass | None = getattr(attention_mask, "sep_pass", None) or RUNNING.get()
    name = type(module).__name__
    if current is None:
        raise AttachError(
            f"{name}: its layers run outside of a forward pass of the model; where that is gradient checkpointing, "
            "call model.gradient_checkpointing_disable()"
        )
    layer: Any = getattr(module, "layer_idx", None)
    if layer in current.attended and not current.over:
        raise AttachError(
            f"{name}: layer {layer} attends twice in a forward pass, and the cache keeps one token once a layer; "
            "such a model cannot be attached, detach() lets it run as it was"
        )
    current.attended.add(layer)
    return current
