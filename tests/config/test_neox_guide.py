"""What docs/coming-from-gpt-neox.md says of keys and defaults is what the program does."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sep.config.neox import spell
from megatron_sep.config.neox_rules import Part
from megatron_sep.config.neox_table import TABLE, rule_of
from megatron_sep.config.schema import ModelConfig, OptimizerConfig

GUIDE = (Path(__file__).parents[2] / "docs" / "coming-from-gpt-neox.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = GUIDE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def default(key: str) -> Any:
    """Of the table: ``a.b.c`` is a key inside another."""
    first, *inside = key.split(".")
    rule = TABLE[first]
    value: Any = rule.inside if inside and isinstance(rule, Part) else rule.default
    for name in inside:
        value = value[name]
    return value


@pytest.mark.parametrize("row", rows("What a file leaves out"), ids=lambda row: row[0])
def test_the_defaults_in_the_guide_are_those_of_the_table(row: list[str]) -> None:
    """Key and value, as YAML reads them."""
    key, said = row[0].strip("`"), yaml.safe_load(row[1].strip("`"))
    assert default(key) == said


def test_our_own_defaults_in_the_guide_are_those_of_the_schema() -> None:
    """The third column, for keys that are a setting of ours."""
    ours = {row[0].strip("`"): row[2].strip("`") for row in rows("What a file leaves out")}
    model, optimizer = ModelConfig(), OptimizerConfig()
    assert ours["rotary_pct"] == str(model.rotary_fraction)
    assert ours["no_weight_tying"] == str(not model.tie_embeddings)
    assert ours["gpt_j_residual"] == str(model.parallel_residual)
    assert (ours["init_method"], ours["output_layer_init_method"]) == (model.init, model.output_init)
    assert (ours["lr_decay_style"], ours["min_lr"]) == (optimizer.decay, str(optimizer.min_lr))
    assert (ours["optimizer.params.lr"], ours["optimizer.params.betas"]) == (str(optimizer.lr), "[0.9, 0.95]")


@pytest.mark.parametrize("row", rows("Key by key"), ids=lambda row: row[0][:40])
def test_every_key_of_the_guide_is_known(row: list[str]) -> None:
    """No row names a key that the table does not have."""
    keys = re.findall(r"`(\w+)`", row[0])
    assert keys
    assert [key for key in keys if rule_of(spell(key)) is None] == []
