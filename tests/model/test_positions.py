"""Models with every kind of position and softmax against one that is written out from the formulae."""

import math
from typing import Any

import pytest
import torch
from support.models import VOCAB
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm

from megatron_sep.attention.bilevel import Bilevel
from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.position import PositionConfig, SelfAdjustingConfig
from megatron_sep.config.schema import ModelConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.kernels.sep_attention.index import indexed_layers
from megatron_sep.model.build import build_model
from megatron_sep.parallel.groups import topology

SEPARATORS, END, LENGTH = (1, 2), 3, 29
BIPE = {"kind": "bipe", "separators": (), "separator_ids": SEPARATORS, "length": 20}
KINDS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "alibi": {"position": PositionConfig(kind="alibi")},
    "bipe, rotary": {"position": PositionConfig(**BIPE)},
    "bipe, alibi": {"position": PositionConfig(**BIPE, segments="alibi")},
    "rotary, self-adjusting": {"self_adjusting_softmax": SelfAdjustingConfig(numerator_bias=0.1, denominator_bias=0.5)},
    "alibi, self-adjusting product": {
        "position": PositionConfig(kind="alibi"),
        "self_adjusting_softmax": SelfAdjustingConfig(denominator=False),
    },
}


def small(**settings: Any) -> ModelConfig:
    """Six heads, whose slopes are no single series, and sequential or parallel residuals."""
    shape = {"num_layers": 2, "hidden_size": 96, "num_attention_heads": 6, "sequence_length": LENGTH}
    return ModelConfig(**shape | {"init": "normal", "output_init": "normal", "init_std": 0.1} | settings)


def rules_of(config: ModelConfig, boundaries: bool = True) -> LayerRules:
    pattern = AttentionPattern(6, 2, SEPARATORS)
    bilevel = Bilevel(SEPARATORS, config.position.length) if config.position.bilevel else None
    everywhere = layer_patterns(pattern, config.num_layers, [0])
    return LayerRules(everywhere, AttentionPattern(separator_ids=SEPARATORS), END if boundaries else None, bilevel)


def counted(ids: list[int], boundaries: bool, length: int) -> tuple[list[int], list[int]]:
    """Segments and places of a row, one token after another."""
    segments, places, segment, place = [], [], 0, 0
    for token in ids:
        segments.append(segment)
        places.append(min(place, length - 1))
        segment, place = (segment + 1, 0) if token in SEPARATORS else (segment, place + 1)
        if boundaries and token == END:
            segment = place = 0
    return segments, places


def logits_by_hand(
    config: ModelConfig, weights: dict[str, Tensor], ids: list[int], seen: list[Tensor], boundaries: bool = True
) -> Tensor:
    """[T, V] of one row, from names of weights and formulae alone; ``seen`` says for each layer who sees whom."""
    segments, places = counted(ids, boundaries, config.position.length)
    stand = torch.tensor(segments if config.position.bilevel else range(len(ids))).double()
    x = weights["embedding.word_embeddings.weight"][torch.tensor(ids)]
    if config.position.bilevel:
        x = x + weights["embedding.position_embeddings.weight"][torch.tensor(places)]

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, value: Tensor) -> Tensor:
        return layer_norm(value, value.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    for i in range(config.num_layers):
        at = f"decoder.layers.{i}."
        qkv = linear(f"{at}self_attention.linear_qkv", norm(f"{at}input_layernorm", x))
        q, k, v = qkv.view(len(ids), config.num_attention_heads, 3, config.head_size).unbind(2)
        heads = [_head(config, h, q[:, h], k[:, h], v[:, h], stand, seen[i]) for h in range(config.num_attention_heads)]
        attended = linear(f"{at}self_attention.linear_proj", torch.cat(heads, 1))
        mid = x if config.parallel_residual else x + attended
        grown = gelu(linear(f"{at}mlp.linear_fc1", norm(f"{at}pre_mlp_layernorm", mid)))
        x = x + attended + linear(f"{at}mlp.linear_fc2", grown)
    return norm("decoder.final_layernorm", x) @ weights["output_layer.weight"].T


def _head(config: ModelConfig, h: int, q: Tensor, k: Tensor, v: Tensor, stand: Tensor, seen: Tensor) -> Tensor:
    if config.position.rotates:
        q, k = (_turned(t, stand, int(config.head_size * config.rotary_fraction), config.rotary_base) for t in (q, k))
    s = q @ k.T / math.sqrt(config.head_size)
    if not config.position.rotates:
        slopes = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]  # of four heads, then two of eight
        s = s - slopes[h] * (stand[:, None] - stand)
    p = s.masked_fill(~seen, -torch.inf).softmax(-1)
    adjust = config.self_adjusting_softmax
    if adjust is None:
        return p @ v
    if not adjust.denominator:
        return (p * s.masked_fill(~seen, 0)) @ v
    low = torch.stack([min(row[own].min(), row.new_zeros(())) for row, own in zip(s, seen, strict=True)])[:, None]
    high = torch.stack([max(row[own].max(), row.new_zeros(())) for row, own in zip(s, seen, strict=True)])[:, None]
    return (p * (s - low + adjust.numerator_bias) / (high + adjust.denominator_bias - low)) @ v


def _turned(x: Tensor, stand: Tensor, size: int, base: int) -> Tensor:
    """Pairs (i, i + size / 2) of the first ``size`` values of a head turn by stand x base^(-2 i / size)."""
    angle = stand[:, None] * base ** (-torch.arange(0, size, 2).double() / size)
    one, two, rest = x[:, : size // 2], x[:, size // 2 : size], x[:, size:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin(), rest], 1)


def drawn_ids(rows: int = 2) -> Tensor:
    """With separators and an end of a document in each row."""
    ids = torch.randint(4, VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    ids[:, 5::7], ids[:, 9], ids[1, 4] = 1, 2, 2
    ids[:, 14] = END
    return ids


@pytest.mark.parametrize("residual", [True, False], ids=["parallel", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("single_process")
def test_a_model_equals_the_formulae_in_logits_and_gradients(kind: str, residual: bool) -> None:
    """fp32 against double precision, 1e-5: a full and a sparse layer, packed documents, every weight's gradient."""
    config = small(**KINDS[kind], parallel_residual=residual)
    model = build_model(config, topology(), vocab_size=VOCAB, precision="fp32", seed=7, backend="reference")
    ids, rules = drawn_ids(), rules_of(config)
    inputs, labels = ids[:, :-1], ids[:, 1:]
    plans = rules.plans(inputs)
    logits = model(inputs, rules.positions(inputs), indexed_layers(plans))
    cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()

    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.stack(
        [
            logits_by_hand(config, weights, row.tolist(), [plan.dense()[b] for plan in plans])
            for b, row in enumerate(inputs)
        ]
    )
    cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), weights[name].grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["alibi", "bipe, alibi"])
@pytest.mark.usefixtures("single_process")
def test_the_fused_kernel_trains_the_same_model(kind: str) -> None:
    """Logits and gradients of the fused kernel are the reference's, in full and in sparse layers."""
    config = small(**KINDS[kind], hidden_size=192)
    ids, rules = drawn_ids(), rules_of(config)
    found = []
    for backend in ("reference", "triton"):
        model = build_model(config, topology(), vocab_size=VOCAB, precision="fp32", seed=7, backend=backend)
        logits = model(ids[:, :-1], rules.positions(ids[:, :-1]), indexed_layers(rules.plans(ids[:, :-1])))
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("single_process")
def test_parameters_are_counted_from_the_configuration(kind: str) -> None:
    """Learned places count."""
    config = small(**KINDS[kind])
    model = build_model(config, topology(), vocab_size=VOCAB, precision="fp32", seed=7)
    assert ModelSize(config, VOCAB).parameters == sum(p.numel() for p in model.parameters())
