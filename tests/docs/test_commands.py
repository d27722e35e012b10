"""Every command on a page is one that there is, by what would read it: verbs, options, settings, tools, scripts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_lines import EXTRAS, NoCommandError, check, check_run, check_text, of_tools, parts
from support.forked import run
from support.pages import PAGES, ROOT, blocks, commands, own_files, write_own_files

INLINE = re.compile(
    r"`((?:[A-Z_]+=\S+ )*(?:(?:python -m )?megatron_sep [a-z]|python (?:-m )?[\w./]+ |(?:\./)?(?:tools|scripts)/[\w.]+ "
    r"|sbatch |pytest |docker )[^`]*)`"
)

IN_A_RUN = ("dir=runs/a", "model.num_layers=4", "model.sequence_length=256")
"""What stands elsewhere in the configuration of which a page shows a part."""


def shown(page: Path) -> Iterator[str]:
    """Lines of blocks, and inline code that calls something."""
    yield from commands(page)
    yield from (re.sub(r"\s+", " ", line) for line in INLINE.findall(page.read_text()))


def words_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each line with the words of each command in it; what may be left out or follows in three dots is."""
    for line in shown(page):
        for words in parts(line):
            yield line, words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the repository's own folders in it."""
    for name in ("configs", "scripts", "tools", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_its_commands_are_there(page: Path, folder: Path, pytestconfig: pytest.Config) -> None:
    """Each of them, whether it is run by a test or only read, with its options and the values of its settings."""
    write_own_files(page, folder)
    for line, words in words_of(page):
        try:
            check(words, set(own_files(page)), pytestconfig)
        except NoCommandError as error:
            raise AssertionError(f"{line}\n{error}") from None


SLIPS = [
    ("tools/bench_attention.py", "--jsn", "x"),
    ("tools/bench_data.py", "tokenize", "a", "b"),
    ("tools/layouts.py", "--gpus", "eight"),
    ("faults", "--oly", "F1"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_its_settings_are_there(page: Path, folder: Path) -> None:
    """Every block of YAML is a configuration, or one a line."""
    for block in blocks(page):
        if block.language == "yaml" and not re.search("^task:", block.text, re.MULTILINE):
            for number, text in enumerate(configurations(block.text)):
                file = folder / f"{number}.yaml"
                file.write_text(text)
                check_text([str(file)]) if "sources:" in text else check_run({"config": file}, IN_A_RUN)


def configurations(text: str) -> list[str]:
    """A block whose lines all begin with one key says what else might stand there."""
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    return text.splitlines() if len(keys) > 1 and len(set(keys)) == 1 else [text]


def test_the_words_of_tools_are_understood(tmp_path: Path) -> None:
    """By the parser of each, all in one process; a slip is not."""
    found = {tuple(tool): line for page in PAGES for line, words in words_of(page) for tool in of_tools(words)}
    assert len(found) > 20
    wrong = mistakes([*found, *SLIPS], tmp_path)
    assert {line: why for line, why in zip(found.values(), wrong, strict=False) if why} == {}
    assert all(wrong[len(found) :])


def mistakes(tools: list[tuple[str, ...]], folder: Path) -> list[str | None]:
    done = run("-m", "support.tool_options", json.dumps(tools), folder=folder)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.parametrize(
    "line",
    [
        "megatron_sep trian quickstart",
        "python -m megatron_sep train quickstart --quite",
        "megatron_sep batch quickstart --step three",
        "megatron_sep train quickstart attention.windo=4",
        "megatron_sep train quickstart attention.window=wide",
        "megatron_sep train quickstart --grid attention.windo=4,8",
        "megatron_sep train quickstart --grid attention.window=4,wide",
        "megatron_sep show pythia-160n",
        "megatron_sep prepare prepare.yaml shufle=true",
        "megatron_sep pile joyn a b",
        "megatron_sep plan quickstart --gpu h1000",
        "torchrun --nproc-per-gpu 8 -m megatron_sep train quickstart",
        "torchrun --nproc-per-node 8 -m megatron_sep trian quickstart",
        "scripts/no.sh",
        "scripts/train_torchrun.sh pythia-160n",
        "sbatch scripts/slurm_pretrain.sbatch quickstart attention.windo=4",
        "pip install -e '.[plto]'",
        "make gpus",
        "pytest --ful tests/docs",
        "pytest tests/dcos",
        "docker build --build-arg APEKS=1 -t megatron_sep .",
        "sudo reboot",
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_is_wrong_is_found(line: str, pytestconfig: pytest.Config) -> None:
    """A slip in each kind of word."""
    with pytest.raises(NoCommandError):
        [check(words, set(), pytestconfig) for words in parts(line)]


def test_the_install_page_names_every_extra() -> None:
    """In the first column of its table."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert {extra for row in rows for extra in re.findall(r"`(\w+)`", row)} == set(EXTRAS)
