"""What ends a command as one message instead of a traceback; anything else is a fault of this program."""


class SepError(Exception):
    """Base of all errors that are told to the user. The message names the value, the place and the way out."""

    exit_code = 1


class UserError(SepError, ValueError):
    """Something that the user asked for or gave cannot be used as it is; nothing was begun or lost."""

    exit_code = 2


class RunFailure(SepError, RuntimeError):  # noqa: N818
    """What was asked for was right, and failed while it ran: a full disk, a loss that diverged, a dead peer."""
