"""Parts of an evaluation that are done, kept beside its output until all are: a killed evaluation goes on with them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_sep.evaluate.texts import EvaluationError
from megatron_sep.files import read_json, remove, write_json
from megatron_sep.weights.identity import WEIGHTS, short


class Parts:
    """A folder ``OUT.parts`` with a file for each part that is done, and what was asked.

    ``out`` None keeps nothing. A question about one model has its sum under ``WEIGHTS``. Raises EvaluationError where
    the output, or the folder, answers another question, or does not say of which weights it is the answer.
    """

    def __init__(self, out: Path | None, question: Mapping[str, Any]) -> None:
        self._out, self._question = out, json.loads(json.dumps(question, default=str))
        self._folder = None if out is None else out.with_name(out.name + ".parts")
        for file in (self._out, self._asked):
            if file is not None and file.exists():
                self._check(file)
        if self._asked is not None and not self.complete:
            write_json(self._asked, {"question": self._question})

    @property
    def complete(self) -> bool:
        """Is the output there, and the answer to this question?"""
        return self._out is not None and self._out.exists()

    @property
    def _asked(self) -> Path | None:
        return None if self._folder is None else self._folder / "question.json"

    def _check(self, file: Path) -> None:
        found = _object(file).get("question")
        if not isinstance(found, dict):
            raise EvaluationError(f"--out {self._out}: {file} is no result of `eval`; name another file")
        keys = sorted({*found, *self._question} - {WEIGHTS})
        other = [f"{key} {found.get(key)!r}" for key in keys if found.get(key) != self._question.get(key)]
        if other:
            raise EvaluationError(f"--out {self._out}: was asked with {', '.join(other)}; name another file")
        if found.get(WEIGHTS) != self._question.get(WEIGHTS):
            kept = file if file == self._out else self._folder
            way_out = f"name another file, or remove {kept} to measure anew"
            raise EvaluationError(f"--out {self._out}: {self._of_other_weights(found.get(WEIGHTS))}; {way_out}")

    def _of_other_weights(self, measured: Any) -> str:
        place, now = self._question.get("model"), self._question.get(WEIGHTS)
        if measured is None:
            return f"does not say which weights it was measured with, so that {place} may have learnt since"
        return f"was measured with other weights, {short(measured)}, than now lie in {place}, {short(now)}"

    def take(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of a part, as JSON gives it back: what was kept, or else what ``make`` gives, which is kept now."""
        if self._folder is None:
            return json.loads(json.dumps(make()))
        file = self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        if not file.exists():
            write_json(file, {"part": name, "value": make()})
        found = _object(file)
        if found.get("part") != name:
            raise EvaluationError(f"{file}: is not the part {name!r} of an evaluation; remove {self._folder}")
        return found["value"]

    def finish(self, results: Mapping[str, Any]) -> None:
        """All parts are done: write the output, with the question in it, and remove the folder."""
        if self._out is not None and self._folder is not None:
            write_json(self._out, {"question": self._question} | dict(results))
            remove(self._folder)


def _object(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file)
    except ValueError as error:
        raise EvaluationError(f"{file}: cannot be read: {error}; remove it, or name another --out") from error
    return found if isinstance(found, dict) else {}
