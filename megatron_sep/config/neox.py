"""GPT-NeoX, Pythia and official SepLLM files become our configuration; ``neox_table`` says of each key how.

Dashes, underscores and case are the same. What a file leaves out has its own program's default, not ours.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from megatron_sep.config.neox_parts import COMPOSERS, REMARKS
from megatron_sep.config.neox_rules import (
    NEEDED,
    ArchitectureError,
    NeoxError,
    Only,
    Part,
    Refused,
    Rule,
    To,
    Tree,
    describes_a_model,
)
from megatron_sep.config.neox_table import GPT_NEOX, OLDER, SEPLLM, TABLE, rule_of

NATIVE_TOO = {"optimizer", "dir"}
"""Keys that a file of ours has as well: they do not tell the two kinds apart."""
_ALIKE = 0.75
"""Of a misspelt key and the one that is meant; a key of another program is like none."""
_NEEDED_PATHS = {"train_micro_batch_size_per_gpu": "train.micro_batch_size"}


@dataclass(frozen=True)
class Filled:
    """The keys of files in one spelling, and what was left out."""

    values: Tree
    left_out: Tree
    """Keys that have their default, ``a.b`` for a key inside another."""


def spell(key: str) -> str:
    """Dashes, underscores and case do not matter; a name of an older version is today's."""
    plain = key.replace("-", "_").lower()
    return OLDER.get(plain, plain)


def is_neox(tree: Mapping[str, Any], native: set[str]) -> bool:
    """Whether a file is GPT-NeoX's: it has a key of the table, and no section of ours."""
    keys = set(map(str, tree))
    return any(rule_of(spell(key)) for key in keys - native) and not keys & (native - NATIVE_TOO)


def translate(tree: Mapping[str, Any], name: str) -> Tree:
    """Our configuration from the keys of GPT-NeoX's; ``name`` becomes the run's dir where the file has no `save`.

    Raises NeoxError, naming every key that is not known or refused at once.
    """
    values, mistakes = _spelled(tree)
    filled = _filled(values)
    found: Tree = {}
    errors: list[Exception] = []
    for key, value in filled.values.items():
        try:
            _apply(found, key, value, key in filled.left_out)
        except (NeoxError, TypeError, ValueError) as error:
            errors.append(error)
    for compose in COMPOSERS:
        try:
            for path, value in compose(filled.values).items():
                _put(found, path, value)
        except (NeoxError, TypeError, ValueError, AttributeError) as error:
            errors.append(error)
    foreign = [str(error) for error in errors if isinstance(error, ArchitectureError)]
    mistakes = foreign[:1] or [*mistakes, *map(str, errors)]
    if mistakes:
        raise NeoxError("\n".join(mistakes))
    found.setdefault("dir", f"runs/{name}")
    return found


def needed_keys(tree: Mapping[str, Any], alone: bool, pattern_too: bool) -> dict[str, str]:
    """The keys that GPT-NeoX has no default for and training needs, by the path of ours that gives them too.

    ``alone``: no file of ours lies on top. Nothing is needed of files that describe no model beside others, nor,
    unless ``pattern_too``, of a pattern alone.
    """
    values, _ = _spelled(tree)
    if not (describes_a_model(values) or (alone and (pattern_too or values.keys() - SEPLLM.keys()))):
        return {}
    rules = {key: rule for key, rule in TABLE.items() if rule.default is NEEDED}
    return {(rule.path if isinstance(rule, To) else _NEEDED_PATHS[key]): key for key, rule in rules.items()}


def notes(tree: Mapping[str, Any]) -> Iterator[str]:
    """What became of each key, then which were left out and mean something all the same; a line each."""
    for key, value in tree.items():
        yield f"{key}: {fate(str(key), value)}"
    filled = _filled(_spelled(tree)[0])
    for key, value in filled.left_out.items():
        yield f"{key}: left out, which means {value!r}; {fate(key.split('.')[0], value)}"
    for remarks in REMARKS:
        yield from remarks(filled.values)


def fate(key: str, value: Any) -> str:
    """What becomes of a key, in words."""
    rule = rule_of(spell(key))
    if isinstance(rule, To):
        return f"becomes {rule.path}"
    taken = isinstance(rule, Only) and value in rule.values
    if isinstance(rule, Part) or (isinstance(rule, Only) and rule.of and taken):
        return f"goes into {rule.of}"
    if rule is None or taken:
        return "is as here" if rule else "is not known"
    return f"{type(rule).__name__.lower()}: {rule.reason}"


def _apply(found: Tree, key: str, value: Any, left_out: bool) -> None:
    """Write one key into ``found``. Raises NeoxError where it is refused."""
    rule = rule_of(key)
    if isinstance(rule, To):
        _put(found, rule.path, rule.convert(value))
    elif isinstance(rule, Refused):
        raise NeoxError(f"{key}={value!r}: {rule.reason}")
    elif isinstance(rule, Only) and value not in rule.values:
        known = " or ".join(map(repr, rule.values))
        said = f"{key} is left out, which means {value!r}" if left_out else f"{key}={value!r} is refused"
        raise rule.error(f"{said}: {rule.reason}; {key}={known} is taken")


def _asks_for_a_pattern(values: Tree) -> bool:
    """Whether a key of SepLLM's that belongs to the attention is there."""
    return any(isinstance(rule, Part) and rule.of == "attention" and key in values for key, rule in SEPLLM.items())


def _filled(values: Tree) -> Filled:
    """The keys with the defaults of what is left out: GPT-NeoX's of a model, SepLLM's of a pattern."""
    rules: dict[str, Rule] = {}
    if describes_a_model(values):
        rules |= GPT_NEOX
    if _asks_for_a_pattern(values):
        rules |= SEPLLM
    given = {rule.path for key in values if isinstance(rule := rule_of(key), To)}
    left_out: Tree = {}
    filled = dict(values)
    for key, rule in rules.items():
        has_default = rule.default is not None and rule.default is not NEEDED
        if key not in values and has_default and not (isinstance(rule, To) and rule.path in given):
            left_out[key] = filled[key] = rule.default
        if isinstance(rule, Part) and rule.inside and isinstance(filled.get(key), Mapping):
            filled[key] = _fill_inside(filled[key], rule.inside, key, left_out)
    return Filled(filled, {key: value for key, value in left_out.items() if value != {}})


def _fill_inside(given: Mapping[str, Any], defaults: Mapping[str, Any], place: str, left_out: Tree) -> Tree:
    """``given`` with the defaults of a mapping's own keys; those that were used are written into ``left_out``."""
    filled = dict(given)
    for key, value in defaults.items():
        if isinstance(value, Mapping):
            below = filled.get(key, {})
            filled[key] = (
                _fill_inside(below, value, f"{place}.{key}", left_out) if isinstance(below, Mapping) else below
            )
        elif key not in filled:
            left_out[f"{place}.{key}"] = filled[key] = value
    return filled


def _spelled(tree: Mapping[str, Any]) -> tuple[Tree, list[str]]:
    """The keys in one spelling, without those that are empty; a message for each that is not known."""
    values: Tree = {}
    mistakes = []
    for key, value in tree.items():
        name = spell(str(key))
        if rule_of(name) is None:
            near = get_close_matches(name, list(TABLE), n=1, cutoff=_ALIKE)
            mistakes.append(f"{key}: no key of GPT-NeoX or SepLLM" + (f"; did you mean {near[0]}?" if near else ""))
        elif name in values and values[name] != value:
            mistakes.append(f"{key} is both {values[name]!r} and {value!r}, in two spellings")
        elif value is not None:
            values[name] = value
    return values, mistakes


def _put(tree: Tree, path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value
