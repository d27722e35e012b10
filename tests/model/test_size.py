"""Parameter counts and FLOPs follow from the configuration."""

import pytest

from megatron_sep.config.schema import ModelConfig, ParallelConfig
from megatron_sep.model.size import ModelError, ModelSize, padded_vocab_size


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


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_equal_those_of_the_model(tied: bool) -> None:
    """The count is that of the model which is built."""
    from megatron_sep.model.build import build_model

    config = ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4, tie_embeddings=tied, ffn_hidden_size=100)
    model = build_model(config, ParallelConfig(), vocab_size=256, precision="fp32", seed=0)
    assert ModelSize(config, 256).parameters == sum(p.numel() for p in model.parameters())


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
    with pytest.raises(ModelError, match=r"model.vocab_size=100 is smaller than the tokenizer's 101"):
        padded_vocab_size(ModelConfig(vocab_size=100), 101)
