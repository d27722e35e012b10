"""Positions and softmax of a model beyond rotary ones and the plain softmax, which the cache brings to it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_sep.attention.bilevel import Bilevel
from megatron_sep.config.position import SelfAdjustingConfig
from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.policies import ScorePolicy

_NAME = "sep_positions"
"""Under which a decoder has them."""


@dataclass(frozen=True, eq=False)
class ModelPositions:
    """Of one model. All its defaults together are a model as transformers has it."""

    slopes_H: Tensor | None = None
    """fp32, of each query head (ALiBi): then nothing turns."""
    bilevel: Bilevel | None = None
    """How tokens are counted by segments."""
    places: nn.Embedding | None = None
    """What is added to the embedding of a token for its place in the segment."""
    adjusting: SelfAdjustingConfig | None = None
    """The self-adjusting softmax."""
    bias_scale: float | None = None
    """Falcon's: the bias is a product in bf16 of slope and the key's position, times this; None: it is exact."""

    def check(self, policies: tuple[Any, ...]) -> None:
        """Raises AttachError for policies that count positions in a way that these do not have."""
        flat = [part for policy in policies for part in (policy if isinstance(policy, tuple) else (policy,))]
        scored = next((part for part in flat if isinstance(part, ScorePolicy)), None)
        if scored is not None and str(self):
            raise AttachError(f"{scored}: looks at scores of the plain kind, and the model has {self}; pass a pattern")
        counted = {part.positions for part in flat}
        rounded = self.bias_scale is not None
        by_distance = self.slopes_H is not None and self.bilevel is None and self.adjusting is None and not rounded
        if str(self) and not counted <= ({"text", "cache"} if by_distance else {"text"}):
            raise AttachError(
                f"positions={', '.join(sorted(counted))!r}: a model with {self} counts them in the text; pass "
                "positions='text'"
            )

    def __str__(self) -> str:
        names = {"bilevel positions": self.bilevel, "ALiBi": self.slopes_H, "self-adjusting softmax": self.adjusting}
        return " and ".join(name for name, value in names.items() if value is not None)


def install(decoder: PreTrainedModel, positions: ModelPositions) -> None:
    """Give a decoder its positions, which it computes under ``attach`` alone: without, it refuses to run."""
    setattr(decoder, _NAME, positions)
    decoder.register_forward_pre_hook(_refuse_alone)


def installed(decoder: PreTrainedModel) -> ModelPositions | None:
    """What ``install`` gave."""
    return getattr(decoder, _NAME, None)


def _refuse_alone(decoder: nn.Module, _: Any) -> None:
    if getattr(decoder, "sep_attachment", None) is None:
        raise AttachError(
            f"{type(decoder).__name__}: has {getattr(decoder, _NAME)}, which transformers does not compute; call "
            "attach(model, AttentionPattern()), or attach with another policy"
        )
