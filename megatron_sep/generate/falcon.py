"""Falcon of transformers computes attention in its own class, not through the interface: this one does both."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from megatron_sep.generate.interface import attention


class SepFalconAttention(FalconAttention):  # type: ignore[misc]
    """The weights of FalconAttention; its keys and values are kept once for each group of query heads."""

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, hidden] to the same."""
        del alibi
        q, k, v = (t.transpose(1, 2) for t in self._split_heads(self.query_key_value(hidden_states)))
        if self.new_decoder_architecture:  # one key head was spread over its group
            group = self.num_heads // self.num_kv_heads
            k, v = k[:, ::group], v[:, ::group]
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out_BTHD, _weights = attention(self, q, k, v, attention_mask)
        return self.dense(out_BTHD.flatten(2)), None


def is_falcon(model: PreTrainedModel) -> bool:
    """Does the model have Falcon's attention?"""
    return any(isinstance(module, FalconAttention) for module in model.modules())


def replace_attention(model: PreTrainedModel, back: bool = False) -> None:
    """Change the class of Falcon's attention modules in place, or change it back."""
    ours, theirs = (FalconAttention, SepFalconAttention) if back else (SepFalconAttention, FalconAttention)
    for module in model.modules():
        if isinstance(module, theirs):
            module.__class__ = ours
