"""Pictures on disk: whole under their names or not there, in the format that their suffix names."""

from pathlib import Path
from typing import Any

from megatron_sep.data.extras import needs_extra
from megatron_sep.errors import UserError
from megatron_sep.files import written_aside

FORMATS = (".png", ".jpg", ".svg", ".pdf")


class PictureError(UserError):
    """A picture that cannot be drawn as asked."""


def check_format(path: Path) -> None:
    """Raise PictureError for a suffix that names no format."""
    if path.suffix.lower() not in FORMATS:
        raise PictureError(f"--out {path}: a picture is a file that ends in {', '.join(FORMATS)}")


def pyplot() -> Any:
    """matplotlib's pyplot, for files and no screen. Raises MissingLibraryError."""
    with needs_extra("matplotlib", "plot"):
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as found
    return found


def save(figure: Any, path: Path, **settings: Any) -> None:
    """Write a matplotlib figure and close it. Raises PictureError, OSError."""
    check_format(path)
    with written_aside(path) as aside:
        figure.savefig(aside, format=path.suffix[1:].lower(), **settings)
    pyplot().close(figure)
