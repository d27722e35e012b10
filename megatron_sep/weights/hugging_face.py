"""config.json of Hugging Face's GPTNeoX and Llama to the model section and back; torch-free."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sep.config.schema import AttentionConfig, ModelConfig
from megatron_sep.files import read_json
from megatron_sep.weights.rope_scaling import HuggingFaceError, read_scaling, write_scaling

Json = dict[str, Any]
SEP = "sep_attention"
"""Key of config.json under which an export holds its attention pattern."""


KNOWN_TYPES = ("gpt_neox", "llama")
"""Architectures whose weights have a place in this program's models."""


def read_config(path: Path) -> tuple[ModelConfig, AttentionConfig]:
    """The model and the attention pattern of DIR/config.json. Raises HuggingFaceError, naming the key."""
    file = path / "config.json"
    try:
        values: Json = read_json(file)
    except (OSError, ValueError) as error:
        raise HuggingFaceError(f"{file}: cannot be read: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in KNOWN_TYPES:
        raise HuggingFaceError(f"{file}: model_type={kind!r}; known are {', '.join(KNOWN_TYPES)}")
    try:
        shared = {ours: values[theirs] for ours, theirs in _SHARED.items()}
        settings = shared | {"gpt_neox": _neox, "llama": _llama}[kind](values)
        return ModelConfig.model_validate(settings), _attention(values.get(SEP) or {})
    except KeyError as error:
        raise HuggingFaceError(f"{file}: has no {error.args[0]}") from error
    except ValueError as error:
        raise HuggingFaceError(f"{file}: {error}") from error


def declared_end(path: Path) -> str | None:
    """The text of the token that ends a document, by DIR/tokenizer_config.json; None: it does not say.

    Raises HuggingFaceError for what is no JSON.
    """
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        settings = read_json(file)
    except ValueError as error:
        raise HuggingFaceError(f"{file}: cannot be read: {error}") from error
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _attention(sep: Any) -> AttentionConfig:
    if not isinstance(sep, dict):
        raise HuggingFaceError(f"{SEP}={sep!r}: holds no pattern, which is a mapping")
    settings = {key: value for key, value in sep.items() if key != "document_end"}
    return AttentionConfig.model_validate(settings | {"document_boundaries": sep.get("document_end") is not None})


_SHARED = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
}


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""hidden_act of GPTNeoX; an export has the first name of a value."""


def _neox(values: Mapping[str, Any]) -> Json:
    activation = values.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise HuggingFaceError(f"hidden_act={activation!r}: known are {', '.join(_ACTIVATIONS)}")
    rope = _rope(values, values.get("rotary_emb_base", 10000))
    return {
        "activation": _ACTIVATIONS[activation],
        "biases": values.get("attention_bias", True),
        "mlp_biases": None if values.get("attention_bias", True) else True,
        "sequence_length": values.get("max_position_embeddings", 2048),
        "parallel_residual": values.get("use_parallel_residual", True),
        "rotary_fraction": rope.get("partial_rotary_factor", values.get("rotary_pct", 0.25)),
        "rotary_base": int(rope["rope_theta"]),
        "rotary_scaling": read_scaling(rope, values),
        "norm_eps": values.get("layer_norm_eps", 1e-5),
        "tie_embeddings": values.get("tie_word_embeddings", False),
    }


def _llama(values: Mapping[str, Any]) -> Json:
    _only(values, "hidden_act", "silu")
    rope = _rope(values, 10000)
    _only(rope, "partial_rotary_factor", 1.0, none_too=True)
    plain = values["hidden_size"] / values["num_attention_heads"]
    biases = values.get("attention_bias", False)
    return {
        "head_dim": None if values.get("head_dim") in (None, plain) else values["head_dim"],
        "num_key_value_heads": values.get("num_key_value_heads"),
        "sequence_length": min(values.get("max_position_embeddings", 8192), 8192),
        "norm": "rmsnorm",
        "activation": "swiglu",
        "biases": biases,
        "mlp_biases": None if values.get("mlp_bias", False) == biases else not biases,
        "parallel_residual": False,
        "rotary_fraction": 1.0,
        "rotary_base": int(rope["rope_theta"]),
        "rotary_scaling": read_scaling(rope, values),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "tie_embeddings": values.get("tie_word_embeddings", False),
    }


def _rope(values: Mapping[str, Any], base: float) -> Json:
    """transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`."""
    rope = {"rope_theta": values.get("rope_theta", base)} | (values.get("rope_scaling") or {})
    rope |= values.get("rope_parameters") or {}
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
    return rope


def _only(values: Mapping[str, Any], key: str, known: Any, none_too: bool = False) -> None:
    found = values.get(key, known)
    if found != known and not (none_too and found is None):
        raise HuggingFaceError(f"{key}={found!r}: known is {known!r}")


def make_config(model: ModelConfig, vocab_size: int, sep: Json, dtype: str, eod_id: int | None) -> Json:
    """config.json of an export, which transformers reads as GPTNeoX or Llama and, with its own code, as SepLLM."""
    _check_positions(model)
    llama = model.gated_mlp
    architecture = "LlamaForCausalLM" if llama else "GPTNeoXForCausalLM"
    shared = {theirs: getattr(model, ours) for ours, theirs in _SHARED.items()}
    shared |= {"intermediate_size": model.mlp_size, "vocab_size": vocab_size}
    return {
        "architectures": [architecture],
        "model_type": "llama" if llama else "gpt_neox",
        "auto_map": {"AutoModelForCausalLM": f"modeling_sep.Sep{architecture}"},
        "dtype": dtype,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "initializer_range": model.init_std,
        "max_position_embeddings": model.sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
        SEP: sep,
        **shared,
        **(_as_llama(model) if llama else _as_neox(model)),
    }


def _as_neox(model: ModelConfig) -> Json:
    _expressible(model, norm="layernorm", mlp_has_biases=True)
    if model.heads_size != model.hidden_size:
        raise HuggingFaceError(f"model.head_dim={model.head_dim}: GPTNeoX has heads of hidden_size / heads alone")
    if model.key_value_heads != model.num_attention_heads:
        raise HuggingFaceError(f"num_key_value_heads={model.num_key_value_heads}: GPTNeoX has no groups of heads")
    rope: Json = {}
    if model.rotary_scaling:
        turns = {"rope_theta": float(model.rotary_base), "partial_rotary_factor": model.rotary_fraction}
        rope = {"rope_parameters": turns | write_scaling(model.rotary_scaling)}
    return {
        "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == model.activation),
        "attention_bias": model.biases,
        "layer_norm_eps": model.norm_eps,
        "use_parallel_residual": model.parallel_residual,
        "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": model.rotary_base,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        **rope,
    }


def _as_llama(model: ModelConfig) -> Json:
    _expressible(model, norm="rmsnorm", rotary_fraction=1.0, parallel_residual=False)
    rope: Json = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    rope |= write_scaling(model.rotary_scaling) if model.rotary_scaling else {}
    return {
        "hidden_act": "silu",
        "attention_bias": model.biases,
        "mlp_bias": model.mlp_has_biases,
        "head_dim": model.head_size,
        "num_key_value_heads": model.key_value_heads,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
    }


def _check_positions(model: ModelConfig) -> None:
    """Raises HuggingFaceError for a model that transformers would read as another one."""
    kind, softmax = model.position.kind, model.self_adjusting_softmax
    said = [f"model.position.kind={kind}"] if kind != "rotary" else []
    said += [f"model.self_adjusting_softmax={softmax}"] if softmax else []
    if said:
        raise HuggingFaceError(
            f"{' and '.join(said)}: transformers has no such GPT-NeoX or Llama; `generate` and `attach` take the "
            "checkpoint itself"
        )


def _expressible(model: ModelConfig, **known: Any) -> None:
    for key, value in known.items():
        if getattr(model, key) != value:
            raise HuggingFaceError(
                f"model.{key}={getattr(model, key)!r} with activation={model.activation}: transformers has no such "
                f"architecture; known is {value!r}"
            )
