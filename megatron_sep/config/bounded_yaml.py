"""Safe YAML that takes no more time and memory than a configuration of a megabyte needs, whoever wrote it."""

import re
from collections import Counter
from typing import Any

import yaml

MOST_BYTES = 1_000_000
"""Of a file."""
_MOST_NODES = 100_000
"""Values, with every alias written out: nine lists of nine aliases each are hundreds of millions."""
_MOST_DIGITS = 400
"""Of a number."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.tag != _MERGE)
        twice = sorted(str(key) for key, times in keys.items() if times > 1)
        if twice:
            raise _error(f"key stands twice: {', '.join(twice)}", node)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str) -> Any:
    """The value that YAML says; None for nothing. Raises yaml.YAMLError, for what is too much of anything too."""
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
        if node is None:
            return None
        _written_out(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("brackets in brackets, deeper than any configuration") from error
    except (ValueError, OverflowError, TypeError, AttributeError) as error:  # a day that is none, a tag that lies
        raise yaml.YAMLError(f"a value is not of the kind that it is said to be: {error}") from error


def _written_out(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Values in a node with its aliases written out; in ``known`` those that were counted, 0 while they are."""
    if node in known:
        if not known[node]:
            raise _error("holds itself", node)
        return known[node]
    known[node] = 0
    if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
        raise _error(f"a number of more than {_MOST_DIGITS} digits", node)
    below = node.value if isinstance(node, yaml.CollectionNode) else ()
    parts = [part for pair in below for part in (pair if isinstance(node, yaml.MappingNode) else (pair,))]
    known[node] = 1 + sum(_written_out(part, known) for part in parts)
    if known[node] > _MOST_NODES:
        raise _error(f"more than {_MOST_NODES:,} values once its aliases are written out", node)
    return known[node]


def _error(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
