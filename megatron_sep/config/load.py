"""YAML with `extends` and key=value overrides into a configuration, or one error that names every mistake.

Files of GPT-NeoX, Pythia and the official SepLLM are read as well; see ``config.neox``.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_sep.config.bounded_yaml import MOST_BYTES, BoundsError, check_size, read_yaml
from megatron_sep.config.neox import is_neox, needed_keys, notes, spell, translate
from megatron_sep.config.neox_rules import NeoxError
from megatron_sep.config.neox_write import as_neox
from megatron_sep.config.schema import RunConfig
from megatron_sep.config.shipped import located, shipped_config, shipped_names
from megatron_sep.errors import UserError

Tree = dict[str, Any]
Edit = Callable[[Tree], Tree]
Config = TypeVar("Config", bound=BaseModel)


class ConfigError(UserError):
    """Every mistake of a configuration, one a line."""


_MOST_FILES = 100
_PLACEHOLDERS = {"data.path": "none", "tokenizer.path": "none", "model.num_attention_heads": 1}
"""What is valid with anything else; the schema's own defaults hold the places of all others."""


@dataclass(frozen=True)
class Sketch:
    """A configuration that training may need more than; what it needs has a placeholder or a default in it."""

    config: RunConfig
    missing: Mapping[str, str]
    """By path, the key of GPT-NeoX that says it as well; empty where none of its files is there."""


def load_config(path: Path, overrides: Sequence[str] = (), edit: Edit = lambda tree: tree) -> RunConfig:
    """The configuration of a run. Among the overrides may be more files: each goes on top of those before it.

    GPT-NeoX's files are merged with each other first, as GPT-NeoX does, and lie below files of this project; ``edit``
    changes the keys of each of them.
    """
    tree, needed, mistakes = _put_together(path, overrides, pattern_too=False, edit=edit)
    mistakes += [
        f"{place}: is needed, and {key} is left out; GPT-NeoX has no default for it"
        for place, key in needed.items()
        if not _has(tree, place)
    ]
    return _validated(RunConfig, tree, path, mistakes)


def sketch_config(path: Path, overrides: Sequence[str] = ()) -> Sketch:
    """The configuration of a run as far as it is there: data, tokenizer and what GPT-NeoX needs may be missing."""
    tree, needed, mistakes = _put_together(path, overrides, pattern_too=True)
    missing = {place: key for place, key in needed.items() if not _has(tree, place)}
    if not any(_has(tree, f"data.{name}") for name in ("path", "blend", "instructions")):
        missing["data.path"] = "data_path" if needed else ""
    if not _has(tree, "tokenizer.path"):
        missing["tokenizer.path"] = "vocab_file" if needed else ""
    mistakes += _apply_overrides(
        tree, [f"{place}={value}" for place, value in _PLACEHOLDERS.items() if place in missing]
    )
    return Sketch(_validated(RunConfig, tree, path, mistakes), missing)


def load(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, what it extends, and ``section.key=value`` overrides into a ``kind``.

    Relative paths inside ``extends`` start at the file that names them; all others at the working directory.
    Raises ConfigError, naming every mistake at once.
    """
    tree = read_tree(path)
    return _validated(kind, tree, path, list(_apply_overrides(tree, overrides)))


def neox_notes(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """What became of each key of GPT-NeoX's files and of those they leave out; empty where there are no such files."""
    neox, _ = _read_all(_files(path, overrides)[0])
    return list(notes(_joined(neox)))


def _put_together(
    path: Path, overrides: Sequence[str], pattern_too: bool, edit: Edit = lambda tree: tree
) -> tuple[Tree, Mapping[str, str], list[str]]:
    """All files and settings as one tree, what training needs of GPT-NeoX's, and the settings that cannot be."""
    paths, settings = _files(path, overrides)
    found, ours = _read_all(paths)
    neox = {name: edit(tree) for name, tree in found.items()}
    tree = _translated(neox) if neox else {}
    for more in ours:
        tree = merge(tree, more)
    needed = needed_keys(_joined(neox), not ours, pattern_too) if neox else {}
    return tree, needed, list(_apply_overrides(tree, settings))


def _joined(files: Mapping[Path, Tree]) -> Tree:
    return {key: value for tree in files.values() for key, value in tree.items()}


def _has(tree: Mapping[str, Any], path: str) -> bool:
    """Whether something stands at a path."""
    *sections, leaf = path.split(".")
    for section in sections:
        below = tree.get(section)
        tree = below if isinstance(below, dict) else {}
    return tree.get(leaf) not in (None, [], "")


def _files(path: Path, words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Further files, which have no `=` in their name, by path or by the name of a shipped one; and settings."""
    names = [w for w in words if "=" not in w and (w.endswith((".yml", ".yaml")) or shipped_config(w))]
    return [path, *map(Path, names)], [word for word in words if word not in names]


def _read_all(paths: Iterable[Path]) -> tuple[dict[Path, Tree], list[Tree]]:
    """GPT-NeoX's files by name, and the others."""
    neox: dict[Path, Tree] = {}
    ours = []
    for path in paths:
        tree = read_tree(path)
        if is_neox(tree, {"extends", *RunConfig.model_fields}):
            neox[path] = tree
        else:
            ours.append(tree)
    return neox, ours


def _translated(files: Mapping[Path, Tree]) -> Tree:
    seen: dict[str, tuple[Path, Any]] = {}
    for path, tree in files.items():
        for key, value in tree.items():
            first, before = seen.setdefault(spell(str(key)), (path, value))
            if first != path and before != value:
                raise ConfigError(f"{key} is {before!r} in {first} and {value!r} in {path}")
    try:
        return translate(_joined(files), next(iter(files)).stem)
    except NeoxError as error:
        lines = str(error).splitlines()
        named = ", ".join(map(str, files))
        placed = [f"  {line}{_place(line, seen) if len(files) > 1 else ''}" for line in lines]
        raise ConfigError("\n".join([f"{named}: {len(lines)} mistake(s)", *placed])) from None


def _place(line: str, seen: Mapping[str, tuple[Path, Any]]) -> str:
    """The file that the key is from with which a message begins."""
    found = seen.get(spell(re.split(r"[^\w-]", line, maxsplit=1)[0]))
    return f" (in {found[0]})" if found else ""


def _validated(kind: type[Config], tree: Tree, path: Path, mistakes: list[str]) -> Config:
    """The tree as a ``kind``. Raises ConfigError for ``mistakes`` that were found before and all others at once."""
    try:
        text = json.dumps(tree, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # a key that is a date, an alias inside itself
        raise ConfigError(f"{path}: is no configuration: {error}") from error
    try:
        config = kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        mistakes = mistakes + [_describe(kind, dict(e)) for e in error.errors()]
        config = None
    if mistakes or config is None:
        raise ConfigError("\n".join([f"{path}: {len(mistakes)} mistake(s)", *(f"  {m}" for m in mistakes)]))
    return config


def to_yaml(config: BaseModel, without: Iterable[str] = ()) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back; paths in ``without`` are left out."""
    tree = config.model_dump(mode="json")
    for path in without:
        section, _, leaf = path.partition(".")
        del tree[section][leaf]
    return yaml.safe_dump({key: value for key, value in tree.items() if value != {}}, sort_keys=False)


def neox_yaml(sketch: Sketch) -> str:
    """The configuration as a file of GPT-NeoX's and SepLLM's keys. Raises NeoxError for what has none."""
    keys, unsaid = as_neox(sketch.config, sketch.missing)
    notes = [f"# has no key there: {line}\n" for line in unsaid]
    return "".join([*notes, yaml.safe_dump(keys, sort_keys=False)]).rstrip()


def read_tree(path: Path) -> Tree:
    """The YAML of ``path``, or of the shipped configuration of that name, on top of what it extends, unvalidated."""
    found = located(path)
    if not found.exists() and not found.suffix:
        raise ConfigError(
            f"{path}: no such file, and no run of that name is shipped; there are {', '.join(shipped_names())}"
        )
    return _extended(found, (), {})


def _extended(path: Path, chain: tuple[Path, ...], read: dict[Path, Tree]) -> Tree:
    """As ``read_tree``; ``chain``: the files that led here, ``read``: those that are read already."""
    here = path.resolve()
    if here in chain:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(p.name for p in chain)}")
    if here in read:
        return read[here]
    if len(read) + len(chain) >= _MOST_FILES:
        raise ConfigError(f"{path}: a configuration is made of {_MOST_FILES} files at most")
    tree = _parse(path)
    extends = tree.pop("extends", [])
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) and "\0" not in name for name in names):
        raise ConfigError(f"{path}: extends={extends!r}: is a file, or a list of files")
    base: Tree = {}
    for name in names:
        base = merge(base, _extended(path.parent / name, (*chain, here), read))
    read[here] = merge(base, tree)
    return read[here]


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> Tree:
    """``top`` over ``base``, section by section; lists are replaced whole."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _parse(path: Path) -> Tree:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        check_size(len(data))
        tree = read_yaml(data.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; a configuration is a mapping of sections")
    return tree


def _apply_overrides(tree: Tree, overrides: Iterable[str]) -> Iterator[str]:
    """Write overrides into ``tree``; yield a message for each that cannot be."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            yield f"{override!r}: an override is written section.key=value"
            continue
        try:
            value = read_yaml(text)
        except BoundsError as error:
            yield f"{key}: {error}"
            continue
        except yaml.YAMLError:
            value = text
        *sections, leaf = key.split(".")
        place = tree
        for section in sections:
            below = place.get(section)
            place[section] = dict(below) if isinstance(below, dict) else {}
            place = place[section]
        place[leaf] = value


def _describe(kind: type[BaseModel], error: Mapping[str, Any]) -> str:
    """One line for one pydantic error: the key, the value, and the way out."""
    place = [str(part) for part in error["loc"] if not str(part).startswith("<")]  # <...>: one kind of several
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, list(_known_keys(kind)), n=1, cutoff=0.5)
        return f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{key}: is needed"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={error['input']!r}: {message}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            yield f"{prefix}{name}"
        for below in _sections(kind):
            yield from _known_keys(below, f"{prefix}{name}.")


def _sections(kind: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value of this type may be."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from _sections(part)
