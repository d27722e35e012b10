"""The next token of many texts at once, on the device that has their logits."""

import torch
from torch import Tensor

from megatron_sep.generate.sampler import Sampling

_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""Of the generator splitmix64 (Steele, Lea, Flood 2014), as signed numbers."""


def draw_rows(logits_RV: Tensor, sampling: Sampling, number_R: Tensor, count_R: Tensor) -> Tensor:
    """A token of each row, int64 [R].

    What is drawn follows from the row's logits, the seed, the number of its prompt and how many tokens it has: int64.
    """
    if sampling.temperature == 0:
        return logits_RV.argmax(-1)
    ordered_RV, token_RV = (logits_RV.float() / sampling.temperature).softmax(-1).sort(-1, descending=True)
    before_RV = ordered_RV.cumsum(-1) - ordered_RV
    kept_RV = torch.where(before_RV < sampling.top_p, ordered_RV, 0)
    if sampling.top_k:
        kept_RV[:, sampling.top_k :] = 0
    upto_RV = kept_RV.double().cumsum(-1)
    aim_R1 = uniform(sampling.seed, number_R, count_R)[:, None] * upto_RV[:, -1:]
    place_R1 = torch.searchsorted(upto_RV, aim_R1, right=True)
    last_R1 = (kept_RV > 0).sum(-1, keepdim=True) - 1  # rounding may aim at the very end
    return token_RV.gather(1, torch.minimum(place_R1, last_R1))[:, 0]


def uniform(seed: int, number_R: Tensor, count_R: Tensor) -> Tensor:
    """Numbers from 0 up to 1, float64, by a hash of (seed, number, count): the same on every device."""
    hashed = _mixed(_mixed(_mixed(torch.full_like(number_R, seed)) ^ number_R) ^ count_R)
    return _shifted(hashed, 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, as of a number without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
