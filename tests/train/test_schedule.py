"""The learning rate warms up, decays and stays at its minimum."""

import math

import pytest

from megatron_sep.config.schema import OptimizerConfig
from megatron_sep.train.schedule import LearningRate


def test_pythias_schedule() -> None:
    """6e-4 after 1 % of 143,000 steps, halfway down in the middle of the cosine, 6e-5 at the end and after."""
    lr = LearningRate(OptimizerConfig(), 143_000)
    assert lr(143) == pytest.approx(6e-5)
    assert lr(1430) == pytest.approx(6e-4)
    assert lr(1430 + (143_000 - 1430) // 2) == pytest.approx((6e-4 + 6e-5) / 2)
    assert lr(143_000) == lr(200_000) == pytest.approx(6e-5)
    assert all(lr(s) >= lr(s + 1) for s in range(1430, 143_000, 7))


@pytest.mark.parametrize(("decay", "quarter"), [("cosine", 0.5 * (1 + math.cos(math.pi / 4))), ("linear", 0.75)])
def test_shapes_of_decay(decay: str, quarter: float) -> None:
    """A quarter of the way down without warm-up."""
    config = OptimizerConfig.model_validate({"lr": 1.0, "min_lr": 0.0, "warmup": 0.0, "decay": decay})
    assert LearningRate(config, 100)(25) == pytest.approx(quarter)


def test_constant_never_falls() -> None:
    """The constant schedule keeps its rate to the last step."""
    config = OptimizerConfig(lr=1e-3, min_lr=0, warmup=0.1, decay="constant")
    assert {LearningRate(config, 100)(step) for step in (10, 50, 100)} == {1e-3}


def test_linear_to_zero_is_gpt_neox_s_linear() -> None:
    """max(lr (end - n) / (end - warm-up), min_lr): the floor is met on the way, and equals linear where it is 0."""
    settings = {"lr": 1.0, "min_lr": 0.3, "warmup": 0.1, "decay": "linear_to_zero"}
    floored = LearningRate(OptimizerConfig.model_validate(settings), 100)
    assert [floored(n) for n in range(10, 131, 10)] == pytest.approx(
        [max((100 - n) / 90, 0.3) for n in range(10, 131, 10)]
    )
    no_floor = settings | {"min_lr": 0.0}
    plain = LearningRate(OptimizerConfig.model_validate(no_floor | {"decay": "linear"}), 100)
    to_zero = LearningRate(OptimizerConfig.model_validate(no_floor), 100)
    assert [to_zero(n) for n in range(1, 131)] == [plain(n) for n in range(1, 131)]
    assert floored(5) == pytest.approx(0.5)
