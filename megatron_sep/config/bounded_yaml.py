"""YAML of anybody's making: plain values alone, and bounded in size, depth and what its aliases stand for."""

import re
from collections import Counter
from typing import Any

import yaml

from megatron_sep.errors import UserError

MOST_BYTES = 1 << 20
MOST_DEPTH = 64
MOST_VALUES = 20_000
"""With each alias counted as what it stands for."""


MOST_DIGITS = 400
_NUMBER = re.compile(r"[-+0-9a-fA-FxXo_.:]+")
"""As YAML writes one; a time of many colons grows by its square."""


class BoundsError(UserError, yaml.YAMLError):
    """YAML that is larger, deeper or more than any configuration."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        counts = Counter(key.value for key in keys if isinstance(key, yaml.ScalarNode))
        twice = sorted(str(key) for key, count in counts.items() if count > 1)
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key stands twice: {', '.join(twice)}", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(text: str) -> Any:
    """The value of a document. In a mapping in braces, a comma that is missing at the end of a line is put there.

    Pythia-12b lacks one. Raises yaml.YAMLError, in time and memory that do not exceed what the bounds allow.
    """
    check_size(len(text))
    for _ in range(min(text.count("\n") + 1, MOST_BYTES // max(1, len(text)))):
        try:
            return _read(text)
        except yaml.parser.ParserError as error:
            mark = error.problem_mark
            if mark is None or not str(error.problem).startswith("expected ',' or '}', but got '<scalar>'"):
                raise
            line = text.rfind("\n", 0, mark.index) + 1
            if text[line : mark.index].strip() or "{" not in text[:line]:
                raise
            text = f"{text[: mark.index]},{text[mark.index :]}"
    return _read(text)


def check_size(size: int) -> None:
    """Raise BoundsError for a file of too many bytes."""
    if size > MOST_BYTES:
        raise BoundsError(f"{size:,} bytes; a configuration has {MOST_BYTES:,} at most")


def _read(text: str) -> Any:
    _check_bounds(text)
    try:
        return _Loader(text).get_single_data()
    except (
        ValueError,
        OverflowError,
        RecursionError,
        TypeError,
        AttributeError,
    ) as error:  # a date that is none, a number without end
        raise BoundsError(f"holds a value that cannot be: {error}") from error


def _check_bounds(text: str) -> None:
    """Look through the text before anything is made of it. Raises BoundsError, yaml.YAMLError."""
    opened: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    values = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, values))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = values - before + 1
        elif isinstance(event, yaml.AliasEvent):
            values += sizes.get(str(event.anchor), 0)
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if len(event.value) > MOST_DIGITS and _NUMBER.fullmatch(event.value):
                raise BoundsError(f"a number of {len(event.value):,} characters; {MOST_DIGITS} are the most")
        values += isinstance(event, yaml.NodeEvent)
        if len(opened) > MOST_DEPTH:
            raise BoundsError(f"sections lie {len(opened)} deep in each other; {MOST_DEPTH} is the most")
        if values > MOST_VALUES:
            raise BoundsError(f"more than {MOST_VALUES:,} values, aliases included")
