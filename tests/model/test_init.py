"""Initial weights have Pythia's distributions and depend on the seed alone."""

import math

import pytest
import torch

from megatron_sep.config.schema import ModelConfig
from megatron_sep.parallel.groups import topology

pytestmark = pytest.mark.usefixtures("single_process")
CONFIG = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4)


def weights(seed: int) -> dict[str, torch.Tensor]:
    from megatron_sep.model.build import build_model

    return dict(build_model(CONFIG, topology(), vocab_size=1024, precision="fp32", seed=seed).named_parameters())


def test_standard_deviations_are_small_init_and_wang_init() -> None:
    """sqrt(2 / 5h) for inputs and embeddings, 2 / (L sqrt h) for what writes to the residual; biases 0, norms 1."""
    small, wang = math.sqrt(2 / (5 * 256)), 2 / 4 / math.sqrt(256)
    for name, weight in weights(1).items():
        if weight.dim() == 2:
            expected = wang if "linear_proj" in name or "linear_fc2" in name else small
            assert float(weight.std()) == pytest.approx(expected, rel=0.02), name
            assert abs(float(weight.mean())) < 0.02 * expected, name
        else:
            assert torch.all(weight == (1 if name.endswith("norm.weight") else 0)), name


def test_scaled_normal_is_smaller_by_the_root_of_the_matrices_into_the_residual() -> None:
    """GPT-NeoX's defaults: 0.02, and 0.02 / sqrt(2 x 4 layers) for what writes to the residual."""
    from megatron_sep.model.build import build_model

    config = CONFIG.model_copy(update={"init": "normal", "output_init": "scaled_normal"})
    model = build_model(config, topology(), vocab_size=1024, precision="fp32", seed=1)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            expected = 0.02 / math.sqrt(8) if "linear_proj" in name or "linear_fc2" in name else 0.02
            assert float(weight.std()) == pytest.approx(expected, rel=0.02), name


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    """Random numbers drawn elsewhere change nothing; another seed changes every matrix; no two matrices are alike."""
    first = weights(1)
    torch.rand(7)
    again, other = weights(1), weights(2)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert weight.dim() == 1 or not torch.equal(weight, other[name]), name
    layers = [first[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in range(4)]
    assert not any(torch.equal(layers[i], layers[j]) for i in range(4) for j in range(i))
