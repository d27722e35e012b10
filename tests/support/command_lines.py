"""A command line of a page, held to what would read it: parser and schema of the program, torchrun, pytest, scripts."""

import io
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.pages import ROOT
from torch.distributed.run import get_args_parser
from typer.main import get_command

from megatron_sep.cli import app
from megatron_sep.config import sketch_config
from megatron_sep.config.gpus import GPUS
from megatron_sep.config.grid import grid_jobs
from megatron_sep.config.load import load
from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.config.shipped import located
from megatron_sep.errors import UserError

VERBS = get_command(app).commands  # type: ignore[attr-defined]
OF_A_RUN = {"train", "show", "plan", "batch", "mask", "doctor", "quickstart"}
OF_TEXT = {"prepare", "merge"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TAKEN_FIRST = {
    "quickstart.sh": (),
    "quickstart_gpu.sh": ("TOKENIZER", "TEXT"),
    "reproduce_runs.sh": ("TOKENIZER", "TEXT"),
    "slurm_posttrain.sbatch": ("WEIGHTS", "config"),
    "slurm_pretrain.sbatch": ("config",),
    "train_deepspeed.sh": ("config",),
    "train_torchrun.sh": ("config",),
}
"""What stands before the settings of a run, by script."""
ANY_TEXT = ("output=out", "tokenizer={path: tokenizer.json}", "sources=[{paths: [text]}]")
"""Of a preparation whose YAML is only named."""
OTHERS = {
    "apptainer", "cd", "chmod", "conda", "git", "jupyter", "mkdir", "mkdocs", "pre-commit", "printf", "source", "srun",
    "ssh", "touch", "wheelhouse/install.sh",
}  # fmt: skip
"""Programs that are not looked into."""


class NoCommandError(Exception):
    """A word that what reads it does not know."""


def ensure(holds: object, message: str) -> None:
    if not holds:
        raise NoCommandError(message)


def parts(line: str) -> Iterator[list[str]]:
    """The words of each command of a line; what is in brackets may be left out, and is."""
    line = re.sub(r"\s\[[^\]]*\]|\s\.\.\.(?=\s|$)", "", line)
    line = re.sub(r"(?<=\w)\|(?=\w)", "/", line)  # one word or the other
    line = re.sub(r"\{(\w+)(,\w+)+\}", r"\1", line)  # the first of several
    tokens = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    tokens.whitespace_split, tokens.commenters = True, ""
    words: list[str] = []
    for token in [*tokens, ";"]:
        if token in ("&&", ";", "|"):
            while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] == "time"):
                words = words[1:]
            if words:
                yield words
            words = []
        else:
            words.append(token)


def check(words: list[str], own: set[str], config: pytest.Config) -> None:
    """Raises NoCommandError; ``own`` are files that the page writes, ``config`` knows the options of pytest."""
    if ">" in words:
        words = words[: words.index(">")]
    name = words[0]
    if name == "torchrun":
        check_torchrun(words)
    elif name in ("megatron_sep", "srun") or words[1:3] == ["-m", "megatron_sep"]:
        check_verb(words[words.index("megatron_sep") + 1 :])
    elif name in ("pip", "uv") or words[1:3] == ["-m", "pip"]:
        check_extras(words)
    elif name == "pytest":
        check_pytest(words[1:], config)
    elif name == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        ensure(set(words[1:]) <= set(targets), f"{words[1:]}: no such target")
    elif name == "docker":
        check_docker(words)
    elif name == "sbatch" or re.match(r"(\./)?(scripts|tools)/", name):
        check_script([word for word in words if not (name == "sbatch" and word.startswith("--"))], own, config)
    elif name not in ("python", "python3") or not list(of_tools(words)):
        ensure(name in OTHERS or words[:3] == ["python3", "-m", "venv"], f"{name}: what is it?")


def of_tools(words: Sequence[str]) -> Iterator[list[str]]:
    """The words of a tool that has a parser of its own, which ``support.tool_options`` reads: path or module first."""
    for place, word in enumerate(words[:4]):
        if re.fullmatch(r"(\./)?tools/\w+\.py", word):
            yield [word.removeprefix("./"), *words[place + 1 :]]
    if words[0].endswith("scripts/faults.sh"):
        yield ["faults", *words[1:]]


def check_verb(words: list[str]) -> None:
    """Parsed as the program does, then its settings."""
    verb = words.pop(0) if words else ""
    command = VERBS.get(verb)
    if verb.isupper():
        return  # any of them
    ensure(command, f"{verb}: no such verb")
    if hasattr(command, "commands"):
        sub = words.pop(0) if words else ""
        ensure(sub in command.commands, f"{verb} {sub}: no such verb")
        command = command.commands[sub]
    if not words:
        return  # it is only named
    try:
        given = command.make_context(verb, list(words)).params
    except Exception as error:  # of click, or of the copy of it that typer has
        raise NoCommandError(f"{verb}: {getattr(error, 'message', error)}") from error
    ensure(given.get("gpu", "h100") in GPUS, f"--gpu {given.get('gpu')}: no such GPU")
    if verb in OF_A_RUN:
        check_run(given, ["dir=runs/planned"] if verb == "plan" else [])
    elif verb in OF_TEXT:
        check_text([str(given["config"]), *(given["overrides"] or ())])


def check_run(given: dict[str, Any], implied: Sequence[str] = ()) -> None:
    """Files are there, settings are known and their values can be, each combination of a grid too."""
    words = [word for word in given.get("overrides") or () if re.match(r"(?!section\.)[a-z]", word)]
    config = given.get("config")
    if given.get("from_neox"):
        words, config = [*([] if config is None else [str(config)]), *words], None
    path = found(str(config or "quickstart"))
    axes = [axis for axis in given.get("grid") or () if re.match("[a-z]", axis)]
    try:
        if axes:
            shared = [word for word in words if "," not in word]
            grid_jobs(path, axes, [*words, *(f"{place}=none" for place in sketch_config(path, shared).missing)])
        else:
            sketch_config(path, [*words, *implied])
    except UserError as error:
        raise NoCommandError(str(error)) from error


def found(config: str) -> Path:
    """The configuration, or a shipped one in the place of any, of a run that a page trains, and of GPT-NeoX's files."""
    path = located(Path(config))
    elsewhere = re.match(r"[A-Z]|runs/|\.\.\.", config) or config.endswith(".yml")
    ensure(path.is_file() or elsewhere, f"{config}: no such configuration")
    return path if path.is_file() else Path("quickstart")


def check_text(words: Sequence[str]) -> None:
    """Settings of a preparation."""
    file, *settings = words
    try:
        if Path(file).is_file():
            load(PrepareConfig, Path(file), settings)
        else:
            empty = Path("empty.yaml")
            empty.write_text("{}")
            load(PrepareConfig, empty, [*ANY_TEXT, *settings])
    except UserError as error:
        raise NoCommandError(str(error)) from error


def check_torchrun(words: list[str]) -> None:
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            read = get_args_parser().parse_args(words[1:])
    except SystemExit as error:
        raise NoCommandError(said.getvalue()) from error
    if read.module:
        ensure(read.training_script == "megatron_sep", f"{read.training_script}: what is it?")
        check_verb(read.training_script_args)
    else:
        ensure((ROOT / read.training_script).is_file(), f"{read.training_script}: no such file")


def check_script(words: list[str], own: set[str], config: pytest.Config) -> None:
    """Of the repository, or one that a page makes; its settings are those of what it starts."""
    path, *rest = words[1:] if words[0] == "sbatch" else words
    name = Path(path).name
    if path == "grid.sbatch" or path in own:
        return
    ensure((ROOT / path).is_file(), f"{path}: no such file")
    if name == "test.sh":
        check_pytest(rest, config)
    elif name == "slurm_prepare.sbatch" and rest:
        check_text(rest)
    elif name in TAKEN_FIRST and rest:
        first = TAKEN_FIRST[name]
        ensure(len(rest) >= len(first), f"{path}: takes {' '.join(first)}")
        configs = [word for kind, word in zip(first, rest, strict=False) if kind == "config"]
        check_run({"config": (configs or [None])[0], "overrides": rest[len(first) :]})


def check_pytest(words: list[str], config: pytest.Config) -> None:
    for word in words:
        if word.startswith("--"):
            try:
                config.getoption(word.partition("=")[0])
            except ValueError as error:
                raise NoCommandError(f"{word}: no such option of pytest") from error
        elif word.startswith("tests"):
            ensure((ROOT / word).exists(), f"{word}: no such test")


def check_extras(words: list[str]) -> None:
    named = [extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")]
    ensure(set(named) <= set(EXTRAS), f"{named}: no such extra")


def check_docker(words: list[str]) -> None:
    """What is built in is an argument of the recipe, what is run a verb of the program, which the image begins with."""
    if words[1] == "run":
        check_verb(words[words.index("megatron_sep") + 1 :])
    known = re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for before, word in pairwise(words):
        if before == "--build-arg":
            ensure(word.partition("=")[0] in known, f"--build-arg {word}: no such argument")
