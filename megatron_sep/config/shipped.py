"""Configurations and scripts that come with the program, found by name: in a checkout, or in an installed wheel."""

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


@cache
def shipped() -> Path | None:
    """The folder that has configs/ and scripts/ in it; None where there is none."""
    places = (_PACKAGE / "shipped", _PACKAGE.parent)
    return next((place for place in places if (place / "configs" / "runs").is_dir()), None)


def shipped_config(name: str) -> Path | None:
    """The file of `NAME`, a run before a part of one, or of `FOLDER/NAME`; None where nothing is called so."""
    root = shipped()
    if root is None or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    configs = root / "configs"
    places = [configs / "runs", configs, *(folder for folder in sorted(configs.iterdir()) if folder.is_dir())]
    return next((file for place in places if (file := place / f"{name}.yaml").is_file()), None)


def shipped_names() -> list[str]:
    """Of all runs."""
    root = shipped()
    return [] if root is None else sorted(file.stem for file in (root / "configs" / "runs").glob("*.yaml"))


def located(path: Path) -> Path:
    """The file itself where it is there, else the shipped one of that name, else the path as it was."""
    return path if path.is_file() else shipped_config(str(path)) or path


def shipped_script(name: str) -> Path:
    """scripts/NAME of the working directory, of an installed wheel, or as it would be."""
    here, root = Path("scripts") / name, shipped()
    return here if here.is_file() or root is None else root / "scripts" / name
