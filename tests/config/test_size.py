"""Parameter counts and FLOPs follow from the configuration."""

from typing import Any

import pytest

from megatron_sep.config.schema import ModelConfig
from megatron_sep.config.size import ModelError, ModelSize, padded_vocab_size
from megatron_sep.parallel.groups import topology
from megatron_sep.weights.names import weight_shapes


@pytest.mark.parametrize(
    ("layers", "width", "heads", "vocab", "published"),
    [
        (6, 512, 8, 50304, 70_426_624),
        (12, 768, 12, 50304, 162_322_944),
        (24, 1024, 16, 50304, 405_334_016),
        (16, 2048, 8, 50304, 1_011_781_632),
        (24, 2048, 16, 50304, 1_414_647_808),
        (32, 2560, 32, 50304, 2_775_208_960),
        (32, 4096, 32, 50432, 6_857_302_016),
        (36, 5120, 40, 50688, 11_846_072_320),
    ],
)
def test_parameters_equal_pythias_published_counts(
    layers: int, width: int, heads: int, vocab: int, published: int
) -> None:
    """Every Pythia size, by configuration alone (arXiv 2304.01373, table 1)."""
    config = ModelConfig(num_layers=layers, hidden_size=width, num_attention_heads=heads)
    assert ModelSize(config, vocab).parameters == published


def test_parameters_equal_llamas_published_count() -> None:
    """Llama-3-8B: 8,030,261,248 (arXiv 2407.21783, table 3)."""
    config = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        ffn_hidden_size=14336,
        norm="rmsnorm",
        activation="swiglu",
        biases=False,
    )
    assert ModelSize(config, 128256).parameters == 8_030_261_248


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tie_embeddings": True},
        {"norm": "rmsnorm", "activation": "swiglu", "num_key_value_heads": 2, "biases": False},
        {"norm": "rmsnorm", "biases": True, "num_key_value_heads": 1},
        {"activation": "swiglu", "biases": True},
    ],
    ids=lambda values: ", ".join(values) or "defaults",
)
def test_parameters_equal_those_of_the_model(values: dict[str, Any]) -> None:
    """The count is that of the model which is built, and of the table of weights that a conversion checks."""
    from megatron_sep.model.build import build_model

    config = ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4, ffn_hidden_size=100, **values)
    model = build_model(config, topology(), vocab_size=256, precision="fp32", seed=0)
    assert ModelSize(config, 256).parameters == sum(p.numel() for p in model.parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert weight_shapes(config, 256) == shapes


def test_flops_of_full_attention_equal_the_usual_formula() -> None:
    """For all T^2 pairs, 72 L T h^2 (1 + T / 6h) + 6 T h V (arXiv 2104.04473, section 5.1, without recomputation)."""
    config, vocab, length = ModelConfig(), 50304, 2048
    layers, width = config.num_layers, config.hidden_size
    usual = 72 * layers * length * width**2 * (1 + length / (6 * width)) + 6 * length * width * vocab
    found = ModelSize(config, vocab).training_flops(length, layers * length**2)
    assert found == pytest.approx(usual, rel=1e-12)


def test_vocabulary_is_rounded_up_or_as_configured() -> None:
    """50277 tokens make 50304 rows; a configured size that is too small is an error that names both."""
    assert padded_vocab_size(ModelConfig(), 50277) == 50304
    assert padded_vocab_size(ModelConfig(vocab_size=50432), 50277) == 50432
    assert padded_vocab_size(ModelConfig(vocab_multiple=512), 50277) == 50688  # Pythia-12b, tensor-parallel 4
    with pytest.raises(ModelError, match=r"model.vocab_size=100 is smaller than the tokenizer's 101"):
        padded_vocab_size(ModelConfig(vocab_size=100), 101)
