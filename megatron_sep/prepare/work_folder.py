"""The folder in which a shard grows: whose work it is, in how many parts, and who is at it."""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_sep.files import read_json, write_json
from megatron_sep.prepare.receipt import Manifest, PrepareError, difference, work_folder

_RETRY_SECONDS = 0.2


@contextmanager
def whole_at_work(output: Path, settings: Manifest, parts: int) -> Iterator[tuple[Path, int]]:
    """The folder, locked against everybody else, and the parts of the work in it: as begun, else ``parts``.

    Raises PrepareError where it is locked, or holds work of other settings; settings alone are no work.
    """
    folder = _made(output)
    with locked(folder / "lock"):
        _begin(folder, {"parts": parts, **settings})
        yield folder, _parts_of(folder, settings)


@contextmanager
def part_at_work(output: Path, settings: Manifest, part: int, parts: int) -> Iterator[Path]:
    """The folder for one of some parts, while the others may be at work too. Raises PrepareError."""
    folder, wanted = _made(output), {"parts": parts, **settings}
    with ExitStack() as locks:
        with locked(folder / "settings.lock", wait=True):
            if _is_free(folder / "lock"):
                _begin(folder, wanted)
            locks.enter_context(locked(folder / "lock", shared=True))
            _parts_of(folder, wanted)
        with locked(part_lock(folder, part)):
            yield folder


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """A lock that ends with the process. Raises PrepareError where another one has it and it is not waited for."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not wait:
                    raise PrepareError(
                        f"{path.parent}: another process is at work there ({path.name}); wait for it, or end it"
                    ) from error
                time.sleep(_RETRY_SECONDS)
            except OSError as error:
                raise PrepareError(
                    f"{path.parent}: cannot be locked ({error}); choose an output on another disk"
                ) from error
        yield


def part_lock(folder: Path, part: int) -> Path:
    """Held by who works on a part."""
    return folder / f"part-{part:05d}.lock"


def _made(output: Path) -> Path:
    folder = work_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_free(path: Path) -> bool:
    try:
        with locked(path):
            return True
    except PrepareError:
        return False


def _begin(folder: Path, wanted: Manifest) -> None:
    """Write down whose work it is, unless some was begun. Only for one who is alone in the folder."""
    path = folder / "settings.json"
    is_begun = any(folder.glob("part-*/*.json")) or (folder / "manifest.json").exists()
    if not is_begun and not (path.exists() and read_json(path) == json.loads(json.dumps(wanted))):
        for made in folder.glob("test_*"):
            made.unlink()
        write_json(path, wanted)


def _parts_of(folder: Path, wanted: Manifest) -> int:
    """Of the work that was begun, which must be what is wanted."""
    begun = read_json(folder / "settings.json")
    changed = difference(begun, wanted)
    if changed:
        raise PrepareError(
            f"{folder}: holds work of other settings or text ({', '.join(changed)}); remove it to start anew"
        )
    found: int = begun["parts"]
    return found
