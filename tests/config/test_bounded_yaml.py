"""YAML of anybody's making ends in a value or in one message, soon and in little memory."""

import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases

from megatron_sep.config import ConfigError, load_config
from megatron_sep.config.bounded_yaml import MOST_BYTES, MOST_DEPTH, MOST_VALUES, read_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
HOSTILE = {
    "aliases that double 39 times": (BOMB, "more than 20,000 values, aliases included"),
    "merged keys that double 39 times": (MERGED, "more than 20,000 values, aliases included"),
    "lists in lists": ("a: " + "[" * 5000, f"sections lie {MOST_DEPTH + 1} deep"),
    "indented sections": ("".join(f"{' ' * i}a:\n" for i in range(300)), f"sections lie {MOST_DEPTH + 1} deep"),
    "a megabyte": ("a: " + "x" * MOST_BYTES, "a configuration has 1,048,576 at most"),
    "a number without end": ("a: " + "9" * 10_000, "a number of 10,000 characters"),
    "a day that is none": ("a: 2020-99-99", "holds a value that cannot be"),
    "an object": ("a: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
    "a key that stands twice": ("a: 1\na: 2", "key stands twice: a"),
    "many commas that are missing": ("a: {\n" + "b: 1\n" * 50_000 + "}", "expected ',' or '}'"),
    "an anchor inside itself": ("a: &a [*a]", "is no configuration"),
    "many values": ("a: [" + "x," * MOST_VALUES + "]", "more than 20,000 values"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_soon(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bombs, depths, sizes, code and values that cannot be: one message that names the file, and no code runs."""
    monkeypatch.chdir(tmp_path)
    text, message = HOSTILE[name]
    (tmp_path / "run.yaml").write_text(text)
    begin = time.process_time()
    with pytest.raises(ConfigError, match=r"run\.yaml: ") as refused:
        load_config(tmp_path / "run.yaml")
    assert message in str(refused.value)
    assert len(str(refused.value)) < 2000
    assert time.process_time() - begin < 5
    assert not (tmp_path / "canary").exists()


def test_an_override_has_the_same_bounds(tmp_path: Path) -> None:
    """section.key=value is YAML too."""
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"train\.steps: sections lie 65 deep in each other; 64 is the most"):
        load_config(tmp_path / "run.yaml", ["train.steps=" + "[" * 5000])


def test_files_that_extend_each_other_are_read_once(tmp_path: Path) -> None:
    """40 files that each extend the next one twice would be read a million million times."""
    for i in range(40):
        (tmp_path / f"{i}.yaml").write_text(f"extends: [{i + 1}.yaml, {i + 1}.yaml]\n")
    (tmp_path / "40.yaml").write_text("dir: runs/x\ntokenizer: {path: t}\ndata: {path: c}\n")
    assert str(load_config(tmp_path / "0.yaml").dir) == "runs/x"
    for i in range(101):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    with pytest.raises(ConfigError, match="made of 100 files at most"):
        load_config(tmp_path / "0.yaml")


@random_cases(2000)
@given(st.text(alphabet="ab: -[]{}&*!|>\n'\"#,<0.e", max_size=60))
def test_any_text_is_a_value_or_an_error_of_yaml(text: str) -> None:
    """No other exception leaves the reader, whatever the punctuation."""
    with suppress(yaml.YAMLError):
        read_yaml(text)
