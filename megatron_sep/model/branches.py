"""The two branches of a layer on megatron-core's matrix products, with fused operations between these."""

from typing import Any

import torch
from megatron.core.transformer import attention, mlp
from torch import Tensor
from torch.nn.functional import gelu

from megatron_sep.attention.context import ContextPlan
from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.kernels.gelu import BiasGelu
from megatron_sep.kernels.rotary import SplitRotated
from megatron_sep.kernels.sep_attention.scores import DistanceBias
from megatron_sep.model.positions import Told


class SelfAttention(attention.SelfAttention):  # type: ignore[misc]
    """One matrix product makes queries, keys and values; its bias waits for the pass that splits and rotates them.

    ``growth`` multiplies the rotated part of queries and keys (YaRN).
    """

    def __init__(self, *args: Any, split_rotated: SplitRotated, growth: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.split_rotated, self.growth = split_rotated, growth
        self.linear_qkv.skip_bias_add = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: MaskPlan | ContextPlan,
        rotary_pos_emb: Told = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, hidden]; angles [S, 1 or B, 1, R], each twice, or a bias of distance in their place.

        The output and the bias to add to it.
        """
        packed, bias = self.linear_qkv(hidden_states)
        angles, bias_of_distance = (
            (None, rotary_pos_emb) if isinstance(rotary_pos_emb, DistanceBias) else (rotary_pos_emb, None)
        )
        angle = None if angles is None else angles[:, :, 0, : angles.shape[3] // 2]
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        query, key, value = self.split_rotated(packed, bias, angle, groups, size)
        if angle is not None and self.growth != 1.0:
            query, key = (_grown(x, 2 * angle.shape[2], self.growth) for x in (query, key))
        attended = self.core_attention(query, key, value, attention_mask, attention_bias=bias_of_distance)
        output: tuple[Tensor, Tensor | None] = self.linear_proj(attended)
        return output


def _grown(x_SBHD: Tensor, rotated: int, times: float) -> Tensor:
    return torch.cat([x_SBHD[..., :rotated] * times, x_SBHD[..., rotated:]], -1)


def transform(layer: mlp.MLP, bias_gelu: BiasGelu, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
    """megatron-core's MLP of hidden_states [S, B, hidden], its first bias taken along by GELU.

    The output and the bias to add to it. Other activations are megatron-core's.
    """
    output: tuple[Tensor, Tensor | None]
    if layer.linear_fc1.bias is None or layer.activation_func is not gelu or layer.config.gated_linear_unit:
        output = layer(hidden_states)
        return output
    packed, bias = layer.linear_fc1(hidden_states)
    output = layer.linear_fc2(bias_gelu(packed, bias))
    return output
