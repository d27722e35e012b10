"""One table of weight names, read in both directions: this model (left) and Hugging Face's GPTNeoX (right)."""

from collections.abc import Mapping

from torch import Tensor

_OUTER = {
    "embedding.word_embeddings.weight": "gpt_neox.embed_in.weight",
    "decoder.final_layernorm.weight": "gpt_neox.final_layer_norm.weight",
    "decoder.final_layernorm.bias": "gpt_neox.final_layer_norm.bias",
    "output_layer.weight": "embed_out.weight",
}
_LAYER = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}


def weight_names(num_layers: int) -> dict[str, str]:
    """Our name to Hugging Face's for every weight of a model; no tensor changes its shape or order."""
    layers = {
        f"decoder.layers.{i}.{ours}.{part}": f"gpt_neox.layers.{i}.{theirs}.{part}"
        for i in range(num_layers)
        for ours, theirs in _LAYER.items()
        for part in ("weight", "bias")
    }
    return _OUTER | layers


def from_hugging_face(weights: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Our state dict from that of GPTNeoXForCausalLM."""
    return {ours: weights[theirs] for ours, theirs in weight_names(num_layers).items()}


def to_hugging_face(weights: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The state dict of GPTNeoXForCausalLM from ours."""
    return {theirs: weights[ours] for ours, theirs in weight_names(num_layers).items()}
