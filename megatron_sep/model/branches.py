"""The two branches of a layer on megatron-core's matrix products, with fused operations between these."""

from typing import Any

from megatron.core.transformer import attention, mlp
from torch import Tensor
from torch.nn.functional import gelu

from megatron_sep.attention.context import ContextPlan
from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.kernels.gelu import BiasGelu
from megatron_sep.kernels.rotary import SplitRotated


class SelfAttention(attention.SelfAttention):  # type: ignore[misc]
    """One matrix product makes queries, keys and values; its bias waits for the pass that splits and rotates them."""

    def __init__(self, *args: Any, split_rotated: SplitRotated, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.split_rotated = split_rotated
        self.linear_qkv.skip_bias_add = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: MaskPlan | ContextPlan,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, hidden], angles [S, 1 or B, 1, R], each twice; the output and the bias to add to it."""
        packed, bias = self.linear_qkv(hidden_states)
        angle = None if rotary_pos_emb is None else rotary_pos_emb[:, :, 0, : rotary_pos_emb.shape[3] // 2]
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        query, key, value = self.split_rotated(packed, bias, angle, groups, size)
        output: tuple[Tensor, Tensor | None] = self.linear_proj(self.core_attention(query, key, value, attention_mask))
        return output


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
