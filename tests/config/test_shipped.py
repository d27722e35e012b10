"""Configurations are found by name, from any directory."""

from pathlib import Path

import pytest

from megatron_sep.config import ConfigError, load_config, sketch_config
from megatron_sep.config.load import read_tree
from megatron_sep.config.shipped import shipped_config, shipped_names, shipped_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_run_is_found_by_its_name(name: str) -> None:
    """As by its path."""
    assert sketch_config(Path(name)) == sketch_config(ROOT / "configs" / "runs" / f"{name}.yaml")


def test_parts_are_found_too_and_go_on_top_of_each_other() -> None:
    """By their name where no run has it, and by folder and name."""
    found = sketch_config(Path("pythia-1.4b"), ["sep-n128", "positions/alibi", "dir=x", "train.steps=7"]).config
    assert (found.model.num_layers, found.attention.window, found.train.steps) == (24, 128, 7)
    assert found.model.position.kind == "alibi"
    assert shipped_config("pythia-160m") == ROOT / "configs" / "runs" / "pythia-160m.yaml"
    assert shipped_config("models/pythia-160m") == ROOT / "configs" / "models" / "pythia-160m.yaml"


def test_a_file_of_that_name_comes_first(tmp_path: Path) -> None:
    """A folder of that name is none."""
    (tmp_path / "quickstart").mkdir()
    assert "data" in read_tree(Path("quickstart"))
    (tmp_path / "pythia-70m").write_text("dir: mine")
    assert read_tree(Path("pythia-70m")) == {"dir": "mine"}


@pytest.mark.parametrize("name", ["pythia-160", "../runs/pythia-70m", "/pythia-70m"])
def test_a_name_that_is_none_is_told_with_those_that_are(name: str) -> None:
    """A path that ends in .yaml is a path."""
    with pytest.raises(ConfigError, match=r"no run of that name is shipped; there are .*quickstart"):
        load_config(Path(name))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Path(f"{name}.yaml"))


def test_a_script_of_the_working_directory_comes_first(tmp_path: Path) -> None:
    """Else it is the shipped one."""
    assert shipped_script("setup.sh") == ROOT / "scripts" / "setup.sh"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.sh").touch()
    assert shipped_script("setup.sh") == Path("scripts/setup.sh")
