"""The verbs as a user calls them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support import forked
from typer.testing import CliRunner

from megatron_sep.cli import app
from megatron_sep.config import RunConfig, load_config, to_yaml

PROGRAM = [sys.executable, "-m", "megatron_sep"]
INTERRUPTIBLE = ["env", "--default-signal=INT"]
"""Also where the tests run in the background of a shell, whose processes ignore it."""
Call = Callable[..., subprocess.CompletedProcess[str]]


def call(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=120, check=False, **more
    )


def here(*words: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has long loaded torch; not for verbs that join a job or start processes."""
    done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def fork(folder: Path) -> Call:
    """The same in a process of its own, without the seconds of its imports; for whatever starts no others."""
    return lambda *words: forked.run("-m", "megatron_sep", *words, folder=folder)


def refused(*words: object, by: Call = here) -> str:
    """The message of a verb that refuses what was asked for: one line, exit code 2, no traceback."""
    failed = by(*words)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    (message,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    return message


@pytest.fixture
def run_yaml(tiny: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """A file with the tiny run, and beside it a file to put in the way."""
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny()))
    return path


def test_importing_the_package_is_light() -> None:
    """`import megatron_sep` and its configuration load no torch; the package itself takes under 0.3 s."""
    program = (
        "import sys, time; start = time.perf_counter(); import megatron_sep; took = time.perf_counter() - start;"
        "import megatron_sep.config, megatron_sep.cli; print(took, 'torch' in sys.modules)"
    )
    took, torch = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert float(took) < 0.3
    assert torch == "False"


def test_show_prints_config_parameters_and_patterns(run_yaml: Path, tmp_path: Path) -> None:
    """The YAML that `show` prints is the resolved configuration; below it the size and what each layer sees."""
    shown = here("show", run_yaml, "attention.window=5")
    assert shown.returncode == 0, shown.stderr
    assert "parameters" in shown.stdout
    assert "# layer 0: every earlier token" in shown.stdout
    assert "# layer 1: the last 5 tokens, the first 2, every separator (ids " in shown.stdout
    again = tmp_path / "again.yaml"
    again.write_text(shown.stdout)
    assert load_config(again) == load_config(run_yaml, ["attention.window=5"])


def test_show_says_what_training_still_needs(tmp_path: Path) -> None:
    """A model of GPT-NeoX alone: its parameters and patterns, what its keys became, and the keys that are missing."""
    path = tmp_path / "model.yml"
    path.write_text(
        "{num-layers: 2, hidden-size: 64, num-attention-heads: 4, seq-length: 32, pos-emb: rotary, "
        "separator_token_ids: [15], prefill_local_window_size: 8}"
    )
    shown = here("show", path)
    assert shown.returncode == 0, shown.stderr
    assert (
        "# 100,096 parameters without the embeddings; ids of separators and the vocabulary are not kn" in shown.stdout
    )
    assert "# layers 0-1: the last 8 tokens, the first 3, every separator (ids 15)" in shown.stdout
    needed = shown.stdout.partition("# training still needs ")[2].splitlines()[0]
    assert "train.steps (GPT-NeoX's train_iters)" in needed
    assert "data.path (GPT-NeoX's data_path), tokenizer.path (GPT-NeoX's vocab_file)" in needed
    assert "# rotary_pct: left out, which means 1.0; becomes model.rotary_fraction" in shown.stdout
    assert "none" not in yaml.safe_load(shown.stdout)["tokenizer"].values()
    assert "train.steps: is needed" in here("train", path, "data.path=x", "tokenizer.path=x").stderr


def test_train_generate_and_plot(run_yaml: Path, tmp_path: Path) -> None:
    """A run from the command line leaves a checkpoint that generates the same text twice, and a picture."""
    run = tmp_path / "run"
    trained = fork(tmp_path)("train", run_yaml)
    assert trained.returncode == 0, trained.stderr
    assert "step 8/8  validation loss" in trained.stdout
    assert trained.stdout.count("of the separating characters stand in a token that is none") == 1
    texts = [by("generate", run, "--prompt", "alpha is", "--max-tokens", "6") for by in (fork(tmp_path), here)]
    assert texts[0].returncode == 0, texts[0].stderr
    assert texts[0].stdout.startswith("alpha is")
    assert len(texts[0].stdout) > len("alpha is\n")
    assert texts[0].stdout == texts[1].stdout
    for verb, words in (("plot", [run]), ("mask", [run_yaml])):
        picture = tmp_path / "pictures" / f"{verb}.png"
        drawn = here(verb, *words, "--out", picture)
        assert (drawn.returncode, drawn.stdout) == (0, f"wrote {picture}\n"), drawn.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_mistake_in_a_configuration_is_a_message() -> None:
    """All mistakes with the way out, without loading torch."""
    failed = call("train", "/dev/stdin", input="dir: x\ntokenizer: {path: t}\ndata: {path: d}\nmodel: {num_layer: 2}\n")
    assert failed.returncode == 2
    assert "did you mean model.num_layers?" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"train.seed={2**70}", f"train.seed={2**70}: Input should be less than {2**63}"),
        (f"data.seed={2**32}", f"data.seed={2**32}: Input should be less than {2**32}"),
        ("optimizer.betas=[1,1]", "optimizer.betas.0=1: Input should be less than 1"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: Input should be a finite number"),
        ("parallel.timeout_minutes=1e30", "parallel.timeout_minutes=1e+30"),
    ],
)
def test_numbers_that_nothing_can_be_done_with_are_refused(run_yaml: Path, setting: str, message: str) -> None:
    """Before torch or numpy would overflow or divide by 0."""
    failed = here("train", run_yaml, setting)
    assert failed.returncode == 2
    assert f"  {message}" in failed.stderr


def test_train_refuses_what_would_fail_later(run_yaml: Path, tmp_path: Path) -> None:
    """A backend without a backward pass, and a dir that no checkpoint can be written to, before any step."""
    message = refused("train", run_yaml, "attention.backend=flex", by=fork(tmp_path))
    assert "flex" in message
    assert "backward" in message
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]
    assert f"{tmp_path}/file" in refused("train", run_yaml, f"dir={tmp_path}/file/run", by=fork(tmp_path))


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "/proc/none/out"])
def test_prepare_says_where_it_cannot_write(corpus: Path, tmp_path: Path, place: str) -> None:
    """Below a file, and where nothing can be written."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "text.txt").write_text("A text.")
    output = tmp_path / place  # an absolute path stays one
    config = tmp_path / "prepare.yaml"
    config.write_text(
        f"output: {output}\ntokenizer: {{path: {corpus}/tokenizer.json}}\nsources: [{{paths: [{tmp_path}/text.txt]}}]\n"
    )
    message = refused("prepare", config, by=call)
    assert str(output.parent) in message or str(tmp_path / "file") in message
    assert "path" in message.partition(";")[2]


def test_plot_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    """A run that is not there or has no loss yet, a picture of no known kind, and a place that cannot be written."""
    assert f"{tmp_path}/none/metrics.jsonl: no such file; name the dir of a run" in refused("plot", tmp_path / "none")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "x": 2}) + "\n")
    assert "holds no loss" in refused("plot", tmp_path, "--out", tmp_path / "a.png")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 2}) + "\n")
    assert "ends in .png, .jpg, .svg, .pdf" in refused("plot", tmp_path, "--out", tmp_path / "a.xyz")
    below = tmp_path / "metrics.jsonl" / "a.png"
    assert f"{below.parent}: File exists; choose another path" in refused("plot", tmp_path, "--out", below)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_mask_refuses_what_it_cannot_draw(run_yaml: Path, tmp_path: Path) -> None:
    """A text of nothing or too much, a directory in place of a picture, and a place that cannot be written."""
    before = sorted(tmp_path.iterdir())
    assert "--text: has 0 tokens" in refused("mask", run_yaml, "--text", "")
    assert "the picture is of 1 to 300" in refused("mask", run_yaml, "--text", "alpha " * 400)
    assert f"--out {tmp_path}: a picture is a file that ends in" in refused("mask", run_yaml, "--out", tmp_path)
    assert f"{tmp_path}/file: File exists" in refused("mask", run_yaml, "--out", tmp_path / "file" / "a.png")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--streaming", "4,64,256,300"], "must be less than capacity = 300"),
        ([], "no prompt: pass --prompt TEXT or --prompts FILE"),
        (["--prompts", "none.txt"], "--prompts none.txt: cannot be read"),
        (["--prompts", "."], "--prompts .: cannot be read: [Errno 21] Is a directory: '.'; pass a text file"),
        (["--prompts", sys.executable], "can't decode byte"),
        (["--prompt", "a", "--attention", "none.yaml"], "none.yaml: cannot be read"),
        (["--prompt", "a", "--attention", "."], ".: cannot be read: [Errno 21] Is a directory"),
        (["--prompt", "a", "--attention", sys.executable], "can't decode byte"),
        (["--prompt", "a", "--temperature", "nan"], "temperature=nan: must be a finite number of at least 0"),
        (["--prompt", "a", "--seed", str(2**70)], f"seed={2**70}: must be from 0 to 2^63 - 1"),
        (["--prompt", "a", "--out", "out.jsonl"], "--out out.jsonl: takes the prompts of a file; pass --prompts FILE"),
        (["--prompts", "none.txt", "--out", "out.jsonl"], "--prompts none.txt: cannot be read"),
        (["--prompt", "a", "--prefill", "dense"], "--prefill dense: is of a cache of bounded size"),
        (["--prompt", "a", "--positions", "cache"], "--positions cache: is of a cache of bounded size"),
    ],
)
def test_generate_refuses_options_before_it_reads_a_model(words: list[str], message: str) -> None:
    """There is none to read, and the message is of the option all the same."""
    assert message in refused("generate", "no-such-model", *words)


def test_an_interrupt_is_one_line(run_yaml: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of training: exit code 130."""
    words = ["-m", "megatron_sep", "train", run_yaml, "train.steps=1000000", "train.eval_every=0"]
    said = tmp_path / "said"
    running = forked.start(*words, out=tmp_path / "out", err=said)
    while "step 1/1000000" not in (tmp_path / "out").read_text():
        assert running.poll() is None, said.read_text()
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    code, errors = running.wait(timeout=60), said.read_text()
    assert code == 130, errors
    assert re.match(r"interrupted after step \d+ of 1000000; the same command goes on from ", errors.splitlines()[-1])
    assert "Traceback" not in errors


def test_an_interrupted_preparation_is_one_line_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to the worker processes too, just as they start: they say nothing, and the work is not lost."""
    for number in range(8):  # enough that the work is not over before the interrupt comes
        (tmp_path / f"text-{number}.txt").write_text("A text. " * 200_000)
    config = tmp_path / "prepare.yaml"
    config.write_text(
        f"output: {tmp_path}/out\ntokenizer: {{path: {corpus}/tokenizer.json}}\nworkers: 2\n"
        f"sources: [{{paths: ['{tmp_path}/text-*.txt']}}]\n"
    )
    words = [*INTERRUPTIBLE, *PROGRAM, "prepare", str(config)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        while not any((tmp_path / "out.work").glob("part-*/encode.bin")):
            assert running.poll() is None
        os.killpg(running.pid, signal.SIGINT)
        errors = running.communicate(timeout=60)[1]
    assert (running.returncode, errors) == (130, "interrupted\n")
    assert call("prepare", config).returncode == 0


def test_a_reader_that_goes_away_is_no_error(run_yaml: Path) -> None:
    """`show ... | head` says nothing."""
    reading, writing = os.pipe()
    os.close(reading)
    shown = subprocess.run([*PROGRAM, "show", str(run_yaml)], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert shown.stderr == b""


def test_a_quickstart_is_of_one_process_and_its_own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else is a training like another."""
    assert "use `train quickstart`" in refused("quickstart", "data.path=null", "data.blend=[{path: a}, {path: b}]")
    monkeypatch.setenv("RANK", "0")
    assert "use `train quickstart`" in refused("quickstart")


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every verb by its words, those of groups too."""
    for word, command in group.commands.items():
        words = f"{name} {word}".strip()
        yield from commands(command, words) if hasattr(command, "commands") else [(words, command)]


VERBS = dict(commands(typer.main.get_command(app)))


def test_without_a_verb_the_verbs_are_shown() -> None:
    """With what the program is for, the way to set a key, and the exit codes."""
    shown = call().stdout
    assert all(verb.split()[0] in shown for verb in VERBS)
    assert "train.steps=400" in shown
    assert "Exit codes: 0 done" in shown
    assert "import" not in shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    """--help works for each verb and says what it does, and each argument and option has a text of its own."""
    shown = here(*verb.split(), "--help")
    assert shown.returncode == 0
    assert "Usage" in shown.stdout
    assert VERBS[verb].help
    assert [parameter.name for parameter in VERBS[verb].params if not getattr(parameter, "help", None)] == []
