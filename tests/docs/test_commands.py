"""Every command on a page is one that there is: verbs, options, settings, shipped names, tools, scripts, extras."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from support.pages import PAGES, ROOT, blocks, commands
from typer.main import get_command

from megatron_sep.cli import app
from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.config.schema import RunConfig
from megatron_sep.config.shipped import located

VERBS = get_command(app).commands  # type: ignore[attr-defined]
OF_A_RUN = {"train", "show", "plan", "batch", "mask", "doctor", "quickstart"}
OTHERS = {
    "source",
    "python3",
    "sbatch",
    "make",
    "git",
    "ssh",
    "docker",
    "jupyter",
    "pre-commit",
    "mkdocs",
    "touch",
    "pytest",
    "srun",
}
"""Programs that are not looked into."""
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
INLINE = re.compile(r"`((?:python -m )?megatron_sep [a-z]+[^`]*)`")


def parts(line: str) -> Iterator[list[str]]:
    """The words of each command of a line; what is in brackets may be left out, and is."""
    line = re.sub(r"\s\[[^\]]*\]|\s>\s*\S+", "", line)
    for part in re.split(r"&&|;|\|", line):
        words = shlex.split(part)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def settings_of(section: type[BaseModel]) -> Iterator[str]:
    """Keys of a section and of those in it, the names of the sections before them."""
    for name, field in section.model_fields.items():
        yield name
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from (f"{name}.{key}" for key in settings_of(inner))


KEYS = {"prepare": set(settings_of(PrepareConfig)), "merge": set(settings_of(PrepareConfig))}
KEYS |= {verb: set(settings_of(RunConfig)) for verb in OF_A_RUN}


def check_verb(words: list[str], own: set[str]) -> None:
    """``own`` are files that the page writes."""
    command = VERBS.get(words[0])
    assert command is not None, f"{words[0]}: no such verb"
    if hasattr(command, "commands"):
        command, words = command.commands[words[1]], words[1:]
    options = {name for option in command.params for name in option.opts} | {"--help"}
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in options, f"{words[0]} {word}: no such option"
        elif words[0] in KEYS and re.match(r"[a-z_.]+=", word):
            assert word.partition("=")[0] in KEYS[words[0]], f"{word}: no such setting"
    first = words[1] if len(words) > 1 else ""
    if words[0] in OF_A_RUN - {"quickstart"} and re.fullmatch(r"(?!runs/)[a-z][\w/-]*(\.yaml)?", first):
        given = first in own or located(Path(first)).is_file() or (ROOT / first).is_file()
        assert given, f"{first}: no such configuration"


def check_tool(words: list[str]) -> None:
    """Its file is there, and each option stands in it."""
    path = ROOT / words[0]
    assert path.is_file(), f"{words[0]}: no such file"
    for word in words[1:]:
        if word.startswith("--") and path.suffix == ".py":
            assert f'"{word.partition("=")[0]}"' in path.read_text(), f"{words[0]} {word}: no such option"


def check(words: list[str], own: set[str]) -> None:
    if "megatron_sep" in words[:6]:
        check_verb(words[words.index("megatron_sep") + 1 :], own)
    elif words[0] in ("pip", "python3") or words[:3] == ["python", "-m", "pip"]:
        named = [extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")]
        assert set(named) <= set(EXTRAS), f"{named}: no such extra"
    elif words[0] in ("python", "torchrun"):
        check_tool(words[next(i for i, word in enumerate(words) if word.endswith(".py")) :])
    elif re.match(r"(\./)?(scripts|tools)/", words[0]):
        check_tool(words)
    else:
        assert words[0] in OTHERS, f"{words[0]}: what is it?"


def shown(page: Path) -> Iterator[str]:
    """Lines of blocks that are commands, and inline code that calls the program."""
    for line in commands(page):
        if re.match(
            r"[A-Z_]+=\S+ |(\./)?(scripts|tools)/\w|(python|python3|pip|torchrun|megatron_sep|sbatch|make) ", line
        ):
            yield line
    yield from (line for line in INLINE.findall(page.read_text()) if "..." not in line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_its_commands_are_there(page: Path) -> None:
    """Each of them, whether it is run by a test or only read."""
    own = {name for block in blocks(page) for name in re.findall(r"\A# (\S+\.yaml)\n", block.text)}
    for line in shown(page):
        for words in parts(line.replace(" ...", "")):
            try:
                check(words, own)
            except AssertionError as error:
                raise AssertionError(f"{line}\n{error}") from None


@pytest.mark.parametrize(
    "line",
    [
        "megatron_sep trian quickstart",
        "python -m megatron_sep train quickstart --quite",
        "megatron_sep train quickstart attention.windo=4",
        "megatron_sep show pythia-160n",
        "python tools/bench_attention.py --jsn x",
        "scripts/no.sh",
        "pip install -e '.[plto]'",
        "megatron_sep pile joyn a b",
    ],
)
def test_what_is_wrong_is_found(line: str) -> None:
    """A slip in each kind of word."""
    with pytest.raises((AssertionError, KeyError)):
        [check(words, set()) for words in parts(line)]


def test_the_install_page_names_every_extra() -> None:
    """In the first column of its table."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert {extra for row in rows for extra in re.findall(r"`(\w+)`", row)} == set(EXTRAS)
