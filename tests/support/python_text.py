"""English that every Python brings: the pages of its `help()`, and the docstrings of its library."""

import ast
import pydoc_data.topics
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 200
"""Characters of a docstring."""


def manual_pages() -> Iterator[str]:
    yield from pydoc_data.topics.topics.values()


def docstrings() -> Iterator[str]:
    """Of the standard library's top-level modules, their classes and functions."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST:
                    yield text
