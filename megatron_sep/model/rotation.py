"""Frequencies of rotary positions that were slowed down for longer texts."""

import math

import torch
from torch import Tensor

from megatron_sep.config.position import RotaryScalingConfig


def slowed(frequency_N: Tensor, base: int, scaling: RotaryScalingConfig) -> Tensor:
    """Radians a token by which each pair of a head turns, fp32 [N], from those without scaling."""
    return {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[scaling.kind](frequency_N, base, scaling)


def _linear(frequency_N: Tensor, _: int, scaling: RotaryScalingConfig) -> Tensor:
    return frequency_N / scaling.factor


def _llama3(frequency_N: Tensor, _: int, scaling: RotaryScalingConfig) -> Tensor:
    """Llama 3.1's: slow below one number of turns, as they were above another, interpolated in between."""
    turns_N = scaling.original_length * frequency_N / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept_N = ((turns_N - low) / (high - low)).clamp(0, 1)
    return frequency_N * (kept_N + (1 - kept_N) / scaling.factor)


def _yarn(frequency_N: Tensor, base: int, scaling: RotaryScalingConfig) -> Tensor:
    """YaRN's (arXiv 2309.00071, section 3.2): as Llama 3.1's, but interpolated along the dimensions."""
    size = 2 * len(frequency_N)

    def dimension(turns: float) -> float:
        return size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.fast_turns), dimension(scaling.slow_turns)
    if scaling.whole_bounds:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    index_N = torch.arange(len(frequency_N), dtype=torch.float32, device=frequency_N.device)
    slow_N = ((index_N - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return frequency_N * (1 - slow_N + slow_N / scaling.factor)
