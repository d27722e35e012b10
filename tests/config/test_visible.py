"""Pairs that are expected to be visible, against those that the rule counts."""

import pytest
import torch

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.config.visible import kept_tokens, model_pairs, most_landmarks, num_full_layers, visible_pairs

LENGTH = 300


def counted(attention: AttentionConfig, share: float, rows: int = 400) -> tuple[float, AttentionPattern, torch.Tensor]:
    """Pairs of a sequence by the rule, as a mean over random texts of which a share of the tokens are separators."""
    ids_BT = (torch.rand(rows, LENGTH, generator=torch.Generator().manual_seed(0)) < share).long()
    separators = (1,) if attention.separators else ()
    pattern = AttentionPattern(attention.window, attention.sinks, separators, attention.stride)
    return float(pattern.plan(ids_BT).num_visible().sum()) / rows, pattern, ids_BT


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"window": 1},
        {"window": 20, "sinks": 3},
        {"window": 20, "sinks": 3, "separators": "default"},
        {"window": 20, "sinks": 290, "separators": "default"},
        {"window": 20, "sinks": 3, "stride": 5},
        {"window": 400, "separators": "default"},
    ],
    ids=str,
)
def test_the_expectation_is_the_mean_of_what_the_rule_counts(values: dict[str, object], share: float) -> None:
    """Within the noise of 400 texts."""
    attention = AttentionConfig.model_validate(values)
    found, pattern, ids_BT = counted(attention, share)
    assert visible_pairs(attention, LENGTH, share) == pytest.approx(found, rel=0.02)
    last = float(pattern.plan(ids_BT).num_visible()[:, -1].float().mean())
    assert kept_tokens(attention, LENGTH, share) == pytest.approx(last, rel=0.05)


def test_layers_that_see_everything_count_as_such() -> None:
    """As many as the patterns of the layers have; a negative number names the same layer from the end."""
    attention = AttentionConfig(window=8, full_layers=(0, -1, 3))
    full = [pattern.window for pattern in layer_patterns(AttentionPattern(8), 4, attention.full_layers)].count(None)
    assert num_full_layers(attention, 4) == full == 2
    assert num_full_layers(AttentionConfig(), 4) == 4
    pairs = 2 * LENGTH * (LENGTH + 1) / 2 + 2 * visible_pairs(attention, LENGTH, 0.15)
    assert model_pairs(attention, 4, LENGTH, 0.15) == pairs


@pytest.mark.parametrize("values", [{"sinks": 3}, {"sinks": 3, "stride": 7}, {"separators": "default"}, {"sinks": 400}])
def test_room_for_landmarks_is_what_a_plan_promises(values: dict[str, object]) -> None:
    """The kernel keeps copies of so many keys."""
    attention = AttentionConfig.model_validate({"window": 8, **values})
    separators = (1,) if attention.separators else ()
    plan = AttentionPattern(8, attention.sinks, separators, attention.stride).plan(torch.zeros(1, LENGTH).long())
    assert most_landmarks(attention, LENGTH) == plan.max_landmarks
