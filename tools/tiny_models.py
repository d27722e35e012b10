"""A tiny model of random weights for each causal architecture of the installed transformers."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64
MOST_WEIGHTS = 8_000_000
ARCHITECTURES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""model_type of a configuration to the name of the class."""

_EVERYWHERE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 9,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "zero_expert_num": 2,
    "n_group": 1,
    "topk_group": 1,
    "router_hidden_size": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "n_positions": 64,
    "n_ctx": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "emb_dim": 32,
    "dff": 48,
    "d_inner": 48,
    "d_head": 8,
    "is_decoder": True,
    "num_group": 1,
    "rotary_dim": 4,
    "pronunciation_embed_dim": 8,
    "pronunciation_vocab_size": VOCABULARY,
    "shape_embed_dim": 8,
    "shape_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}
"""Sizes of every configuration that has such a setting, and not None in it."""
_KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "attn_layers")
"""Settings that name a kind for each layer."""

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "head_dim": 32,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 50,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts": 8, "n_group": 1, "topk_group": 1},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 12},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attention_head_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture needs beside them."""
INSIDE: dict[str, dict[str, dict[str, Any]]] = {
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "qwen4_exp": {"text_config": _INDEXER},
}
"""The same of the parts of a configuration."""


def tiny_config(architecture: str) -> Any:
    """A configuration of few weights. Raises what the configuration raises."""
    kind: Any = CONFIG_MAPPING[architecture]
    default, inside = kind(), INSIDE.get(architecture, {})
    parts: dict[str, Any] = {name: getattr(default, name, None) for name in getattr(kind, "sub_configs", ())}
    sizes = {name: _sizes_of(part) | inside.get(name, {}) for name, part in parts.items() if part is not None}
    made = {name: type(parts[name])(**given) for name, given in sizes.items()}
    return kind(**made, **_sizes_of(default) | SETTINGS.get(architecture, {}))


def tiny_model(architecture: str) -> Any:
    """A model in evaluation mode, its weights drawn at random. Raises what building it raises."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny_config(architecture)).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights with the smallest sizes known here")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()


def _sizes_of(default: Any) -> dict[str, Any]:
    """Of a configuration with its default settings, those to make it small."""
    settings = default.to_dict()
    sizes = {name: size for name, size in _EVERYWHERE.items() if isinstance(settings.get(name), int)}
    if settings.get("kv_lora_rank") is not None:  # latent attention has keys of its own for each head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)
    kinds = {n: list(dict.fromkeys(settings[n])) for n in _KINDS_OF_LAYERS if isinstance(settings.get(n), list)}
    layers = max([2, *map(len, kinds.values())])
    if "num_hidden_layers" in sizes:
        sizes["num_hidden_layers"] = layers
    return sizes | {name: (each * layers)[:layers] for name, each in kinds.items()}
