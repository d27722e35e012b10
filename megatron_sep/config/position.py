"""What a model makes of where a token stands, and of the scores of its attention; neither touches who sees whom."""

from math import log
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_sep.config.section import NonNegativeInt, PositiveInt, Section
from megatron_sep.config.separators import Separators


class PositionConfig(Section):
    """How a model knows where a token stands. The defaults are rotary positions."""

    kind: Literal["rotary", "alibi", "bipe"] = "rotary"
    """rotary: queries and keys turn (arXiv 2104.09864). alibi: scores fall with the distance (arXiv 2108.12409). bipe:
    a learned vector for the place in a segment, the segments numbered (arXiv 2401.16421)."""
    segments: Literal["rotary", "alibi"] = "rotary"
    """bipe: what takes the number of the segment in place of the position in the row."""
    separators: Separators = "default"
    """bipe: what ends a segment, as `attention.separators` has it."""
    separator_ids: tuple[NonNegativeInt, ...] = ()
    """bipe: more of them by token id."""
    length: PositiveInt = 2048
    """bipe: learned places of a segment; a token beyond the last one has the last one."""

    @property
    def rotates(self) -> bool:
        """Do queries and keys turn?"""
        return "rotary" in (self.kind, self.segments if self.kind == "bipe" else "")

    @property
    def bilevel(self) -> bool:
        """Do separators cut the row into segments?"""
        return self.kind == "bipe"

    @model_validator(mode="after")
    def _segments_are_of_bipe(self) -> Self:
        fields = ("segments", "separators", "separator_ids", "length")
        foreign = [f for f in fields if getattr(self, f) != type(self).model_fields[f].default]
        if self.kind != "bipe" and foreign:
            raise ValueError(f"{', '.join(foreign)}: of kind bipe alone, kind={self.kind} has no segments")
        return self


class SelfAdjustingConfig(Section):
    """Self-adjusting softmax (arXiv 2502.18277): the weights p of a softmax times its scores s.

    With the denominator a weight is p (s - low + numerator_bias) / (high - low), low = min(0, least score) and high =
    max(0, largest score) + denominator_bias over the keys that a query sees; without it p s.
    """

    denominator: bool = True
    numerator_bias: float = 0.0
    denominator_bias: Annotated[float, Field(gt=0)] = 1e-10

    @model_validator(mode="after")
    def _biases_need_the_denominator(self) -> Self:
        if not self.denominator and (self.numerator_bias, self.denominator_bias) != (0.0, 1e-10):
            raise ValueError("denominator=false: has no numerator_bias and no denominator_bias")
        return self


class RotaryScalingConfig(Section):
    """Rotations slowed down for longer texts."""

    kind: Literal["llama3", "linear", "yarn"] = "llama3"
    """llama3: slow rotations alone, as Llama 3.1 does. linear: all alike. yarn: as llama3, by other bounds, and queries
    and keys grow (arXiv 2309.00071)."""
    factor: Annotated[float, Field(ge=1)] = 8.0
    """Slow rotations become so many times slower."""
    low_frequency_factor: Annotated[float, Field(gt=0)] = 1.0
    """llama3: rotations of fewer turns than this in `original_length` tokens are slow."""
    high_frequency_factor: Annotated[float, Field(gt=0)] = 4.0
    """llama3: rotations of more turns than this stay as they are; between the two they are interpolated."""
    original_length: PositiveInt = 8192
    """llama3, yarn: tokens of a sequence before the text grew longer."""
    slow_turns: Annotated[float, Field(gt=0)] = 1.0
    """yarn: rotations of fewer turns in `original_length` tokens are slow (beta_slow)."""
    fast_turns: Annotated[float, Field(gt=0)] = 32.0
    """yarn: rotations of more turns stay as they are (beta_fast)."""
    whole_bounds: bool = True
    """yarn: the bounds are rounded outwards to whole dimensions (truncate)."""
    growth: Annotated[float, Field(gt=0)] | None = None
    """yarn: queries and keys grow so many times; null: 0.1 ln(factor) + 1 (attention_factor)."""

    @property
    def grown(self) -> float:
        """What the rotated part of queries and keys is multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * log(self.factor) + 1.0 if self.growth is None else self.growth

    @model_validator(mode="after")
    def _bands_are_apart(self) -> Self:
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor={self.low_frequency_factor} must be below "
                f"high_frequency_factor={self.high_frequency_factor}"
            )
        if self.slow_turns >= self.fast_turns:
            raise ValueError(f"slow_turns={self.slow_turns} must be below fast_turns={self.fast_turns}")
        return self

    @model_validator(mode="after")
    def _each_kind_has_its_own(self) -> Self:
        others = {
            "llama3": ("slow_turns", "fast_turns", "whole_bounds", "growth"),
            "linear": (
                "low_frequency_factor",
                "high_frequency_factor",
                "original_length",
                "slow_turns",
                "fast_turns",
                "whole_bounds",
                "growth",
            ),
            "yarn": ("low_frequency_factor", "high_frequency_factor"),
        }[self.kind]
        foreign = [name for name in others if getattr(self, name) != type(self).model_fields[name].default]
        if foreign:
            raise ValueError(f"{', '.join(foreign)}: not of kind {self.kind}")
        return self
