"""GPTNeoX and Llama of transformers with Sep-Attention; shipped inside an export beside `sep_pattern.py`.

`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` computes what the model was trained with, from
`sep_attention` of config.json and transformers alone. The cache keeps every token: the result is that of the training
mask, not a smaller memory.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicLayer, GPTNeoXForCausalLM, LlamaForCausalLM

from .sep_pattern import AttentionPattern, document_numbers


class SepAttention:
    """Gives each layer the mask of its pattern. The model holds no text: what a text needs goes with its cache."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        sep = config.sep_attention
        full = set(sep["full_layers"])
        pattern = AttentionPattern(sep["window"], sep["sinks"], tuple(sep["separator_ids"]), sep["stride"])
        own = [AttentionPattern() if i in full else pattern for i in range(config.num_hidden_layers)]
        self._patterns = list(dict.fromkeys(own))
        self._document_end = sep["document_end"]
        self.base_model.register_forward_pre_hook(self._see, with_kwargs=True)
        self.base_model.register_forward_hook(_remember, with_kwargs=True)
        for layer, each in zip(self.base_model.layers, own, strict=True):
            layer.register_forward_pre_hook(_MaskOf(self._patterns.index(each)), with_kwargs=True)

    def _see(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Put the masks of all patterns in the place of the attention mask."""
        if args:
            kwargs, args = {"input_ids": args[0]} | kwargs, args[1:]
        if args or kwargs.get("input_ids") is None:
            raise ValueError("Sep-Attention looks for separators in input_ids; pass them, and all else by name")
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} takes no mask of its own for each layer; "
                "load the model with attn_implementation='sdpa'"
            )
        ids = _with_past(kwargs["input_ids"], kwargs.get("past_key_values"))
        real = _real(kwargs.get("attention_mask"), ids)
        _check_positions(kwargs.get("position_ids"), real)
        return (), kwargs | {"attention_mask": self._masks(ids, real, kwargs["input_ids"].shape[1])}

    def _masks(self, ids: Tensor, real: Tensor, queries: int) -> Tensor:
        """[B, patterns, queries, tokens], 0 where a query sees a key; padding is a document of its own."""
        document = real.long()
        if self._document_end is not None:
            document = document + 2 * document_numbers(ids, self._document_end)
        new = range(ids.shape[1] - queries, ids.shape[1])
        seen = torch.stack([pattern.plan(ids, document, queries=new).dense() for pattern in self._patterns], 1)
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)


class _MaskOf:
    """A hook that leaves a layer, of the masks of all patterns, its own."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": kwargs["attention_mask"][:, self.index : self.index + 1]}


class _Ids(DynamicLayer):
    """The ids of the tokens that a cache holds, as one more layer of it: what moves its texts moves them too."""


def _ids_in(cache: Any) -> Any:
    return next((layer for layer in cache.layers if isinstance(layer, _Ids)), None)


def _with_past(input_ids: Tensor, cache: Any) -> Tensor:
    """All ids up to now."""
    length = 0 if cache is None else int(cache.get_seq_length())
    if cache is not None and cache.get_mask_sizes(input_ids.shape[1], 0)[0] != length + input_ids.shape[1]:
        raise ValueError(f"a {type(cache).__name__} has room of a fixed size; pass a DynamicCache, or none")
    if not length:
        return input_ids
    ids = _ids_in(cache)
    if ids is None or ids.get_seq_length() != length:
        raise ValueError("past_key_values was not made by this model: the ids of its tokens are not known; start anew")
    if len(ids.keys) != len(input_ids):
        raise ValueError(f"the cache holds {len(ids.keys)} sequences, input_ids {len(input_ids)}; start a new cache")
    return torch.cat([ids.keys[:, 0, :, 0], input_ids], 1)


def _remember(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
    """A hook that leaves the ids of the new tokens in the cache."""
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return
    if _ids_in(cache) is None:
        cache.layers.append(_Ids())
    ids = kwargs["input_ids"][:, None, :, None]
    _ids_in(cache).update(ids, ids[..., :0])


def _real(attention_mask: Any, ids: Tensor) -> Tensor:
    """Which of all tokens are no padding: bool [B, T]."""
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    shape = getattr(attention_mask, "shape", None)
    if shape != ids.shape or not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError(
            f"attention_mask of shape {shape and tuple(shape)} for {tuple(ids.shape)} tokens, those of the cache "
            "included: pass 0 at padding and 1 elsewhere, of the shape of the tokens"
        )
    return attention_mask == 1


def _check_positions(position_ids: Any, real: Tensor) -> None:
    """Positions of the new tokens that do not go on by one tell of packed documents."""
    if position_ids is None:
        return
    both = (real[:, 1:] & real[:, :-1])[:, real.shape[1] - position_ids.shape[-1] :]
    if bool(((position_ids.diff() != 1) & both).any()):
        raise ValueError(
            "position_ids do not go on by one: packed documents are not kept apart by them; pass each document as a "
            "row of its own, or train with document_boundaries"
        )


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
