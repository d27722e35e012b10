"""The console of a run: plain lines on a pipe, one line that changes on a terminal, nothing where nothing is wanted."""

import os
import re
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

from megatron_sep.config import RunConfig
from megatron_sep.config.schema import MetricsConfig
from megatron_sep.parallel.groups import topology
from megatron_sep.train.console import Console, LiveConsole, make_console
from megatron_sep.train.metrics import make_metrics

VALUES = {"train/loss": 3.25, "speed/tokens_per_second": 118_000.0, "speed/mfu": 0.412, "speed/seconds_left": 7860.0}


class Screen:
    """A terminal, and what came out of it until it was closed."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        termios.tcsetwinsize(slave, (24, 160))
        self.file: IO[str] = os.fdopen(slave, "w", buffering=1)
        self._said = b""
        self._reader = threading.Thread(target=self._listen, daemon=True)  # a terminal that nobody reads gets full
        self._reader.start()

    def _listen(self) -> None:
        with suppress(OSError):  # what a terminal says when its other end is closed and all of it is read
            while said := os.read(self._master, 1 << 16):
                self._said += said

    def read(self) -> str:
        self.file.close()
        self._reader.join(10)
        return self._said.decode()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    opened = Screen()
    yield opened
    opened.file.close()


def stays(output: str) -> list[str]:
    """The lines that are on the screen in the end: what is written over is gone, and so are colours."""
    lines = [line.rpartition("\x1b[2K")[2] for line in output.replace("\r\n", "\n").split("\n")]
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line).strip() for line in lines]
    return [line for line in plain if line]


def test_one_line_changes_and_the_others_stand_above_it(screen: Screen) -> None:
    """Progress, loss, tokens/s, MFU and time left in the last line; a validation and a print above; no cursor lost."""
    before = sys.stdout
    live = LiveConsole(0, 1000, screen.file)
    for step in range(1, 101):
        live.stepped(step)
        if step % 10 == 0:
            live.log(step, VALUES | {"train/loss": 5 - step / 100})
    live.log(100, {"valid/loss": 3.5, "time/validation": 1.0})
    print("rank 3 is slow")
    live.close()
    live.close()  # whoever comes second has nothing to do
    output = screen.read()
    above, said, line = stays(output)
    assert above == "step 100/1000  validation loss 3.500  validated in 1.0s"
    assert said == "rank 3 is slow"
    assert re.fullmatch(r"step 100/1000 \S+ +10% loss 4.000  118k tok/s  41.2% mfu  eta 2h11m", line)
    assert "\x1b[?25l" not in output
    assert sys.stdout is before


def test_a_run_that_goes_back_shows_where_it_is(screen: Screen) -> None:
    """After a rollback the bar is shorter."""
    live = LiveConsole(50, 100, screen.file)
    live.stepped(60)
    live.rewind(40)
    live.close()
    assert stays(screen.read())[-1].startswith("step 40/100")


def test_a_narrow_terminal_cuts_the_line(screen: Screen) -> None:
    """It stays one line."""
    termios.tcsetwinsize(screen.file.fileno(), (24, 60))
    live = LiveConsole(0, 100, screen.file)
    live.log(10, VALUES | {"train/lr": 6e-4, "train/grad_norm": 0.9})
    live.close()
    (line,) = stays(screen.read())
    assert line.endswith("…")


def test_who_writes_to_a_file_or_a_dumb_terminal_gets_plain_lines(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a terminal does where it is asked for."""
    assert type(make_console("auto", 0, 10)) is Console  # what pytest captures is no terminal
    make_console("auto", 0, 10).log(5, VALUES)
    assert capsys.readouterr().out == "step 5/10  loss 3.250  118k tok/s  41.2% mfu  eta 2h11m\n"
    monkeypatch.setattr(sys, "stdout", screen.file)
    assert type(make_console("lines", 0, 10)) is Console
    live = make_console("auto", 0, 10)
    assert type(live) is LiveConsole
    live.close()
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_console("auto", 0, 10)) is Console


def test_quiet_leaves_the_numbers_to_the_other_sinks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """metrics.jsonl has them."""
    metrics = make_metrics(MetricsConfig(console="off"), tmp_path, {}, start=0, steps=10)
    metrics.log(5, VALUES)
    metrics.stepped(5)
    metrics.close()
    assert capsys.readouterr().out == ""
    assert '"train/loss": 3.25' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.usefixtures("single_process")
def test_a_run_begins_with_what_it_is(tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """Model, layout, device, batch, patterns and places; nothing of it where it is to be quiet."""
    from megatron_sep.train.run import build_run

    def said(**metrics: Any) -> str:
        capsys.readouterr()
        build_run(tiny(metrics=metrics), topology()).metrics.close()
        return capsys.readouterr().out

    header = said(tensorboard=True)
    for text in (
        "model: ",
        " parameters in 2 layers of 64, vocabulary 384, fp32\n",
        "layout: 1 process(es) on ",
        "step: 512 tokens, 4 micro-batch(es) of 2 x 64 a process; 8 steps\n",
        "layer 0: every earlier token\n",
        "layer 1: the last 8 tokens, the first 2, every separator (ids ",
        ": checkpoints/ every 4 steps, metrics.jsonl, history.jsonl, config.yaml, tensorboard/\n",
    ):
        assert text in header
    assert "layout: " not in said(console="off")
