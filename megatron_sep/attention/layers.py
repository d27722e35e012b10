"""One pattern a layer: hybrid models see everything in some layers (H and H/T of arXiv 2412.12094, section 4.3)."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.errors import UserError


class LayerError(UserError):
    """A layer that the model does not have."""


def layer_patterns(
    pattern: AttentionPattern, num_layers: int, full_layers: Iterable[int] = ()
) -> tuple[AttentionPattern, ...]:
    """``pattern`` in every layer but ``full_layers``, which see every earlier token.

    Layers count from 0; a negative index counts from the last layer. Raises LayerError for one that is not there.
    """
    patterns = [pattern] * num_layers
    for layer in full_layers:
        if not -num_layers <= layer < num_layers:
            raise LayerError(f"attention.full_layers: {layer} is no layer of a model with {num_layers}")
        patterns[layer] = AttentionPattern()
    return tuple(patterns)


def plan_layers(
    patterns: Sequence[AttentionPattern], ids_BT: Tensor, document_BT: Tensor | None = None
) -> tuple[MaskPlan, ...]:
    """The plan of each layer for ids [B, T] (see ``AttentionPattern.plan``); layers of a pattern share one plan."""
    plans = {pattern: pattern.plan(ids_BT, document_BT) for pattern in dict.fromkeys(patterns)}
    return tuple(plans[pattern] for pattern in patterns)
