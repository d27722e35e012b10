"""Processes of Python that have made their imports: forks of the one that runs the tests, made before its first test.

They do what `python WORDS` does, and stand for it wherever a test is of what a process does, not of how it starts: the
imports of torch and megatron-core are several seconds of a processor, as much as a tiny run of training.
"""

import ctypes
import gc
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from support.ports import free_port

_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
NOTHING: Mapping[str, str] = MappingProxyType({})


class Process(Protocol):
    """What both a fork and a `subprocess.Popen` are."""

    pid: int

    def poll(self) -> int | None:
        """Exit code, negative: the signal that killed it; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Exit code. Raises subprocess.TimeoutExpired."""

    def send_signal(self, sig: int) -> None:
        """To this process alone."""


@dataclass(frozen=True)
class Start:
    """What a process is started with."""

    words: Sequence[str]
    """Of the command line behind `python`: "-m" and a module, "-c" and a program, or a script; and its words."""
    out: Path
    err: Path
    """Where standard output and standard error go; may be the same."""
    env: Mapping[str, str]
    """Changes of the environment."""


def start(*words: object, out: Path, err: Path | None = None, env: Mapping[str, str] = NOTHING) -> Process:
    """Begin what `python WORDS` does, with changes of the environment; without ``err`` both streams go to ``out``."""
    asked = Start([str(word) for word in words], out, err or out, {"OMP_NUM_THREADS": "1", **env})
    for path in (asked.out, asked.err):
        path.touch()
    return Fork(_servers[0], asked) if _servers else _popen(asked)


def run(*words: object, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` says of `python WORDS`; the streams are written in ``folder``."""
    out, err = (folder / f"{os.getpid()}-{time.monotonic_ns()}.{stream}" for stream in ("out", "err"))
    code = start(*words, out=out, err=err).wait(timeout)
    said = [path.read_text(encoding="utf-8") for path in (out, err)]
    for path in (out, err):
        path.unlink()
    return subprocess.CompletedProcess([*map(str, words)], code, *said)


def run_job(count: int, *words: object, folder: Path, timeout: float = 300) -> None:
    """Run a script in a job of ``count`` processes, as torchrun does. Raises AssertionError with their last words."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    logs = [folder / f"rank-{rank}.log" for rank in range(count)]
    ranks = [
        start(*words, out=log, env={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    limit = time.monotonic() + timeout
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        if time.monotonic() > limit:
            break
        time.sleep(0.02)
    codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGKILL)
            rank.wait()
    assert codes == [0] * count, (codes, [log.read_text(errors="replace")[-2000:] for log in logs])


class Fork:
    """A process that the server has forked."""

    def __init__(self, server: "_Server", asked: Start) -> None:
        self._server, self._words, self._code = server, asked.words, None
        self.pid: int = server.ask(asked)

    _code: int | None

    def poll(self) -> int | None:
        """See Process."""
        if self._code is None:
            self._code = self._server.ask(self.pid)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """See Process."""
        began = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(list(self._words), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, sig: int) -> None:
        """See Process; one that has ended hears nothing."""
        if self.poll() is None:
            os.kill(self.pid, sig)


class _Server:
    """The process that forks, at the other end of a pipe: asked with a Start it answers a pid, with a pid its code."""

    def __init__(self) -> None:
        self._end, its_end = multiprocessing.Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._end.close()
            _serve(its_end)
        its_end.close()

    def ask(self, what: Start | int) -> int | None:
        self._end.send(what)
        answer: int | None = self._end.recv()
        return answer

    def end(self) -> None:
        """It ends, and with it what it has forked."""
        self._end.close()
        os.waitpid(self._pid, 0)


_servers: list[_Server] = []


def begin() -> None:
    """Make the server, before a test has begun threads or joined a job; nothing where there is CUDA, or one already.

    CUDA does not outlive a fork: there each process makes its own imports.
    """
    import torch

    if not _servers and not torch.cuda.is_available():
        _servers.append(_Server())


def end() -> None:
    """No process stays behind."""
    while _servers:
        _servers.pop().end()


def _serve(asked: Connection) -> None:
    """Fork as often as asked, until the tests end; does not return."""
    try:
        _end_with_parent()
        import_everything()
        while True:
            what = asked.recv()
            asked.send(_fork(what, asked) if isinstance(what, Start) else _code_of(what))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def import_everything() -> None:
    """What a verb would import, once for all forks of this process.

    What is there then is none of their garbage collectors' business: megatron-core collects at each save, which would
    walk through, and copy, all that was imported.
    """
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
    import torch
    from megatron.core import dist_checkpointing  # noqa: F401

    import megatron_sep.generate.session
    import megatron_sep.train.loop
    import megatron_sep.train.run_lock
    import megatron_sep.weights.open_source  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def _fork(start: Start, asked: Connection) -> int:
    pid = os.fork()
    if pid == 0:
        asked.close()
        become(lambda: _python(start.words), start.out, start.err, start.env)
    return pid


def _code_of(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _python(words: Sequence[str]) -> None:
    """As the interpreter does with its command line."""
    warnings.resetwarnings()
    if words[0] == "-m":
        sys.argv = ["", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def become(act: Callable[[], object], out: Path, err: Path, env: Mapping[str, str]) -> None:
    """Turn this forked process into one that does ``act``, in a session of its own; does not return."""
    code = 1
    try:
        os.setsid()
        _end_with_parent()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        os.environ.update(env)
        act()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            multiprocessing.util._exit_function()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)


def _popen(asked: Start) -> Process:
    """An interpreter of its own."""
    with asked.out.open("ab") as out, asked.err.open("ab") as err:
        return subprocess.Popen(
            [sys.executable, *asked.words],
            stdout=out,
            stderr=err,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | asked.env,
            start_new_session=True,
        )
