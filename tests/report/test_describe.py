"""What `show` prints of a run beside its settings."""

from collections.abc import Callable
from importlib import metadata
from platform import python_version

import torch

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.words import in_words
from megatron_sep.config.load import Sketch
from megatron_sep.config.schema import RunConfig
from megatron_sep.report.describe import describe


def shown(config: RunConfig) -> str:
    """What `show` prints of a whole configuration."""
    return describe(Sketch(config, {}))


def test_the_versions_in_use_are_told(tiny: Callable[..., RunConfig]) -> None:
    """Those that a checkpoint would name, in one line."""
    (line,) = [line for line in shown(tiny()).splitlines() if line.startswith("# with ")]
    assert f"python {python_version()}, " in line
    assert f"megatron-core {metadata.version('megatron-core')}, " in line
    assert f"torch {torch.__version__}, " in line


def test_separators_are_measured_where_the_data_is(tiny: Callable[..., RunConfig]) -> None:
    """One line; where the data is not there yet, why; none for a run without separators."""
    said = "of the separating characters stand in a token that is none"
    assert shown(tiny()).count(said) == 1
    missing = shown(tiny(data={"path": "nowhere"}))
    assert said not in missing
    assert "# what the separators hold of the data is not known yet: nowhere" in missing
    assert "separators hold" not in shown(tiny(attention={"separators": ()}, data={"path": "nowhere"}))


def test_a_long_list_is_counted() -> None:
    """Twenty ids are shown; of more, their number and the first twenty."""
    twenty = ", ".join(map(str, range(20)))
    shown = [in_words(AttentionPattern(4, separator_ids=tuple(range(number)))) for number in (20, 535)]
    assert shown[0].endswith(f"every separator (ids {twenty})")
    assert shown[1].endswith(f"every separator (535 ids: {twenty} ...)")
