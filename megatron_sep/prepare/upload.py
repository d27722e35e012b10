"""A finished shard to where `upload` says, a folder at an address: its receipt last, over nothing of another's."""

import hashlib
from pathlib import Path
from typing import Any

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.data.shards import manifest_path
from megatron_sep.errors import RunFailure
from megatron_sep.files import parse_json, sha256
from megatron_sep.prepare.places import file_system, reached
from megatron_sep.prepare.progress import Progress
from megatron_sep.prepare.receipt import Manifest, PrepareError, difference

_READ = 1 << 24


def uploaded(config: PrepareConfig, settings: Manifest) -> Manifest | None:
    """The receipt that is there already, which is the last of an upload; None where it is not or nothing is uploaded.

    Raises PrepareError where one of other settings lies, PlaceError where none can be.
    """
    if config.upload is None:
        return None
    system, folder = file_system(config.upload)
    place = f"{folder}/{manifest_path(config.output).name}"
    with reached(config.upload):
        there: Manifest | None = parse_json(system.cat_file(place)) if system.exists(place) else None
    if there is not None and difference(there.get("settings"), settings):
        raise _in_the_way(config, place)
    return there


def upload(config: PrepareConfig, manifest: Manifest) -> Manifest:
    """Copy what is not there yet; each file is read back. Returns the manifest.

    A run that was killed goes on with the next file. Raises PlaceError, PrepareError for another file in the place of
    one, RunFailure for one that did not arrive as it is here.
    """
    if config.upload is None:
        return manifest
    system, folder = file_system(config.upload)
    receipt = manifest_path(config.output)
    sums = {name: file["sha256"] for name, file in manifest["files"].items()} | {receipt.name: sha256(receipt)}
    paths = [config.output.parent / name for name in sums]
    done = 0
    with Progress("upload", sum(path.stat().st_size for path in paths)) as progress:
        for path in paths:
            _put(config, path, sums[path.name], system, f"{folder}/{path.name}")
            done += path.stat().st_size
            progress.update(done)
    return manifest


def _put(config: PrepareConfig, path: Path, wanted: str, system: Any, place: str) -> None:
    with reached(str(config.upload)):
        if system.exists(place):
            if _sum(system, place) != wanted:
                raise _in_the_way(config, place)
            return
        system.makedirs(place.rpartition("/")[0], exist_ok=True)
        system.put_file(str(path), place)
        system.invalidate_cache()
        if _sum(system, place) != wanted:
            raise RunFailure(f"{system.unstrip_protocol(place)}: is not what {path} is; remove it and run again")


def _sum(system: Any, place: str) -> str:
    found = hashlib.sha256()
    with system.open(place, "rb", block_size=_READ) as file:
        while piece := file.read(_READ):
            found.update(piece)
    return found.hexdigest()


def _in_the_way(config: PrepareConfig, place: str) -> PrepareError:
    return PrepareError(
        f"upload={config.upload}: {place} is there already and is not of this shard, or half of it; choose another "
        "folder, or remove it"
    )
