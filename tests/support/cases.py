"""How many random cases a property test draws: 200 in the gate, all that it names under ``--full``."""

from collections.abc import Callable
from functools import wraps
from math import ceil
from typing import Any

from hypothesis import seed, settings

GATE, FULL = "gate", "full"
"""Profiles of Hypothesis; which one a run of pytest has loaded says how much of the tests it runs."""
ROUND = 200
"""Cases of a round. Its number seeds it, so the gate's one round is the first of the full run's."""

Test = Callable[..., None]


def load_profile(full: bool) -> None:
    """Set what is the same in both profiles, for tests that name no number of cases too, and which of the two it is."""
    for name in (GATE, FULL):
        settings.register_profile(name, derandomize=True, deadline=None)
    settings.load_profile(FULL if full else GATE)


def random_cases(count: int) -> Callable[[Test], Test]:
    """Let a test of Hypothesis draw ``count`` cases under ``--full``, and the first 200 of them in the gate."""

    def decorate(test: Test) -> Test:
        round_of_cases = settings(max_examples=ROUND)(test)

        @wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            for number in range(num_rounds(count)):
                seed(number)(round_of_cases)(*args, **kwargs)

        return run

    return decorate


def num_rounds(count: int) -> int:
    """Rounds that hold ``count`` different cases; each begins with the simplest one, which is the same in all."""
    return ceil((count - 1) / (ROUND - 1)) if full_run() else 1


def full_run() -> bool:
    """Was pytest called with ``--full``? True or False for good once test files are imported."""
    return bool(settings.get_current_profile_name() == FULL)
