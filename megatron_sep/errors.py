"""What ends a command as one message instead of a traceback; anything else is a fault of this program."""

import errno


class SepError(Exception):
    """Base of all errors that are told to the user. The message names the value, the place and the way out."""

    exit_code = 1
    begins = "error: "
    """What stands before the message."""
    of_the_job = False
    """Whether one process says it for all."""


class UserError(SepError, ValueError):
    """Something that the user asked for or gave cannot be used as it is; nothing was begun or lost."""

    exit_code = 2


class RunFailure(SepError, RuntimeError):  # noqa: N818
    """What was asked for was right, and failed while it ran: a full disk, a loss that diverged, a dead peer."""


class EndedError(SepError):
    """A run that ended before its last step because somebody wished so; the same command goes on."""

    begins = ""
    of_the_job = True


class StoppedError(EndedError):
    """A run that was asked to end: all that it did is saved."""

    exit_code = 75  # sysexits' "try again": what schedulers are told to requeue


class InterruptedRunError(EndedError):
    """A run that was interrupted on the spot; it goes on from its newest checkpoint."""

    exit_code = 130


def of_the_system(error: OSError) -> SepError | None:
    """What the operating system says of a path, as a message; None where it names none: a fault of this program."""
    if error.filename is None or error.errno is None:
        return None
    kind, way_out = _WAYS_OUT.get(error.errno, (UserError, "choose another path"))
    place = error.filename if error.filename2 is None else f"{error.filename} to {error.filename2}"
    return kind(f"{place}: {error.strerror}; {way_out}")


_FULL = (RunFailure, "free space there and start again")
_FORBIDDEN = (UserError, "choose another path, or let yourself read and write there")
_IN_THE_WAY = (UserError, "choose another path, or move away what is there")
_WAYS_OUT: dict[int, tuple[type[SepError], str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EIO: (RunFailure, "the disk does not read or write that place; look after it and start again"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: (UserError, "choose a path on a disk that can be written to"),
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTEMPTY: _IN_THE_WAY,
    errno.ENOENT: (UserError, "look for a mistake in the path"),
    errno.ENOTDIR: (UserError, "a part of the path is a file; choose another path"),
    errno.EISDIR: (UserError, "a file is needed there; name one"),
    errno.ENAMETOOLONG: (UserError, "choose a shorter name"),
}
