"""What falls due after which step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Due:
    """What a step is followed by."""

    log: bool
    validate: bool
    save: bool


@dataclass(frozen=True)
class Calendar:
    """How often each thing is done; the last step is followed by all that is done at all. 0: never."""

    steps: int
    log_every: int
    validate_every: int
    save_every: int

    def due(self, step: int) -> Due:
        """After step 1, 2, ..."""
        return Due(*(self._is_due(step, every) for every in (self.log_every, self.validate_every, self.save_every)))

    def _is_due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.steps)
