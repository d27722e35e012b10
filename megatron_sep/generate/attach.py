"""Give a causal model of transformers a SepCache: its attention goes through transformers' attention interface.

model = AutoModelForCausalLM.from_pretrained(...)
attach(model, AttentionPattern(window=64, sinks=3, separator_ids=(...)))
model.generate(...)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.generate.cache import LayerPolicy, SepCache
from megatron_sep.generate.falcon import is_falcon, replace_attention
from megatron_sep.generate.interface import NAME, AttachError, attention
from megatron_sep.generate.rotary import Rotary

_ROTATE_HALF = ("gpt_neox", "llama", "falcon")
"""Architectures whose rotary embedding the cache can compute itself."""
_FIXED_FREQUENCIES = ("default", "linear", "llama3")


@dataclass
class Attachment:
    """What ``attach`` installed on a model; ``detach`` takes it away."""

    model: PreTrainedModel
    policies: tuple[LayerPolicy, ...]
    options: dict[str, Any]
    """Keyword arguments of SepCache."""
    cache: SepCache | None = None
    """That of the last forward pass."""
    _former: str = ""
    _handles: list[Any] = field(default_factory=list)

    def new_cache(self) -> SepCache:
        """An empty cache, to pass as ``past_key_values``; without one, each text starts a new one."""
        return SepCache(self.policies, **self.options)

    def detach(self) -> None:
        """Put the model back as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self.model.modules():
            if getattr(module, "sep_attachment", None) is self:
                del module.sep_attachment
        replace_attention(self.model, back=True)
        self.model.config._attn_implementation = self._former

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the tokens to the cache, and its positions to the model."""
        ids = args[0] if args else kwargs.pop("input_ids", None)
        if ids is None:
            raise AttachError("inputs_embeds: the cache looks for separators among token ids; pass input_ids")
        given = kwargs.get("past_key_values")
        self.cache = given if isinstance(given, SepCache) else self._instead_of(given)
        if self.cache.policies != self.policies:
            raise AttachError(
                "past_key_values: made for other policies than the model is attached to; start a new cache"
            )
        position_ids = self.cache.begin(ids, kwargs.get("attention_mask"))
        changed = {"attention_mask": None, "position_ids": position_ids, "past_key_values": self.cache}
        return (ids, *args[1:]), kwargs | changed

    def after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Let the cache free what it can."""
        assert self.cache is not None
        self.cache.end()

    def _instead_of(self, given: Cache | None) -> SepCache:
        if given is not None and given.get_seq_length() > 0:
            raise AttachError(
                f"past_key_values: a {type(given).__name__} with {given.get_seq_length()} tokens; start from an empty "
                "one, or from SepCache"
            )
        return self.new_cache()


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
    config = model.config.get_text_config(decoder=True)
    layers = config.num_hidden_layers
    policies = tuple(policy) if isinstance(policy, list) else (policy,) * layers
    if len(policies) != layers:
        raise AttachError(f"{len(policies)} policies for a model of {layers} layers; pass one for each, or one alone")
    _check_architecture(model, config)
    settings: dict[str, Any] = {"vocab_size": config.vocab_size, "document_end": document_end} | options
    settings["rotary"] = _rotary(model, config) if _first(policies).positions == "cache" else None
    attachment = Attachment(model, policies, settings)
    attachment.new_cache()  # raises before anything is changed
    former: Any = getattr(model, "sep_attachment", None)
    if former is not None:
        former.detach()
    attachment._former = model.config._attn_implementation
    AttentionInterface.register(NAME, attention)
    replace_attention(model)
    model.config._attn_implementation = NAME
    for module in (model, *(m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int))):
        module.sep_attachment = attachment
    base = model.base_model
    attachment._handles = [
        base.register_forward_pre_hook(attachment.before, with_kwargs=True),
        base.register_forward_hook(attachment.after),
    ]
    return attachment


def _first(policies: tuple[LayerPolicy, ...]) -> Any:
    return policies[0][0] if isinstance(policies[0], tuple) else policies[0]


def _check_architecture(model: PreTrainedModel, config: Any) -> None:
    known = isinstance(getattr(model, "_supports_attention_backend", None), bool) and model._supports_attention_backend
    name = f"{type(model).__name__} ({config.model_type})"
    if config.is_encoder_decoder or not (known or is_falcon(model)):
        raise AttachError(
            f"{name}: its attention does not go through transformers' attention interface; known are "
            f"{', '.join(_ROTATE_HALF)} and decoders with _supports_attention_backend"
        )
    if getattr(config, "alibi", False):
        raise AttachError(f"{name}: alibi=True is not supported; only rotary or learned positions are")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise AttachError(f"{name}: sliding_window={window} already limits what is seen; set it to None in the config")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise AttachError(f"{name}: has layers of {', '.join(sorted(kinds))}; only full attention can be replaced")


def _rotary(model: PreTrainedModel, config: Any) -> Rotary:
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in _ROTATE_HALF or len(found) != 1 or kind not in _FIXED_FREQUENCIES:
        raise AttachError(
            f"positions='cache' needs the rotary frequencies of {', '.join(_ROTATE_HALF)} with rope_type "
            f"{', '.join(_FIXED_FREQUENCIES)}; this is {config.model_type} with {kind!r}; pass positions='text'"
        )
    return Rotary(found[0].inv_freq)


def patterns(pattern: AttentionPattern, model: PreTrainedModel, full_layers: Sequence[int] = ()) -> list[LayerPolicy]:
    """``pattern`` in every layer of the model but ``full_layers``, which see everything (H, H/T)."""
    return list(layer_patterns(pattern, model.config.get_text_config(decoder=True).num_hidden_layers, full_layers))
