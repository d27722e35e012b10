"""Give a causal model of transformers a SepCache: its attention goes through transformers' attention interface.

model = AutoModelForCausalLM.from_pretrained(...)
attach(model, AttentionPattern(window=64, sinks=3, separator_ids=(...)))
model.generate(...)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.generate.architecture import (
    CACHE_NAMES,
    cache_name,
    check_architecture,
    decoder_of,
    outer_models,
    parameters,
    rotary_of,
    widths_of,
)
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.interface import NAME, RUNNING, AttachError, Pass, attention
from megatron_sep.generate.layer_policies import LayerPolicy, first_policy
from megatron_sep.generate.limited import limited
from megatron_sep.generate.own_attention import alibi_of, replace_attention
from megatron_sep.generate.policies import ScorePolicy
from megatron_sep.generate.positions import ModelPositions, installed
from megatron_sep.generate.text import note_text, text_of


@dataclass(eq=False)
class Attachment:
    """What ``attach`` installed on a model; ``detach`` takes it away. It holds no text: any number may be under way."""

    decoder: PreTrainedModel
    """The part of the model that has the layers."""
    policies: tuple[LayerPolicy, ...]
    """Of each layer, within its sliding window where it has one."""
    widths: tuple[int | None, ...]
    """The sliding window of each layer."""
    options: dict[str, Any]
    """Keyword arguments of SepCache."""
    positions: ModelPositions
    """Those of the model, as far as transformers does not compute them."""
    _parameters: list[str]
    """Of its forward pass, in order."""
    _cache_name: str
    """Of those the one that is the cache."""
    _former: str = ""
    _handles: list[Any] = field(default_factory=list)

    def new_cache(self) -> SepCache:
        """An empty cache, to pass as ``cache``; without one, each text starts a new one.

        Before transformers 5.24 the argument is called ``past_key_values``.
        """
        return SepCache(self.policies, **self.options)

    def detach(self) -> None:
        """Put the model back as it was; of an attachment that is not on it any more, nothing is left to do."""
        if getattr(self.decoder, "sep_attachment", None) is not self:
            return
        for handle in self._handles:
            handle.remove()
        del self.decoder.sep_attachment
        replace_attention(self.decoder, back=True)
        if self.decoder.config._attn_implementation == NAME:
            self.decoder.config._attn_implementation = self._former

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the tokens to the cache, and its positions to the model."""
        self._leave(None)  # a pass that was interrupted
        self._check_implementation()
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        text = text_of(given)
        repeats = module.training and bool(getattr(module, "is_gradient_checkpointing", False))
        current = self._pass_for(given, repeats)
        position_ids = current.cache.begin(text.ids_BT, text.attention_mask, text.position_ids)
        RUNNING.set(current)
        if text.planes is None and "position_ids" in self._parameters:
            given["position_ids"] = position_ids
        if self.positions.places is not None:
            embedded = self.decoder.get_input_embeddings()(text.ids_BT)
            places = self.positions.places(current.cache.segments.places_BT)
            given |= {"input_ids": None, "inputs_embeds": embedded + places}
        needs_a_mask = repeats or self.decoder.config.model_type == "mpt"  # MPT looks at what it would make of None
        given["attention_mask"] = current.mask(text.ids_BT) if needs_a_mask else None
        if repeats:
            given["use_cache"] = False
        return (), given | {self._cache_name: current.cache if current.keeps else None}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Let the cache free what it can, or forget the tokens of a pass that failed."""
        self._leave(output)

    def _leave(self, output: Any) -> None:
        """The pass through this model that the thread is in, if any, is over; without an output, it failed."""
        current = RUNNING.get()
        if current is None or current.attachment is not self:
            return
        RUNNING.set(current.former)
        current.over = True
        if output is None:
            current.cache.abandon()
        elif current.keeps:
            current.cache.end()

    def _pass_for(self, given: dict[str, Any], repeats: bool) -> Pass:
        """With the cache that the call brings, a new one, or one for this pass alone where none is to be kept."""
        brought = [given.pop(name, None) for name in CACHE_NAMES]
        past, wanted = next((cache for cache in brought if cache is not None), None), given.get("use_cache")
        if wanted is None:
            wanted = getattr(self.decoder.config, "use_cache", True)
        own = past if isinstance(past, SepCache) else None
        if past is not None and past.get_seq_length() > 0 and (repeats or own is None):
            way = "start from an empty one, or from SepCache" if own is None else "gradient checkpointing needs none"
            raise AttachError(f"cache: a {type(past).__name__} with {past.get_seq_length()} tokens; {way}")
        keeps = (own is not None or wanted) and not repeats
        cache = self.new_cache() if own is None or not keeps else own
        if cache.policies != self.policies:
            raise AttachError("cache: made for other policies than the model is attached to; start a new cache")
        return Pass(self, cache, keeps, RUNNING.get())

    def _check_implementation(self) -> None:
        found = self.decoder.config._attn_implementation
        if found != NAME:
            raise AttachError(
                f"attn_implementation={found!r} was set after attach(), and its attention knows no SepCache; attach "
                "again, or call detach() to run without"
            )


def attach(
    model: PreTrainedModel,
    policy: LayerPolicy | Sequence[LayerPolicy],
    *,
    document_end: int | None = None,
    **options: Any,
) -> Attachment:
    """From now on the model keeps, of what it reads and generates, what ``policy`` keeps: one policy, or one a layer.

    A tuple of patterns is a policy for each key head; a list has a policy for each layer. ``document_end`` and
    ``options`` go to SepCache. Raises AttachError for an architecture that cannot do it, CacheError for policies that
    do not go together.
    """
    decoder = decoder_of(model)
    check_architecture(decoder)
    config = decoder.config
    layers = config.num_hidden_layers
    policies = tuple(policy) if isinstance(policy, list) else (policy,) * layers
    _check_types(policies, document_end)
    if len(policies) != layers:
        raise AttachError(f"{len(policies)} policies for a model of {layers} layers; pass one for each, or one alone")
    widths = widths_of(decoder)
    policies = _within(policies, widths)
    settings: dict[str, Any] = {"vocab_size": config.vocab_size, "document_end": document_end} | options
    positions = installed(decoder) or alibi_of(decoder)
    positions.check(policies)
    settings |= {"bilevel": positions.bilevel, "distances": positions.slopes_H is not None}
    turns = first_policy(policies).positions == "cache" and positions.slopes_H is None
    settings["rotary"] = rotary_of(decoder) if turns else None
    attachment = Attachment(decoder, policies, widths, settings, positions, parameters(decoder), cache_name(decoder))
    attachment.new_cache()  # raises before anything is changed
    former: Any = getattr(decoder, "sep_attachment", None)
    if former is not None:
        former.detach()
    attachment._former = config._attn_implementation
    AttentionInterface.register(NAME, attention)
    replace_attention(decoder)
    config._attn_implementation = NAME
    decoder.sep_attachment = attachment
    attachment._handles = [handle for outer in outer_models(model, decoder) for handle in note_text(outer)]
    attachment._handles += [
        decoder.register_forward_pre_hook(attachment.before, with_kwargs=True),
        decoder.register_forward_hook(attachment.after, always_call=True),
    ]
    return attachment


def _check_types(policies: tuple[Any, ...], document_end: object) -> None:
    for policy in policies:
        parts = policy if isinstance(policy, tuple) else (policy,)
        if not parts or not all(hasattr(part, "positions") and not isinstance(part, type) for part in parts):
            raise AttachError(
                f"policy={policy!r}: pass an AttentionPattern, a StreamingPattern, H2O or SnapKV; a tuple of patterns "
                "is one for each key head, a list has one for each layer"
            )
    if document_end is not None and (not isinstance(document_end, int) or isinstance(document_end, bool)):
        raise AttachError(f"document_end={document_end!r}: pass the id of a token, or None")


def _within(policies: tuple[LayerPolicy, ...], widths: tuple[int | None, ...]) -> tuple[LayerPolicy, ...]:
    """Each policy in the sliding window of its layer. Raises AttachError for those that cannot be."""
    for policy, width in zip(policies, widths, strict=True):
        each = policy[0] if isinstance(policy, tuple) else policy
        if width is not None and (isinstance(each, ScorePolicy) or each.positions != "text"):
            raise AttachError(
                f"{each} in a layer with sliding_window={width}: only policies that count positions in the text and "
                "look at no scores go into one; pass an AttentionPattern, or a StreamingPattern with positions='text'"
            )
    return tuple(limited(policy, width) for policy, width in zip(policies, widths, strict=True))


def patterns(pattern: AttentionPattern, model: PreTrainedModel, full_layers: Sequence[int] = ()) -> list[LayerPolicy]:
    """``pattern`` in every layer of the model but ``full_layers``, which see everything (H, H/T)."""
    return list(layer_patterns(pattern, model.config.get_text_config(decoder=True).num_hidden_layers, full_layers))
