"""What falls due after a step."""

from megatron_sep.train.calendar import Calendar, Due


def test_each_thing_is_due_at_its_multiples_and_at_the_last_step() -> None:
    """Every 3, every 5, never; the last step is followed by all that is done at all."""
    calendar = Calendar(steps=11, log_every=3, validate_every=5, save_every=0)
    due = {step: calendar.due(step) for step in range(1, 12)}
    assert [step for step, what in due.items() if what.log] == [3, 6, 9, 11]
    assert [step for step, what in due.items() if what.validate] == [5, 10, 11]
    assert not any(what.save for what in due.values())
    assert due[4] == Due(log=False, validate=False, save=False)
