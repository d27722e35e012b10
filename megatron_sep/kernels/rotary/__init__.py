"""Queries, keys and values out of one matrix product's output, queries and keys rotated (arXiv 2104.09864, 3.4.2)."""

from typing import Protocol

from torch import Tensor


class SplitRotated(Protocol):
    """What a row of ``split_rotated`` names."""

    def __call__(
        self, qkv_SBX: Tensor, bias: Tensor | None, angle: Tensor | None, groups: int, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, B, heads, D], keys and values [S, B, groups, D] of qkv + bias; rounded once, at the end.

        X holds for each group its queries' heads, its key and its value, D = ``size`` numbers each. ``angle``
        [S, 1 or B, R / 2], fp32 radians, turns the numbers d and d + R / 2 of queries and keys; those from R on stay.
        Without an angle nothing turns.
        """
        ...
