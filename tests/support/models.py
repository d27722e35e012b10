"""Models of transformers with random weights, and this project's model with the same: what parity is measured on."""

from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import ModelConfig, RotaryScalingConfig, RunConfig
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.model.build import build_model
from megatron_sep.model.load_weights import load_weights
from megatron_sep.parallel.groups import topology
from megatron_sep.weights.names import groups
from megatron_sep.weights.open_source import open_source

LAYERS, LENGTH, VOCAB = 4, 48, 128
SHAPE: dict[str, Any] = {"num_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 4, "sequence_length": LENGTH}
SCALING = RotaryScalingConfig(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=3.0, original_length=32)


def neox_config(parallel_residual: bool = True, rotary: float = 0.25) -> ModelConfig:
    return ModelConfig(**SHAPE, parallel_residual=parallel_residual, rotary_fraction=rotary)


def llama_config(groups: int = 2, scaling: RotaryScalingConfig | None = SCALING, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        **SHAPE,
        num_key_value_heads=groups,
        ffn_hidden_size=172,
        norm="rmsnorm",
        activation="swiglu",
        biases=False,
        parallel_residual=False,
        rotary_fraction=1.0,
        rotary_base=500000,
        rotary_scaling=scaling,
        tie_embeddings=tied,
    )


MODELS = {
    "neox": neox_config(),
    "neox, all of a head rotates": neox_config(rotary=1.0),
    "neox, sequential": neox_config(parallel_residual=False),
    "neox, sequential, all of a head rotates": neox_config(parallel_residual=False, rotary=1.0),
    "llama, grouped heads, scaled rotation": llama_config(),
    "llama, one head of keys": llama_config(groups=1),
    "llama, plain rotation": llama_config(groups=4, scaling=None),
    "llama, tied": llama_config(tied=True),
}

FUSED = "neox, fused rows"
FUSED_SEQUENCE = "neox, fused rows, activations split along the sequence"
FUSED_ROWS = dict.fromkeys(("layernorm", "open_residual", "split_rotated", "bias_gelu"), "triton") | {
    "cross_entropy": "triton_split"
}


def hugging_face(config: ModelConfig) -> Any:
    """The same architecture in transformers, with random weights of standard deviation 0.1."""
    torch.manual_seed(0)
    build = _llama if config.gated_mlp else _neox
    model = build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def _shared(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.mlp_size,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }


def _neox(config: ModelConfig) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **_shared(config), rotary_pct=config.rotary_fraction, use_parallel_residual=config.parallel_residual
        )
    )


def _llama(config: ModelConfig) -> LlamaForCausalLM:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rotary_base)}
    if config.rotary_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rotary_scaling.factor,
            "low_freq_factor": config.rotary_scaling.low_frequency_factor,
            "high_freq_factor": config.rotary_scaling.high_frequency_factor,
            "original_max_position_embeddings": config.rotary_scaling.original_length,
        }
    return LlamaForCausalLM(
        LlamaConfig(
            **_shared(config), num_key_value_heads=config.key_value_heads, rms_norm_eps=1e-5, rope_parameters=rope
        )
    )


def with_masks(model: Any, plans: tuple[MaskPlan, ...]) -> None:
    """Give each layer of a transformers model its own additive 4-D mask."""
    for layer, plan in zip(model.base_model.layers, plans, strict=True):
        mask = torch.where(plan.dense()[:, None], 0.0, -torch.inf)

        def put(_: Any, args: Any, kwargs: dict[str, Any], mask: Tensor = mask) -> Any:
            return args, kwargs | {"attention_mask": mask}

        layer.register_forward_pre_hook(put, with_kwargs=True)


def ours(theirs: Any, config: ModelConfig, **settings: Any) -> Any:
    """This rank's part of our model with the weights of theirs."""
    from megatron_sep.model.build import build_model
    from megatron_sep.model.init import global_parameters, local_part

    model = build_model(config, topology(), vocab_size=VOCAB, precision="fp32", seed=1, **settings)
    weights = from_hugging_face(on_disk(theirs.state_dict(), config), config)
    with torch.no_grad():
        for name, parameter in global_parameters(model, config, topology()):
            parameter.copy_(local_part(name, weights[name], parameter, config, topology().tensor))
    return model


def on_disk(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """transformers 5 renames GPTNeoX's head when it loads a checkpoint."""
    head = "lm_head.weight" if config.gated_mlp else "embed_out.weight"
    return {(head if name == "lm_head.weight" else name): weight for name, weight in weights.items()}


@torch.no_grad()
def trained_logits(run: RunConfig, ids_BT: Tensor) -> Tensor:
    """What the newest checkpoint of a run computes in the model it was trained in, under its own mask: [B, T, V]."""
    source = open_source(run.dir)
    assert source.tokenizer is not None
    model = build_model(
        source.config, topology(), vocab_size=source.vocab_size, precision="fp32", seed=0, backend="reference"
    )
    load_weights(model, source, source.config, topology())
    tokenizer = load_tokenizer(source.tokenizer)
    rules = LayerRules.of(run.attention, run.model.num_layers, tokenizer).counting(run.model.position, tokenizer)
    logits: Tensor = model.eval()(ids_BT, rules.positions(ids_BT), rules.plans(ids_BT))
    return logits


def from_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict from that of the family's ForCausalLM."""
    links = (link for group in groups(config) for link in group)
    return {link.ours: link.join([weights[name] for name in link.theirs], config) for link in links}
