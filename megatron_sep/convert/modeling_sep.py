"""GPTNeoX and Llama of transformers with Sep-Attention; shipped inside an export beside `sep_pattern.py`.

`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` computes what the model was trained with, from
`sep_attention` of config.json and transformers alone. The cache keeps every token: the result is that of the training
mask, not a smaller memory.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM

from .sep_pattern import AttentionPattern, document_numbers


class SepAttention:
    """Gives each layer the mask of its pattern."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        sep = config.sep_attention
        full = set(sep["full_layers"])
        pattern = AttentionPattern(sep["window"], sep["sinks"], tuple(sep["separator_ids"]), sep["stride"])
        self._patterns = [AttentionPattern() if i in full else pattern for i in range(config.num_hidden_layers)]
        self._document_end = sep["document_end"]
        self._masks: dict[AttentionPattern, Tensor] = {}
        for layer, own in zip(self.base_model.layers, self._patterns, strict=True):
            layer.register_forward_pre_hook(_MaskOf(self._masks, own), with_kwargs=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if input_ids is None:
            raise ValueError("Sep-Attention looks for separators in input_ids; inputs_embeds alone has none")
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} takes no mask of its own for each layer; "
                "load the model with attn_implementation='sdpa'"
            )
        ids = _with_past(input_ids, past_key_values)
        self._masks.update(self._masks_of(ids, input_ids.shape[1], attention_mask))
        try:
            output = super().forward(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )
        finally:
            self._masks.clear()
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            cache.sep_ids = ids
        return output

    def _masks_of(self, ids: Tensor, queries: int, attention_mask: Tensor | None) -> dict[AttentionPattern, Tensor]:
        """[B, 1, queries, tokens] for each pattern, 0 where a query sees a key; padding is a document of its own."""
        document = None if self._document_end is None else document_numbers(ids, self._document_end)
        if attention_mask is not None:
            real = attention_mask.long()
            document = real if document is None else 2 * document + real
        new = range(ids.shape[1] - queries, ids.shape[1])
        masks = {}
        for pattern in set(self._patterns):
            seen = pattern.plan(ids, document, queries=new).dense()[:, None]
            masks[pattern] = torch.where(seen, 0.0, torch.finfo(self.dtype).min).to(self.dtype)
        return masks


class _MaskOf:
    """A hook that puts a layer's own mask in the place of the shared one."""

    def __init__(self, masks: dict[AttentionPattern, Tensor], pattern: AttentionPattern) -> None:
        self.masks, self.pattern = masks, pattern

    def __call__(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": self.masks[self.pattern]}


def _with_past(input_ids: Tensor, cache: Any) -> Tensor:
    """All ids up to now; the cache carries those of the tokens it holds."""
    length = 0 if cache is None else cache.get_seq_length()
    if not length:
        return input_ids
    past = getattr(cache, "sep_ids", None)
    if past is None or past.shape[1] != length:
        raise ValueError("past_key_values was not made by this model, or was cut: the ids of its tokens are not known")
    if past.shape[0] != input_ids.shape[0]:
        raise ValueError(f"the cache holds {past.shape[0]} sequences, input_ids {input_ids.shape[0]}")
    return torch.cat([past, input_ids], 1)


class SepGPTNeoXForCausalLM(SepAttention, GPTNeoXForCausalLM):
    """GPT-NeoX and Pythia. On disk the head is embed_out, which transformers 5 renames for its own classes alone."""

    _tied_weights_keys = {"embed_out.weight": "gpt_neox.embed_in.weight"}  # noqa: RUF012

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if "lm_head" in self._modules:
            self._modules["embed_out"] = self._modules.pop("lm_head")

    @property
    def lm_head(self) -> torch.nn.Module:
        return self._modules.get("embed_out") or self._modules["lm_head"]


class SepLlamaForCausalLM(SepAttention, LlamaForCausalLM):
    """Llama 3."""
