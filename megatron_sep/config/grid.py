"""`train --grid`: every combination of several values of several settings as a job of its own; torch-free."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from megatron_sep.config.load import ConfigError, load_config

_MOST_JOBS = 1000
_OPEN, _CLOSE = "[{(", "]})"


@dataclass(frozen=True)
class Job:
    """One combination: the words that follow the configuration, its own dir among them."""

    name: str
    words: tuple[str, ...]
    dir: Path


def grid_jobs(config: Path, axes: Sequence[str], words: Sequence[str]) -> list[Job]:
    """A job for every combination, each in its own folder below the dir of the configuration.

    ``axes`` are ``section.key=value,value``, and so is whatever in ``words`` has several values; the rest of them are
    settings and files that all jobs share. Commas inside brackets or quotes belong to one value. Raises ConfigError for
    what is no axis, for names that are the same, and for any configuration that cannot be.
    """
    shared = [word for word in words if not _is_axis(word)]
    spread = dict(map(_axis, [*axes, *(word for word in words if _is_axis(word))]))
    if len(spread) < len(axes):
        raise ConfigError("--grid: the same setting stands there twice; give all of its values at once")
    base = load_config(config, [*shared, *(f"{key}={values[0]}" for key, values in spread.items())]).dir
    combinations = [dict(zip(spread, values, strict=True)) for values in product(*spread.values())]
    if len(combinations) > _MOST_JOBS:
        raise ConfigError(f"--grid: makes {len(combinations):,} jobs; {_MOST_JOBS:,} at most")
    jobs = [_job(base, shared, combination) for combination in combinations]
    _check(config, jobs)
    return jobs


def _is_axis(word: str) -> bool:
    key, equals, values = word.partition("=")
    return bool(equals) and "." in key and len(list(_split(values))) > 1


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    found = list(_split(values))
    if not equals or not key or not all(found):
        raise ConfigError(f"--grid {text}: is written section.key=value,value")
    if key == "dir":
        raise ConfigError(f"--grid {text}: each job has a dir of its own below that of the configuration")
    return key, found


def _split(values: str) -> Iterator[str]:
    """At commas outside of brackets and quotes."""
    part, depth, quote = "", 0, ""
    for letter in values:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += 0 if quote else (letter in _OPEN) - (letter in _CLOSE)
        if letter == "," and not depth and not quote:
            yield part
            part = ""
        else:
            part += letter
    yield part


def _job(base: Path, shared: Sequence[str], combination: dict[str, str]) -> Job:
    name = "_".join(f"{_short(key, combination)}-{_safe(value)}" for key, value in combination.items())
    own = [f"{key}={value}" for key, value in combination.items()]
    folder = base / name
    return Job(name, (*shared, *own, f"dir={folder}"), folder)


def _short(key: str, keys: dict[str, str]) -> str:
    """The last part of a key where it tells the axes apart."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _safe(value: str) -> str:
    """As a part of a folder's name."""
    inner = re.sub(r"^[^\w.+-]+|[^\w.+-]+$", "", value)
    return re.sub(r"[^\w.+-]+", "-", inner) or "none"


def _check(config: Path, jobs: Sequence[Job]) -> None:
    """Raises ConfigError before any job is started."""
    names: dict[str, Job] = {}
    for job in jobs:
        if job.name in names:
            raise ConfigError(f"--grid: two jobs would train in {job.dir}; leave one of the two values out")
        names[job.name] = job
    mistakes = []
    for job in jobs:
        try:
            load_config(config, job.words)
        except ConfigError as error:
            mistakes.append(f"{job.name}: {error}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
