"""GPTNeoX and Llama of transformers with Sep-Attention; shipped inside an export beside `sep_pattern.py`.

`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` computes what the model was trained with, from
`sep_attention` of config.json and transformers alone: the result is that of the training mask, and a DynamicCache,
which `generate` makes, keeps the keys and values that can still be seen and frees the others.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GPTNeoXForCausalLM, LlamaForCausalLM

from .sep_cache import columns_in, free, ids_in, prepare, remember
from .sep_pattern import AttentionPattern, document_numbers

_CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls a cache: since 5.24, and before."""


class SepAttention:
    """Gives each layer the mask of its pattern. The model holds no text: what a text needs goes with its cache."""

    _auto_class = "AutoModelForCausalLM"  # so that every transformers 5 saves this file along with the weights

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        sep = config.sep_attention
        full = set(sep["full_layers"])
        pattern = AttentionPattern(sep["window"], sep["sinks"], tuple(sep["separator_ids"]), sep["stride"])
        own = [AttentionPattern() if i in full else pattern for i in range(config.num_hidden_layers)]
        self._patterns = list(dict.fromkeys(own))
        self._pattern_of_layer = [self._patterns.index(each) for each in own]
        self._document_end = sep["document_end"]
        self._cache_name = _cache_name(self.base_model)
        self.base_model.register_forward_pre_hook(self._see, with_kwargs=True)
        self.base_model.register_forward_hook(_remember, with_kwargs=True)
        for number, layer in enumerate(self.base_model.layers):
            layer.register_forward_pre_hook(_MaskOf(number, self._pattern_of_layer[number]), with_kwargs=True)

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
        kwargs = dict(kwargs)
        cache = self._cache_for(kwargs)
        ids = _with_past(kwargs["input_ids"], cache)
        real = _real(kwargs.get("attention_mask"), ids)
        _check_positions(kwargs.get("position_ids"), real)
        plans = self._plans(ids, real)
        if cache is not None:
            free(cache, plans)
        masks = self._masks(plans, kwargs["input_ids"].shape[1], cache)
        return (), kwargs | {"attention_mask": masks, self._cache_name: cache}

    def _cache_for(self, kwargs: dict[str, Any]) -> Any:
        """Take the cache out of the call, or make one where one is wanted; an empty one is told what to keep."""
        given = [kwargs.pop(name, None) for name in _CACHE_NAMES]
        cache, wanted = next((each for each in given if each is not None), None), kwargs.get("use_cache")
        if cache is None and (self.config.use_cache if wanted is None else wanted):
            cache = DynamicCache(config=self.config)
        if cache is not None and not cache.get_seq_length():
            prepare(cache, self._pattern_of_layer, [pattern.evicts for pattern in self._patterns])
        return cache

    def _plans(self, ids: Tensor, real: Tensor) -> list[Any]:
        """Of each pattern over all tokens so far; padding is a document of its own."""
        document = real.long()
        if self._document_end is not None:
            document = document + 2 * document_numbers(ids, self._document_end)
        return [pattern.plan(ids, document) for pattern in self._patterns]

    def _masks(self, plans: list[Any], queries: int, cache: Any) -> Tensor:
        """[B, patterns, queries, keys], 0 where a query sees a key; a pattern with fewer keys has them at the end."""
        seen = [_seen(plan, queries, columns_in(cache, number)) for number, plan in enumerate(plans)]
        most = max(each.shape[-1] for each in seen)
        whole = torch.stack([torch.nn.functional.pad(each, (most - each.shape[-1], 0)) for each in seen], 1)
        return torch.zeros_like(whole, dtype=self.dtype).masked_fill(~whole, torch.finfo(self.dtype).min)


def _cache_name(model: torch.nn.Module) -> str:
    return next(name for name in _CACHE_NAMES if name in signature(model.forward).parameters)


def _remember(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
    """A hook that leaves the ids of the new tokens in the cache."""
    cache = next((output[name] for name in _CACHE_NAMES if name in output), None) if isinstance(output, dict) else None
    if cache is not None and ids_in(cache) is not None and cache.get_seq_length():
        remember(cache, kwargs["input_ids"])


def _seen(plan: Any, queries: int, columns_BC: Any) -> Tensor:
    """Which keys the last tokens see: bool [B, queries, keys]. The keys are all, or some older ones and theirs."""
    length = plan.reach_BT.shape[1]
    new = range(length - queries, length)
    if columns_BC is None:
        return plan.of_queries(new).dense()
    new_Q = torch.arange(new.start, new.stop, device=columns_BC.device)
    columns_BC = torch.cat([columns_BC, new_Q.expand(len(columns_BC), -1)], 1)
    row_B11 = torch.arange(len(columns_BC), device=columns_BC.device)[:, None, None]
    seen_BQC = plan.visible(row_B11, new_Q[:, None], columns_BC.clamp(min=0)[:, None])
    return seen_BQC & (columns_BC >= 0)[:, None]


class _MaskOf:
    """A hook that leaves a layer, of the masks of all patterns, its own, for the keys that it attends to."""

    def __init__(self, layer: int, pattern: int) -> None:
        self.layer, self.pattern = layer, pattern

    def __call__(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"][:, self.pattern : self.pattern + 1]
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if cache is not None:
            layer = cache.layers[self.layer]
            mask = mask[..., -(getattr(layer, "held", layer.get_seq_length()) + mask.shape[2]) :]
        return args, kwargs | {"attention_mask": mask}


def _with_past(input_ids: Tensor, cache: Any) -> Tensor:
    """All ids up to now."""
    length = 0 if cache is None else int(cache.get_seq_length())
    if not length:
        return input_ids
    ids = ids_in(cache)
    if ids is None or ids.get_seq_length() != length:
        raise ValueError("the cache was not made by this model: the ids of its tokens are not known; start anew")
    if len(ids.keys) != len(input_ids):
        raise ValueError(f"the cache holds {len(ids.keys)} sequences, input_ids {len(input_ids)}; start a new cache")
    return torch.cat([ids.keys[:, 0, :, 0], input_ids], 1)


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
    real = attention_mask == 1
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
        raise ValueError(
            "attention_mask has padding between tokens of a text; pad before or behind it, and pass the mask where the "
            "text itself has the token that generate takes for padding"
        )
    return real


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
