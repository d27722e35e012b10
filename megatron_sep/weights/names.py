"""One table of weight names a family, read in both directions: this model (left) and Hugging Face (right).

A weight of ours is one tensor of theirs, or several joined: Llama's query, key and value lie together by groups of
heads, its gate above its value. `TensorGroup`s are what a conversion holds in memory at a time: one layer, or one of
the tensors outside the layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.config.schema import ModelConfig

Tensors = Mapping[str, Tensor]
INV_FREQ = ".rotary_emb.inv_freq"
"""End of the name under which old checkpoints keep the rotary frequencies."""


def _one(parts: Sequence[Tensor], _: ModelConfig) -> Tensor:
    return parts[0]


def _same(whole: Tensor, _: ModelConfig) -> list[Tensor]:
    return [whole]


def _join_groups(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """[heads x size, ...] of query, key and value to one tensor: each group's queries, its key, its value."""
    groups, rest = config.key_value_heads, parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *rest) for part in parts], 1).reshape(-1, *rest)


def _split_groups(whole: Tensor, config: ModelConfig) -> list[Tensor]:
    groups, size, rest = config.key_value_heads, config.head_size, whole.shape[1:]
    rows = [config.num_attention_heads // groups * size, size, size]
    parts = torch.split(whole.reshape(groups, sum(rows), *rest), rows, 1)
    return [part.reshape(-1, *rest) for part in parts]


def _stack(parts: Sequence[Tensor], _: ModelConfig) -> Tensor:
    return torch.cat(list(parts))


def _halve(whole: Tensor, _: ModelConfig) -> list[Tensor]:
    return list(whole.chunk(2))


@dataclass(frozen=True)
class Link:
    """One weight of ours and the tensors of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor] = _one
    split: Callable[[Tensor, ModelConfig], list[Tensor]] = _same


@dataclass(frozen=True)
class Family:
    """The names of one Hugging Face architecture; links name modules, to which `.weight` and `.bias` are added."""

    architecture: str
    model_type: str
    outer: tuple[Link, ...]
    layer_prefix: str
    layer: tuple[Link, ...]


GPT_NEOX = Family(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    outer=(
        Link("embedding.word_embeddings", ("gpt_neox.embed_in",)),
        Link("decoder.final_layernorm", ("gpt_neox.final_layer_norm",)),
        Link("output_layer", ("embed_out",)),
    ),
    layer_prefix="gpt_neox.layers",
    layer=(
        Link("input_layernorm", ("input_layernorm",)),
        Link("pre_mlp_layernorm", ("post_attention_layernorm",)),
        Link("self_attention.linear_qkv", ("attention.query_key_value",)),
        Link("self_attention.linear_proj", ("attention.dense",)),
        Link("mlp.linear_fc1", ("mlp.dense_h_to_4h",)),
        Link("mlp.linear_fc2", ("mlp.dense_4h_to_h",)),
    ),
)
LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    outer=(
        Link("embedding.word_embeddings", ("model.embed_tokens",)),
        Link("decoder.final_layernorm", ("model.norm",)),
        Link("output_layer", ("lm_head",)),
    ),
    layer_prefix="model.layers",
    layer=(
        Link("input_layernorm", ("input_layernorm",)),
        Link("pre_mlp_layernorm", ("post_attention_layernorm",)),
        Link(
            "self_attention.linear_qkv",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            _join_groups,
            _split_groups,
        ),
        Link("self_attention.linear_proj", ("self_attn.o_proj",)),
        Link("mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj"), _stack, _halve),
        Link("mlp.linear_fc2", ("mlp.down_proj",)),
    ),
)


PLACES = Link("embedding.position_embeddings", ("embed_places",))
"""The learned places of bilevel positions, which no architecture of Hugging Face has."""


def family_of(config: ModelConfig) -> Family:
    """The architecture that can hold a model's weights."""
    return LLAMA if config.gated_mlp else GPT_NEOX


def groups(config: ModelConfig) -> Iterator[tuple[Link, ...]]:
    """The links of a model's weights, one layer or one outer module at a time, in the order of computation."""
    family = family_of(config)
    embedding, norm, output = family.outer
    outer = [embedding, *([PLACES] if config.position.bilevel else [])]
    yield tuple(weight for module in outer for weight in _weights(module, "", "", config))
    for i in range(config.num_layers):
        yield tuple(
            link
            for module in family.layer
            for link in _weights(module, f"decoder.layers.{i}.", f"{family.layer_prefix}.{i}.", config)
        )
    yield tuple(_weights(norm, "", "", config))
    if not config.tie_embeddings:
        yield tuple(_weights(output, "", "", config))


def _weights(module: Link, our_prefix: str, their_prefix: str, config: ModelConfig) -> Iterator[Link]:
    for part in _parts(module.ours, config):
        theirs = tuple(f"{their_prefix}{name}.{part}" for name in module.theirs)
        yield Link(f"{our_prefix}{module.ours}.{part}", theirs, module.join, module.split)


def _parts(module: str, config: ModelConfig) -> tuple[str, ...]:
    if module in ("embedding.word_embeddings", PLACES.ours, "output_layer"):
        return ("weight",)
    linear = config.mlp_has_biases if module.startswith("mlp.") else config.biases
    has_bias = config.norm == "layernorm" if module.endswith("layernorm") else linear
    return ("weight", "bias") if has_bias else ("weight",)


def to_hugging_face(weights: Tensors, config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of the family's ForCausalLM from ours."""
    links = (link for group in groups(config) for link in group)
    return {
        name: part
        for link in links
        for name, part in zip(link.theirs, link.split(weights[link.ours], config), strict=True)
    }


def weight_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the whole model, under our names."""
    h, ffn, size = config.hidden_size, config.mlp_size, config.head_size
    qkv = (config.num_attention_heads + 2 * config.key_value_heads) * size
    fc1 = 2 * ffn if config.gated_mlp else ffn
    matrices = {
        "word_embeddings": (vocab_size, h),
        "output_layer": (vocab_size, h),
        "position_embeddings": (config.position.length, h),
        "linear_qkv": (qkv, h),
        "linear_proj": (h, config.heads_size),
        "linear_fc1": (fc1, h),
        "linear_fc2": (h, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for link in (link for group in groups(config) for link in group):
        module, part = link.ours.split(".")[-2:]
        matrix = matrices.get(module)
        shapes[link.ours] = (h,) if matrix is None else matrix if part == "weight" else matrix[:1]
    return shapes
