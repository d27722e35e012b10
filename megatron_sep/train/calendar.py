"""What falls due after which step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Due:
    """What a step is followed by."""

    log: bool
    validate: bool
    save: bool
    look: bool = False
    """At what attention pays to each kind of key?"""

    @property
    def anything(self) -> bool:
        """Must the step be over before the next one begins?"""
        return self.log or self.validate or self.save or self.look


@dataclass(frozen=True)
class Left:
    """How often each thing will still be done."""

    steps: int
    validations: int
    saves: int
    looks: int = 0


@dataclass(frozen=True)
class Calendar:
    """How often each thing is done; the last step is followed by all that is done at all. 0: never."""

    steps: int
    log_every: int
    validate_every: int
    save_every: int
    look_every: int = 0

    def due(self, step: int) -> Due:
        """After step 1, 2, ..."""
        every = (self.log_every, self.validate_every, self.save_every, self.look_every)
        return Due(*(self._is_due(step, each) for each in every))

    def left(self, step: int) -> Left:
        """Of the run after a step and what that step is followed by."""
        every = (self.validate_every, self.save_every, self.look_every)
        return Left(self.steps - step, *(self._times_left(step, each) for each in every))

    def _times_left(self, step: int, every: int) -> int:
        if not every or step >= self.steps:
            return 0
        return self.steps // every - step // every + (self.steps % every > 0)

    def _is_due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.steps)
