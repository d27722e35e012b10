"""Results of many prompts as JSON lines, in the order of the prompts; what is there already is gone on from."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_sep.errors import UserError
from megatron_sep.generate.many import Result


class ResultsError(UserError):
    """A file of results or of prompts that cannot be used as it is."""


def read_many(path: Path) -> list[str]:
    """Prompts of a file, one a line: text, or of a .jsonl file strings or objects with a "prompt".

    Empty lines of text are left out. Raises ResultsError.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"--prompts {path}: cannot be read: {error}; pass a text file, a prompt a line") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [_prompt_of(path, number, line) if path.suffix == ".jsonl" else line for number, line in numbered]
    if not prompts:
        raise ResultsError(f"--prompts {path}: has no prompt; pass a text file, a prompt a line")
    return prompts


def _prompt_of(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"--prompts {path}, line {number}: is no JSON: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ResultsError(f'--prompts {path}, line {number}: pass a string, or an object with a string "prompt"')
    return prompt


class ResultsFile:
    """Appends to a file of results; one process at a time. A line that a kill cut off is made anew.

    ``settings`` is what the results depend on beside the prompts; the first line holds it. Raises ResultsError for a
    file of other prompts or settings, and for one that another process writes.
    """

    def __init__(self, path: Path, prompts: list[str], settings: dict[str, Any]) -> None:
        self.path, self._prompts, self._settings = path, prompts, settings
        self._later: dict[int, Result] = {}
        self._handle: Any = None
        self.done = 0
        """Prompts whose results are there."""

    def __enter__(self) -> "ResultsFile":
        from fcntl import LOCK_EX, LOCK_NB, flock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self.path.open("a+", encoding="utf-8")
        try:
            flock(self._handle, LOCK_EX | LOCK_NB)
            self._go_on()
        except BlockingIOError as error:
            self._handle.close()
            raise ResultsError(f"--out {self.path}: another process writes it; name another file") from error
        except BaseException:
            self._handle.close()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()

    def left(self) -> Iterator[tuple[int, str]]:
        """Prompts without a result, with their numbers."""
        yield from list(enumerate(self._prompts))[self.done :]

    def write(self, results: Iterable[Result]) -> Iterator[Result]:
        """Write results, each as soon as those of all prompts before it are there; hands them on as they come."""
        for result in results:
            self._later[result.number] = result
            while self.done in self._later:
                each = self._later.pop(self.done)
                self._line({"prompt": each.prompt, "text": each.text, "tokens": each.tokens, "ended": each.ended})
                self.done += 1
            yield result

    def _line(self, value: dict[str, Any]) -> None:
        self._handle.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._handle.flush()

    def _go_on(self) -> None:
        self._handle.seek(0)
        whole = self._handle.read()
        complete = whole[: whole.rfind("\n") + 1]
        if complete != whole:
            self._handle.truncate(len(complete.encode()))
        lines = complete.splitlines()
        if not lines:
            self._line(self._settings)
            return
        found = [_object_of(self.path, number, line) for number, line in enumerate(lines, 1)]
        self._check(found[0], found[1:])
        self.done = len(found) - 1

    def _check(self, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
        expected = json.loads(json.dumps(self._settings))
        other = [f"{name} {settings.get(name)!r}" for name, value in expected.items() if settings.get(name) != value]
        if other:
            raise ResultsError(f"--out {self.path}: was made with {', '.join(other)}; name another file")
        if len(results) > len(self._prompts):
            raise ResultsError(f"--out {self.path}: has {len(results)} results of {len(self._prompts)} prompts")
        for number, (result, prompt) in enumerate(zip(results, self._prompts, strict=False)):
            if result.get("prompt") != prompt:
                raise ResultsError(
                    f"--out {self.path}, line {number + 2}: is of another prompt than --prompts has there; name "
                    "another file"
                )


def _object_of(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ResultsError(f"--out {path}, line {number}: is no result of this program; name another file")
    return value
