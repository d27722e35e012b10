"""Reads the words of many command lines, each with the very parser of its tool, which goes no further than that.

    python -m support.tool_options '[["tools/bench_sizes.py", "--json", "out.json"]]'

A path is a program of the repository, and a name without a slash a module. Prints a JSON list: null, or what is wrong.
"""

import argparse
import io
import json
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_parse = argparse.ArgumentParser.parse_args


class _ParsedError(Exception):
    """The words were understood."""


def _parse_alone(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
    _parse(parser, args, namespace)
    raise _ParsedError


def mistake(words: Sequence[str]) -> str | None:
    """What the tool says to these words; None where it understands them."""
    sys.argv = list(words)
    said = io.StringIO()
    if "/" in words[0] and "ArgumentParser" not in (text := (ROOT / words[0]).read_text()):
        known = len(words) == 1 or not words[1].islower() or f'"{words[1]}":' in text
        return None if known else f"{words[1]}: is no verb of {words[0]}"
    try:
        with redirect_stderr(said):
            if "/" in words[0]:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            else:
                runpy.run_module(words[0], run_name="__main__")
    except _ParsedError:
        return None
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1] if said.getvalue() else "ended without a word"
    return "went on without reading its words"


if __name__ == "__main__":
    sys.path += [str(ROOT / "tools"), str(ROOT / "tests")]
    asked = json.loads(sys.argv[1])
    argparse.ArgumentParser.parse_args = _parse_alone  # type: ignore[method-assign]
    print(json.dumps([mistake(words) for words in asked]))
