"""Reads mutated files one after the other in a process that is watched: time, memory, crashes, and how each ended."""

import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz.mutate import mutate

SECONDS = 4.0
"""Of processor time that one file may take."""
SLACK = 32_000_000
"""Bytes beside twice the file that one may take: what libraries set aside when they read anything at all."""
SILENCE = 300.0
"""Seconds of the clock without a file that is read to its end: a hang."""
_INVALID, _DIED = 3, 4
"""Exit codes of a process that could not read the valid input, or that ended at another one."""
_MOST = 8_000_000_000
"""Bytes of addresses; past them the reader gets a MemoryError in place of the machine's memory."""


@dataclass(frozen=True)
class Reader:
    """One reader, and a valid input of it."""

    make: Callable[[Path], list[Path]]
    """Writes a valid input into an empty folder and returns the files of it that may be mutated."""
    read: Callable[[Path], None]
    """Reads what is in the folder to its end. Raises UserError for what it refuses."""
    fit: Callable[[Path], None] = lambda _: None
    """Makes the sums of other files fit what has become of the mutated one."""
    copies: float = 2.0
    """Bytes of memory that a byte of the file may take; compressed or parsed ones take more."""


@dataclass(frozen=True)
class Fault:
    """An input that did not end as it should."""

    number: int
    what: str


def fuzz(reader: Reader, folder: Path, numbers: range, seed: str) -> list[Fault]:
    """Read input ``number`` for each number; it follows from the seed and the number alone."""
    folder.mkdir(parents=True, exist_ok=True)
    faults: list[Fault] = []
    todo = numbers
    while todo:
        reached, died = _watched(reader, folder, todo, seed)
        faults += [Fault(**json.loads(line)) for line in (folder / "faults").read_text().splitlines()]
        if died is None:
            break
        faults.append(Fault(reached, died))
        todo = range(reached + 1, todo.stop)
    return faults


def _watched(reader: Reader, folder: Path, numbers: range, seed: str) -> tuple[int, str | None]:
    """Run the inputs in a forked process: the last number, and how the process died where it did."""
    progress = folder / "progress"
    progress.write_text(str(numbers.start))
    (folder / "faults").write_text("")
    child = os.fork()
    if child == 0:
        _become(reader, folder, numbers, seed, progress)
    last, since = -1, time.monotonic()
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = int(progress.read_text() or numbers.start)
        if now != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > SILENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return now, f"hangs: nothing for {SILENCE:.0f} s"
        time.sleep(0.02)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == _INVALID:
        raise RuntimeError(f"the valid input is not read: {(folder / 'output').read_text()}")
    return int(progress.read_text() or numbers.start), None if code == 0 else f"the process died: {code}"


def _become(reader: Reader, folder: Path, numbers: range, seed: str, progress: Path) -> None:
    """Read every input in this forked process; does not return."""
    code = _INVALID
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_AS, (_MOST, _MOST))
        shutil.rmtree(folder / "input", ignore_errors=True)
        (folder / "input").mkdir()
        files = reader.make(folder / "input")
        whole = {file: file.read_bytes() for file in files}
        reader.read(folder / "input")  # it is valid, and what reading anything takes is taken
        code = _DIED
        for number in numbers:
            progress.write_text(str(number))
            fault = _one(reader, folder, whole, Random(f"{seed}-{number}"))
            if fault:
                with (folder / "faults").open("a") as file:
                    file.write(json.dumps({"number": number, "what": fault}) + "\n")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _one(reader: Reader, folder: Path, whole: dict[Path, bytes], random: Random) -> str | None:
    """Mutate one file of the valid input, read it all, and put it back: what was wrong with how it ended."""
    path = random.choice(list(whole))
    path.write_bytes(mutate(random, whole[path]))
    with suppress(OSError):
        reader.fit(folder / "input")
    size = sum(file.stat().st_size for file in whole)
    before, began = _memory("VmRSS"), time.process_time()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    fault = _how_it_ends(reader, folder / "input")
    took, grown = time.process_time() - began, _memory("VmHWM") - before
    path.write_bytes(whole[path])
    if took > SECONDS:
        fault = f"took {took:.1f} s"
    if grown > reader.copies * size + SLACK:
        fault = f"took {grown / 1e6:.0f} MB for a file of {size / 1e6:.3f} MB"
    return fault and f"{path.name}: {fault}"


def _how_it_ends(reader: Reader, folder: Path) -> str | None:
    """None for a result and for one message."""
    from megatron_sep.errors import SepError, of_the_system

    try:
        reader.read(folder)
    except SepError as error:
        return None if str(error).strip() else "an empty message"
    except OSError as error:
        return None if of_the_system(error) is not None else _told(error)
    except BaseException as error:
        return _told(error)
    return None


def _told(error: BaseException) -> str:
    """Kind, text, and the last place of this program on the way to it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "megatron_sep" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {str(error)[:150]!r}{place}"


def _memory(field: str) -> int:
    """Of this process, in bytes."""
    with Path("/proc/self/status").open() as file:
        for line in file:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
