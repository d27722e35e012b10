"""What each extra of pyproject.toml adds to an installation: packages, and MiB on this disk; run where they all are.

python tools/extra_sizes.py
"""

import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
NAME = "megatron-sep"


def found(name: str) -> Distribution | None:
    """An installed distribution."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def closure(lines: Iterable[str]) -> set[str]:
    """The names of all that these requirements need, themselves included, on this machine."""
    seen: set[tuple[str, str]] = set()
    waiting = [requirement for requirement in map(Requirement, lines) if applies(requirement)]
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            name = canonicalize_name(requirement.name)
            if (name, extra) in seen or name == NAME:
                continue
            seen.add((name, extra))
            installed = found(name)
            waiting += [
                each for each in map(Requirement, (installed and installed.requires) or ()) if applies(each, extra)
            ]
    return {name for name, _ in seen}


def size(name: str) -> int | None:
    """Bytes of an installed distribution's files; None: it is not installed."""
    installed = found(name)
    if installed is None:
        return None
    paths = [Path(str(file.locate())) for file in installed.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def row(title: str, names: set[str]) -> str:
    """A line of the table; packages that are not there are named."""
    sizes = {name: size(name) for name in sorted(names)}
    missing = [name for name, bytes_ in sizes.items() if bytes_ is None]
    mebibytes = sum(bytes_ or 0 for bytes_ in sizes.values()) / 2**20
    return f"| {title} | {len(names)} | {mebibytes:.0f} |" + (f" without {', '.join(missing)}" if missing else "")


def table() -> list[str]:
    """Base, then every extra, each without what the base has."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    base = closure(project["dependencies"])
    lines = project["optional-dependencies"]
    extras = {name: closure(lines[name]) - base for name in lines}
    extras["dev"] = set().union(*extras.values())  # which names the others by this project's own name
    return [
        "| | packages | MiB |",
        "|---|---|---|",
        row("base, torch included", base),
        row("torch alone", {"torch"}),
        *(row(f"`{name}`", names) for name, names in extras.items()),
    ]


if __name__ == "__main__":
    print("\n".join(table()))
