"""What docs/data.md shows is what the program reads."""

import re
from pathlib import Path

import pytest

from megatron_sep.config.load import ConfigError, load
from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.config.schema import RunConfig

BLOCKS = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[2] / "docs" / "data.md").read_text(), re.DOTALL)


def test_the_example_of_prepare_is_read(tmp_path: Path) -> None:
    """The first block is a whole PrepareConfig, and a typo in it is named with the nearest key."""
    path = tmp_path / "prepare.yaml"
    path.write_text(BLOCKS[0])
    config = load(PrepareConfig, path)
    assert [source.weight for source in config.sources] == [1.0, 0.5, 2.5]
    assert config.deduplicate.near
    with pytest.raises(ConfigError, match=r"deduplicate\.thresh: no such key; did you mean deduplicate\.threshold"):
        load(PrepareConfig, path, ["deduplicate.thresh=0.9"])


@pytest.mark.parametrize("line", BLOCKS[1].splitlines())
def test_each_example_of_data_is_read(tmp_path: Path, line: str) -> None:
    """Every line of the second block is a data section."""
    path = tmp_path / "run.yaml"
    path.write_text(f"dir: run\ntokenizer: {{path: t.json}}\n{line}\n")
    assert load(RunConfig, path).data.sources
