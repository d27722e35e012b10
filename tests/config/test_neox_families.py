"""Small stand-ins of the model families that GPT-NeoX's files describe, held against what transformers says of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sep.config import ConfigError, sketch_config
from megatron_sep.config.load import neox_notes
from megatron_sep.config.schema import AttentionConfig, ModelConfig
from megatron_sep.config.size import ModelSize

LLAMA: dict[str, Any] = {
    "make_vocab_size_divisible_by": 1,
    "pos_emb": "rotary",
    "rotary_pct": 1,
    "no_weight_tying": True,
    "gpt_j_residual": False,
    "output_layer_parallelism": "column",
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1.0e-5,
    "bias_gelu_fusion": False,
    "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False,
}
OLDER = {"mlp_type": "llama", "activation": "silu"}
NEWER = {"activation": "swiglu", "mlp_multiple_of": 256}


def shape(layers: int, hidden: int, heads: int, length: int = 4096, **more: Any) -> dict[str, Any]:
    return {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "seq_length": length} | more


def flash(layers: int, **more: Any) -> dict[str, Any]:
    return {"attention_config": [[["flash"], layers]]} | more


LLAMA_1_7B = shape(32, 4096, 32, 2048, rms_norm_epsilon=1.0e-6)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "llama 7b, older": (LLAMA_1_7B | OLDER, {"intermediate_size": 11008, "rms_norm_eps": 1e-6}, 6_738_415_616),
    "llama 7b": (
        LLAMA_1_7B | NEWER | {"intermediate_size": 32768},
        {"intermediate_size": 11008, "rms_norm_eps": 1e-6},
        6_738_415_616,
    ),
    "llama 13b": (shape(40, 5120, 40, 2048) | OLDER, {"intermediate_size": 13824}, 13_015_864_320),
    "llama 30b, older": (shape(60, 6656, 52, 2048) | OLDER, {"intermediate_size": 17920}, 32_528_943_616),
    "llama 65b": (shape(80, 8192, 64, 2048) | OLDER, {"intermediate_size": 22016}, 65_285_660_672),
    "llama 30b": (
        shape(60, 6656, 52, 2048) | NEWER | {"intermediate_size": 53248},
        {"intermediate_size": 17920},
        32_528_943_616,
    ),
    "llama 2 7b": (shape(32, 4096, 32) | OLDER, {"intermediate_size": 11008}, 6_738_415_616),
    "llama 2 13b": (
        shape(40, 5120, 40) | NEWER | {"intermediate_size": 41472},
        {"intermediate_size": 13824},
        13_015_864_320,
    ),
    "llama 2 70b": (
        shape(80, 8192, 64) | NEWER | flash(80, num_kv_heads=8, intermediate_size=86016),
        {"intermediate_size": 28672, "num_key_value_heads": 8},
        68_976_648_192,
    ),
    "codellama 7b": (
        shape(32, 4096, 32, 16384) | OLDER | flash(32, rotary_emb_base=1000000),
        {"intermediate_size": 11008, "rope_theta": 1e6},
        6_738_415_616,
    ),
    "codellama 34b": (
        shape(48, 8192, 64, 16384) | OLDER | flash(48, num_kv_heads=8, rotary_emb_base=1000000),
        {"intermediate_size": 22016, "num_key_value_heads": 8, "rope_theta": 1e6},
        33_743_970_304,
    ),
    "llemma 7b": (
        shape(32, 4096, 32) | OLDER | flash(32, rotary_emb_base=10000),
        {"intermediate_size": 11008},
        6_738_415_616,
    ),
    "llemma 34b": (
        shape(48, 8192, 64) | OLDER | flash(48, num_kv_heads=8, rotary_emb_base=1000000, attention_type="groupedquery"),
        {"intermediate_size": 22016, "num_key_value_heads": 8, "rope_theta": 1e6},
        33_743_970_304,
    ),
    "mistral 7b": (
        shape(32, 4096, 32, 8192)
        | OLDER
        | flash(32, num_kv_heads=8, intermediate_size=14336, sliding_window_width=4096),
        {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
        7_241_732_096,
    ),
}
"""GPT-NeoX's keys, what transformers' config.json of the published model says, and its parameters (32,000 tokens)."""


def sketched(folder: Path, values: dict[str, Any]) -> tuple[ModelConfig, AttentionConfig]:
    path = folder / "model.yml"
    path.write_text(yaml.safe_dump(values))
    config = sketch_config(path).config
    return config.model, config.attention


def as_transformers(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Under the names of its config.json."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "intermediate_size": model.mlp_size,
        "hidden_act": {"swiglu": "silu"}[model.activation],
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": model.biases,
        "mlp_bias": model.biases,
        "sliding_window": attention.window,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_llama_comes_out_as_transformers_says(name: str, tmp_path: Path) -> None:
    """Every field of its config.json, the number of parameters, and nothing that a Llama does not have."""
    keys, published, parameters = FAMILIES[name]
    model, attention = sketched(tmp_path, LLAMA | keys)
    expected = {
        "num_hidden_layers": keys["num_layers"],
        "hidden_size": keys["hidden_size"],
        "num_attention_heads": keys["num_attention_heads"],
        "num_key_value_heads": keys["num_attention_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
    }
    assert as_transformers(model, attention) == expected | published
    assert (model.norm, model.rotary_fraction, model.parallel_residual) == ("rmsnorm", 1.0, False)
    assert ModelSize(model, 32000).parameters == parameters


def test_a_gate_takes_its_third_of_the_intermediate_size(tmp_path: Path) -> None:
    """As GPT-NeoX: 4 h is 8/3 h with a gate, rounded up to mlp_multiple_of; without one it is what the file says."""
    small = LLAMA | shape(2, 96, 4, 64)
    assert sketched(tmp_path, small | {"activation": "swiglu"})[0].mlp_size == 128
    assert sketched(tmp_path, small | {"activation": "swiglu", "mlp_multiple_of": 48})[0].mlp_size == 144
    plain = small | {"use_bias_in_mlp": False, "activation": "gelu"}
    assert sketched(tmp_path, plain)[0].mlp_size == 384
    assert sketched(tmp_path, plain | {"expansion_factor": 2})[0].mlp_size == 192
    assert sketched(tmp_path, plain | {"intermediate_size": 200})[0].mlp_size == 200


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm": "layernorm"}, "use_bias_in_norms=False is refused: LayerNorm has a bias here"),
        ({"activation": "geglu"}, "activation='geglu' with mlp_type='regular': an MLP is gelu, relu or swiglu"),
        ({"activation": "gelu", "use_bias_in_mlp": False, "intermediate_size": 33}, "which do not fit each other"),
        ({"use_qk_layernorm": True}, "queries and keys have no norm of their own"),
        ({"init_tok_max_idx": 2, "sliding_window_width": 8}, "sliding_window_width=8: stands beside SepLLM's keys"),
    ],
)
def test_a_layer_that_there_is_none_of_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    """By the keys that describe it."""
    with pytest.raises(ConfigError, match=message):
        sketched(tmp_path, LLAMA | shape(2, 96, 4, 64) | {"activation": "swiglu"} | keys)


def test_the_mlp_may_have_biases_that_the_attention_lacks(tmp_path: Path) -> None:
    """A GELU file that leaves the MLP's out means GPT-NeoX's default, which is True."""
    model = sketched(tmp_path, LLAMA | shape(2, 96, 4, 64) | {"activation": "gelu"})[0]
    assert (model.biases, model.mlp_biases) == (False, True)


def test_a_sliding_window_is_that_of_flash_layers(tmp_path: Path) -> None:
    """Layers of global attention see everything beside them; without a flash layer it has no effect, and a note."""
    mixed = LLAMA | shape(4, 96, 4, 64) | {"activation": "swiglu", "sliding_window_width": 8}
    attention = sketched(tmp_path, mixed | {"attention_config": [[["global", "flash"], 2]]})[1]
    assert (attention.window, attention.full_layers) == (8, (0, 2))
    assert sketched(tmp_path, mixed)[1].window is None
    assert any(note.startswith("sliding_window_width: without effect") for note in neox_notes(tmp_path / "model.yml"))


def test_what_is_meant_is_noted_where_it_is_not_what_gpt_neox_does(tmp_path: Path) -> None:
    """A Llama's MLP without biases, and a window that counts as transformers does."""
    keys = flash(4, sliding_window_width=8, activation="swiglu")
    sketched(tmp_path, LLAMA | shape(4, 96, 4, 64) | keys)
    notes = "\n".join(neox_notes(tmp_path / "model.yml"))
    assert "use_bias_in_mlp: left out, and taken to be False as in the attention" in notes
    assert "sliding_window_width: 8 tokens, the query among them, as transformers counts" in notes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"moe_num_experts": 4, "moe_type": "megablocks"},
            "moe_num_experts=4 is refused: a mixture of experts is anoth",
        ),
        ({"num_experts": 4}, "num_experts=4 is refused: a mixture of experts is another architecture"),
        ({"attention_config": [[["mamba"], 4]], "mamba_use_bias_in_conv": True}, "attention_config names mamba"),
        ({"attention_config": [[["rwkv"], 4]], "dim_att": 64}, "attention_config names rwkv"),
        ({"attention_config": [[["gmlp"], "all"]], "gmlp_attn_dim": 64}, "attention_config names gmlp"),
        (
            {"attention_config": [[["sparse_fixed", "global"], 2]], "sparsity_config": {"block": 16}},
            "attention_config names sparse_fixed",
        ),
        ({"model_arch": "t5"}, "model_arch='t5' is refused: an encoder is no part of a decoder"),
    ],
)
def test_another_architecture_is_refused_in_one_line(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Whatever else its file leaves out or says: learned positions and an unknown key are no further mistakes."""
    with pytest.raises(ConfigError) as raised:
        sketched(tmp_path, shape(4, 64, 4) | {"pos_emb": "learned", "unknown_key": 1} | keys)
    first, *rest = str(raised.value).splitlines()
    assert first.endswith("1 mistake(s)")
    assert len(rest) == 1
    assert message in rest[0]


IGNORED = """
comment data_types comet_project comet_tags use_comet profile profile_step_start memory_profiling memory_profiling_path
te_columnparallel te_layernorm_mlp te_fp8_format te_fp8_mha git_hash log_grad_pct_zeros gradient_noise_scale_n_batches
text_gen_type maximum_tokens temperature top_p top_k prompt_end sample_input_file sample_output_file num_samples
recompute eval_tasks zero_stage loss_scale min_scale master_addr exclude autotuning wandb tensorboard s3_path
pipe_partition_method moe_top_k mup_init_scale mamba_causal_conv_fusion rpe_num_buckets dpo_beta
fp16_lm_cross_entropy exit_interval
"""
REFUSED = """
decay_lr_to warmup_iters lr_decay_fraction train_epochs num_unique_layers soft_prompt_tuning curriculum_learning
train_label_data_paths pos_train_data_paths sparse_attention elasticity amp
"""


@pytest.mark.parametrize("key", IGNORED.split())
def test_keys_of_no_matter_are_ignored_with_a_reason(key: str, tmp_path: Path) -> None:
    """They change nothing, and `show` says why."""
    plain = LLAMA | shape(2, 96, 4, 64) | {"activation": "swiglu"}
    assert sketched(tmp_path, plain | {key: "any"}) == sketched(tmp_path, plain)
    (tmp_path / "model.yml").write_text(yaml.safe_dump(plain | {key: "any"}))
    note = next(note for note in neox_notes(tmp_path / "model.yml") if note.startswith(f"{key}:"))
    assert note.startswith(f"{key}: ignored: ")
    assert len(note) > len(f"{key}: ignored: ") + 10


@pytest.mark.parametrize("key", REFUSED.split())
def test_keys_that_would_matter_are_refused_with_a_reason(key: str, tmp_path: Path) -> None:
    """By name, with the way out or what there is not; never as unknown."""
    with pytest.raises(ConfigError, match=rf"{key}='any': \w+") as raised:
        sketched(tmp_path, LLAMA | shape(2, 96, 4, 64) | {"activation": "swiglu", key: "any"})
    assert "did you mean" not in str(raised.value)
