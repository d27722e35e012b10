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


def labelled(axes: Any, x: str, y: str, title: str = "") -> None:
    """Name the axes with their units, in the style of all curves: a faint grid, a legend without a frame."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if title:
        axes.set_title(title, loc="left", fontsize=10)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)


def save(figure: Any, *paths: Path, **settings: Any) -> None:
    """Write a matplotlib figure, in every format that is asked for, and close it. Raises PictureError, OSError.

    The same figure is the same bytes as SVG, each time.
    """
    for path in paths:
        check_format(path)
        kind = path.suffix[1:].lower()
        undated = {"metadata": {"Date": None}} if kind == "svg" else {}
        with written_aside(path) as aside, pyplot().rc_context({"svg.hashsalt": "megatron_sep"}):
            figure.savefig(aside, format=kind, **undated, **settings)
    pyplot().close(figure)
