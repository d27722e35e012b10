"""Whose the work is and who is at it, on a disk or in an object store.

In a store a lock can only be looked at: it names who has it and when that one was last there. Where two take it for
theirs, as one that was cut off from the store for long and the one after it, they do each other's work again and the
bytes are the same: nothing that one of them writes there changes what the other reads.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.files import read_json
from megatron_sep.prepare.objects import Objects
from megatron_sep.prepare.places import PlaceError
from megatron_sep.prepare.receipt import Manifest, PrepareError, difference, work_folder
from megatron_sep.prepare.remote_work import RemoteWork
from megatron_sep.prepare.work import FolderWork, Work
from megatron_sep.prepare.work_folder import part_at_work, whole_at_work

_LOCK, _SETTINGS = "lock.json", "settings.json"
_BEAT_SECONDS, _DEAD_SECONDS = 20.0, 120.0


@contextmanager
def whole_work(config: PrepareConfig, settings: Manifest, parts: int) -> Iterator[tuple[Path, Work, int]]:
    """A folder of this machine for the shard, the work, and its parts as begun, else ``parts``; for this process alone.

    Raises PrepareError where another one is at it, or it is of other settings; PlaceError.
    """
    with whole_at_work(config.output, settings, parts) as (folder, begun):
        if config.work is None:
            yield folder, FolderWork(folder), begun
            return
        with _alone(_place(config)):
            work, begun = _begin(config, settings, parts)
            yield folder, work, begun


@contextmanager
def part_work(config: PrepareConfig, settings: Manifest, part: int, parts: int) -> Iterator[tuple[Path, Work]]:
    """The same for one of some parts, while others may be at work too. Raises PrepareError, PlaceError."""
    if config.work is not None:
        work, _ = _begin(config, {**settings, "parts": parts}, parts)
        work.here.mkdir(parents=True, exist_ok=True)
        yield work.here, work
        return
    with part_at_work(config.output, settings, part, parts) as folder:
        yield folder, FolderWork(folder)


def parts_begun(config: PrepareConfig) -> int | None:
    """In how many parts work is; None where none is begun. Raises PlaceError."""
    path = work_folder(config.output) / _SETTINGS
    if config.work is None:
        return int(read_json(path)["parts"]) if path.exists() else None
    found = _place(config).read_json(_SETTINGS)
    return None if found is None else int(found["parts"])


def clear_work(config: PrepareConfig, settings: Manifest) -> None:
    """Remove work in an object store whose shard has its receipt, unless another is at it. Raises PlaceError."""
    if config.work is None:
        return
    place = _place(config)
    begun = place.read_json(_SETTINGS)
    if begun is None or difference(begun, settings):
        return
    with suppress(PrepareError), _alone(place):
        place.remove(_SETTINGS)  # first: what is left without it is nobody's
        RemoteWork(place.below(begun["id"]), begun["id"], config.work.scratch).clear()
        place.remove("")


def _place(config: PrepareConfig) -> Objects:
    assert config.work is not None
    return Objects(f"{config.work.address}/{config.output.name}.work")


def _begin(config: PrepareConfig, settings: Manifest, parts: int) -> tuple[RemoteWork, int]:
    """The work as begun by who came first; what is made has that one's ``id`` in its names."""
    assert config.work is not None
    place = _place(config)
    begun = place.create_json(_SETTINGS, {"id": uuid4().hex[:12], "parts": parts, **settings})
    changed = difference(begun, settings)
    if changed:
        raise PrepareError(
            f"{place.address}: holds work of other settings or text ({', '.join(changed)}); remove it to start anew"
        )
    return RemoteWork(place.below(begun["id"]), begun["id"], config.work.scratch), int(begun["parts"])


@contextmanager
def _alone(place: Objects) -> Iterator[None]:
    """Be the one that ``lock.json`` names, and say so every few seconds. Raises PrepareError where another one is."""
    mine = {"token": uuid4().hex, "host": os.uname().nodename, "process": os.getpid()}
    found = place.create_json(_LOCK, {**mine, "seen": time.time()})
    if found.get("token") != mine["token"]:
        _refuse_living(place, found)
        place.remove(_LOCK)
        found = place.create_json(_LOCK, {**mine, "seen": time.time()})
        if found.get("token") != mine["token"]:
            _refuse_living(place, found)
    end = threading.Event()
    beating = threading.Thread(target=_beat, args=(place, mine, end), name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        end.set()
        beating.join()
        with suppress(PlaceError):  # what is to be told is what ended the work
            _give_up(place, mine)


def _give_up(place: Objects, mine: dict[str, Any]) -> None:
    if (place.read_json(_LOCK) or {}).get("token") == mine["token"]:
        place.remove(_LOCK)


def _beat(place: Objects, mine: dict[str, Any], end: threading.Event) -> None:
    """Until the end, or until another one has the lock."""
    while not end.wait(_BEAT_SECONDS):
        with suppress(PlaceError):  # a store that does not answer now is asked again
            if (place.read_json(_LOCK) or {}).get("token") != mine["token"]:
                return
            place.write_json(_LOCK, {**mine, "seen": time.time()})


def _refuse_living(place: Objects, found: dict[str, Any]) -> None:
    """Raise PrepareError unless who has the lock is gone from this machine, or was not seen for long."""
    host, process, age = found.get("host"), found.get("process", -1), time.time() - found.get("seen", 0)
    is_here = host == os.uname().nodename
    if (is_here and not psutil.pid_exists(process)) or age > _DEAD_SECONDS:
        return
    raise PrepareError(
        f"{place.address}: process {process} of {host} is at work there, seen {max(age, 0):.0f} s ago; wait for it, or "
        f"end it. Where it is gone, {_LOCK} there stands for {_DEAD_SECONDS:.0f} s after that, or until it is removed"
    )
