"""What became of a step is read while the next one runs, once and in order."""

import math

import torch

from megatron_sep.train.outcomes import Outcomes


def test_a_step_is_read_when_the_next_one_was_added() -> None:
    """Each once, in order; the last one only where all are asked for."""
    outcomes = Outcomes()
    read = []
    for step in range(1, 6):
        outcomes.add(step, torch.tensor(step / 2), torch.tensor(float(step)))
        read.append([outcome.step for outcome in outcomes.over(all_of_them=step == 3)])
    assert read == [[], [1], [2, 3], [], [4]]


def test_a_norm_that_is_not_finite_means_that_nothing_was_applied() -> None:
    """Loss and norm arrive as they were; NaN and infinity were skipped."""
    outcomes = Outcomes()
    for norm in (1.5, math.nan, math.inf):
        outcomes.add(1, torch.tensor(2.5), torch.tensor(norm, dtype=torch.float64))
    found = list(outcomes.over(all_of_them=True))
    assert [outcome.applied for outcome in found] == [True, False, False]
    assert [outcome.loss for outcome in found] == [2.5, 2.5, 2.5]
    assert found[0].grad_norm == 1.5
