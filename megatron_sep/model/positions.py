"""What the layers of a decoder are told of where its tokens stand: angles to turn by, or a bias of distance."""

from typing import TypeAlias

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_sep.config.schema import ModelConfig
from megatron_sep.kernels.sep_attention.scores import DistanceBias, alibi_slopes
from megatron_sep.parallel.topology import Topology

Told: TypeAlias = Tensor | DistanceBias | None
"""Angles fp32 [T, 1 or B, 1, rotated values of a head], or ALiBi."""


class Positions:
    """Of one model on one rank. It holds nothing of a micro-batch, of which several may be under way."""

    def __init__(self, model: ModelConfig, rotary: RotaryEmbedding | None, topology: Topology) -> None:
        self.bilevel = model.position.bilevel
        self._rotary = rotary
        own = alibi_slopes(model.num_attention_heads).chunk(topology.tensor.size)[topology.tensor.rank]
        self._slopes_H = None if model.position.rotates else own.to(topology.device)

    def told(self, position_ids: Tensor, by_index: Tensor | None) -> Told:
        """``position_ids``: [B, T], or [2, B, T], segments and places; ``by_index``: angles of the indices in a row."""
        if self._slopes_H is not None:
            return DistanceBias(self._slopes_H, position_ids[0].int() if self.bilevel else None)
        return self._angles(position_ids[0]) if self.bilevel else by_index

    def _angles(self, segment_BT: Tensor) -> Tensor:
        assert self._rotary is not None
        half_TBN = segment_BT.T[:, :, None] * self._rotary.inv_freq.to(segment_BT.device)
        return torch.cat([half_TBN, half_TBN], -1)[:, :, None]
