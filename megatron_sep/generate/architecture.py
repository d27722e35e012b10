"""What the cache needs to know of a model of transformers, and which models it takes."""

import inspect
import sys

from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.own_attention import has_own_attention
from megatron_sep.generate.rotary import Rotary

_ROTATE_HALF = ("gpt_neox", "llama", "falcon")
"""Architectures whose rotary embedding the cache can compute itself."""
_FIXED_FREQUENCIES = ("default", "linear", "llama3")
CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls a cache: since 5.24, and before."""


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that know the number of their layer, but for those that read pictures or sound."""
    text = model.config.get_text_config(decoder=True)
    numbered = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    return [m for m in numbered if getattr(m, "config", text) is text]


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model that takes token ids and has all layers: what every way through the model calls.

    Raises AttachError where there is none.
    """
    layers = set(attention_modules(model))
    found = [
        m
        for m in model.modules()
        if isinstance(m, PreTrainedModel) and "input_ids" in parameters(m) and layers and layers <= set(m.modules())
    ]
    if not found:
        raise AttachError(
            f"{type(model).__name__} ({model.config.model_type}): its attention does not go through transformers' "
            "attention interface in layers that know their number (layer_idx)"
        )
    return found[-1]


def outer_models(model: PreTrainedModel, decoder: PreTrainedModel) -> list[PreTrainedModel]:
    """Those that the decoder stands inside, where it is only a part of what they read: they may give it embeddings."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not decoder]
    return [m for m in around if decoder in set(m.modules())]


def parameters(module: nn.Module) -> list[str]:
    """Of its forward pass, in order."""
    return list(inspect.signature(module.forward).parameters)


def cache_name(module: nn.Module) -> str:
    """What the cache is called among the arguments and the results of a model's forward pass."""
    there = parameters(module)
    return next((name for name in CACHE_NAMES if name in there), CACHE_NAMES[-1])


def check_architecture(decoder: PreTrainedModel) -> None:
    """Raises AttachError for an architecture whose attention the cache does not compute."""
    config = decoder.config
    _check_kinds(decoder)
    known = isinstance(getattr(decoder, "_supports_attention_backend", None), bool) and (
        decoder._supports_attention_backend
    )
    name = f"{type(decoder).__name__} ({config.model_type})"
    if config.is_encoder_decoder or not (known or has_own_attention(decoder)):
        raise AttachError(
            f"{name}: its attention does not go through transformers' attention interface; known are "
            f"{', '.join(_ROTATE_HALF)} and decoders with _supports_attention_backend"
        )
    if not _is_causal(decoder):
        raise AttachError(
            f"{name}: its tokens see later ones too, and a cache is for decoders; load it as a decoder "
            "(is_decoder=True in its configuration) if it was trained as one"
        )
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in decoder.modules()):
        raise AttachError(
            f"{name}: leaves padding out of its positions by its id, which the cache does not; take another model"
        )


def _check_kinds(decoder: PreTrainedModel) -> None:
    """Raises AttachError for layers of another kind of attention, or of none."""
    config = decoder.config
    named = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    kinds = set(named) - {"full_attention", "sliding_attention"}
    if kinds:
        raise AttachError(
            f"{type(decoder).__name__} ({config.model_type}): has layers of {', '.join(sorted(kinds))}; only full and "
            "sliding attention can be replaced"
        )


def widths_of(decoder: PreTrainedModel) -> tuple[int | None, ...]:
    """The sliding window of each layer, None: it has none. Raises AttachError for one that the model's masks ignore."""
    config = decoder.config
    width = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if width is not None and not hasattr(sys.modules[type(decoder).__module__], "create_sliding_window_causal_mask"):
        raise AttachError(
            f"{type(decoder).__name__} ({config.model_type}): has sliding_window={width} and makes no mask of it, so "
            "that not all of its attentions honour it; set it to None in the configuration to see everything"
        )
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def _is_causal(decoder: PreTrainedModel) -> bool:
    config = decoder.config
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) in (
        True,
        "all",
    ):  # "vision": within pictures, which are refused
        return False
    said = [m.is_causal for m in attention_modules(decoder) if isinstance(getattr(m, "is_causal", None), bool)]
    return all(said) if said else not hasattr(config, "is_decoder") or config.is_decoder or decoder.can_generate()


def rotary_of(decoder: PreTrainedModel) -> Rotary:
    """The rotary frequencies, for positions inside the cache. Raises AttachError where the cache cannot turn keys."""
    config = decoder.config
    found = [m for m in decoder.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in _ROTATE_HALF or len(found) != 1 or kind not in _FIXED_FREQUENCIES:
        raise AttachError(
            f"positions='cache' needs the rotary frequencies of {', '.join(_ROTATE_HALF)} with rope_type "
            f"{', '.join(_FIXED_FREQUENCIES)}; this is {config.model_type} with {kind!r}; pass positions='text'"
        )
    return Rotary(found[0].inv_freq)
