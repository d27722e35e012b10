"""A window that shrinks: halves at even distances, then stays."""

import pytest
from pydantic import ValidationError

from megatron_sep.attention.annealing import Annealing
from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import AnnealingConfig, AttentionConfig

RULES = LayerRules(layer_patterns(AttentionPattern(64, 3, (5,)), 4, (0,)), AttentionPattern(separator_ids=(5,)), None)


@pytest.mark.parametrize("first", [0, 93_000])
def test_the_window_halves_from_start_to_its_final_size(first: int) -> None:
    """2048 to 64 over 100 steps, counted from the run's first: five windows before the last, twenty steps each."""
    annealing = Annealing(RULES, AnnealingConfig(start=2048, steps=100), first)
    windows = [annealing(first + step).patterns[1].window for step in range(1, 121)]
    assert windows == [size for size in (2048, 1024, 512, 256, 128, 64) for _ in range(20)]


def test_full_layers_landmarks_and_other_runs_stay_as_they_are() -> None:
    """Only the window of a pattern changes; without a schedule nothing does."""
    annealed = Annealing(RULES, AnnealingConfig(start=100, steps=10), 0)(1)
    assert annealed.patterns[0] == AttentionPattern()
    assert annealed.patterns[1] == AttentionPattern(100, 3, (5,))
    assert Annealing(RULES, None, 0)(1) is RULES
    assert Annealing(RULES, AnnealingConfig(start=64, steps=10), 0)(1).patterns == RULES.patterns


@pytest.mark.parametrize(
    ("start", "final", "windows"), [(128, 33, (128, 64, 33)), (100, 64, (100, 64)), (7, 1, (7, 3, 1))]
)
def test_no_halving_is_left_out(start: int, final: int, windows: tuple[int, ...]) -> None:
    """Whatever the final window, every half above it has its share of the steps, and `stages` says from when."""
    rules = LayerRules(layer_patterns(AttentionPattern(final), 2), AttentionPattern(), None)
    annealing = Annealing(rules, AnnealingConfig(start=start, steps=12), 5)
    seen = [annealing(step).patterns[0].window for step in range(6, 20)]
    assert tuple(dict.fromkeys(seen)) == windows
    assert annealing.stages() == {6 + seen.index(window): window for window in windows}


def test_a_step_for_each_window_is_the_least() -> None:
    """Fewer steps than windows would leave some out."""
    assert AttentionConfig(window=8, anneal=AnnealingConfig(start=64, steps=3)).anneal is not None
    with pytest.raises(ValidationError, match=r"anneal.steps=2 is less than a step for each of its windows 64, 32, 16"):
        AttentionConfig(window=8, anneal=AnnealingConfig(start=64, steps=2))
