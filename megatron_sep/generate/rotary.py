"""Rotary positions (arXiv 2104.09864, in halves as GPT-NeoX and Llama) for a cache that stores its keys unrotated."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sep.kernels.sep_decode.reference import rotate


@dataclass
class Rotary:
    """Angles of a model: position times ``inverse_frequency``, fp32 [N / 2] for the first N dimensions of a head."""

    inverse_frequency: Tensor
    _tables: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions 0 .. length - 1 (at least): fp32 [.., N / 2], kept for the next call."""
        tables = self._tables
        if tables is None or len(tables[0]) < length:
            position = torch.arange(length, device=self.inverse_frequency.device, dtype=torch.float32)
            angle = position[:, None] * self.inverse_frequency.float()
            tables = self._tables = angle.cos(), angle.sin()
        return tables

    def rotate(self, x_HTD: Tensor, first: int) -> Tensor:
        """Heads [H, T, D] rotated by the positions first .. first + T - 1; dimensions beyond N stay as they are."""
        last = first + x_HTD.shape[1]
        cos_TN, sin_TN = (table[first:last] for table in self.tables(last))
        return rotate(x_HTD, cos_TN, sin_TN).to(x_HTD.dtype)

    def angles(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cos and sin of one position, [N / 2], and of those up to it, [index + 1, N / 2]."""
        cos, sin = self.tables(index + 1)
        return cos[index], sin[index], cos[: index + 1], sin[: index + 1]
