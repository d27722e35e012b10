"""Models of transformers that compute attention in a class of their own, not through the interface: these do both.

The weights are those of the class that they take the place of. Falcon keeps keys and values once for each group of
query heads; ALiBi's bias (Falcon, BLOOM, MPT) is left to the cache, which knows where its keys stand.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from megatron_sep.generate.interface import attention
from megatron_sep.generate.positions import ModelPositions
from megatron_sep.kernels.sep_attention.scores import alibi_slopes


class SepFalconAttention(FalconAttention):  # type: ignore[misc]
    """Of Falcon."""

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, hidden] to the same."""
        q, k, v = (t.transpose(1, 2) for t in self._split_heads(self.query_key_value(hidden_states)))
        if self.new_decoder_architecture:  # one key head was spread over its group
            group = self.num_heads // self.num_kv_heads
            k, v = k[:, ::group], v[:, ::group]
        if alibi is None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out_BTHD, _weights = attention(self, q, k, v, attention_mask)
        return self.dense(out_BTHD.flatten(2)), None


class SepBloomAttention(BloomAttention):  # type: ignore[misc]
    """Of BLOOM."""

    def forward(
        self, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        """[B, T, hidden] to the same, the residual added."""
        del alibi
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        out_BTHD, _weights = attention(self, q, k, v, attention_mask)
        dropped = nn.functional.dropout(self.dense(out_BTHD.flatten(2)), self.hidden_dropout, self.training)
        return residual + dropped, None


class SepMptAttention(MptAttention):  # type: ignore[misc]
    """Of MPT."""

    def forward(
        self, hidden_states: Tensor, position_bias: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """[B, T, hidden] to the same."""
        del position_bias
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = (t.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for t in mixed.chunk(3, dim=2))
        told = attention_mask if hasattr(attention_mask, "sep_pass") else None  # a pass with a cache turned it to bool
        out_BTHD, _weights = attention(self, q, k, v, told, scaling=self.softmax_scale)
        return self.out_proj(out_BTHD.flatten(2)), None


_REPLACED = {
    FalconAttention: SepFalconAttention,
    BloomAttention: SepBloomAttention,
    MptAttention: SepMptAttention,
}


def has_own_attention(model: PreTrainedModel) -> bool:
    """Does the model have one of these classes?"""
    return any(isinstance(module, tuple(_REPLACED)) for module in model.modules())


def replace_attention(model: PreTrainedModel, back: bool = False) -> None:
    """Change the class of such attention modules in place, or change it back."""
    change = {ours: theirs for theirs, ours in _REPLACED.items()} if back else _REPLACED
    for module in model.modules():
        found = change.get(type(module))
        if found is not None:
            module.__class__ = found


def alibi_of(decoder: PreTrainedModel) -> ModelPositions:
    """The bias that the model itself would add: slopes by head; none of a model without ALiBi.

    Falcon computes its bias in bf16 and scales it with the scores.
    """
    config, slopes_H = decoder.config, None
    if config.model_type == "falcon" and config.alibi:
        scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        return ModelPositions(alibi_slopes(config.num_attention_heads).to(decoder.device), bias_scale=scale)
    if config.model_type == "bloom":
        slopes_H = alibi_slopes(config.num_attention_heads)
    elif config.model_type == "mpt":
        slopes_H = -build_mpt_alibi_tensor(config.n_heads, 2)[:, 0, 0]
    return ModelPositions(None if slopes_H is None else slopes_H.to(decoder.device, torch.float32))
