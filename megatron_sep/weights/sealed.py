"""A checkpoint on disk: complete and verified, or ignored; and what it says of itself.

It is written into `step-NNNNNNNN.partial`, with the SHA-256 of every file in `manifest.json`, flushed to the disk and
renamed to `step-NNNNNNNN`. A directory without that final name, or whose files differ from its manifest, is never
loaded. The manifest has a format number; one of an older format is read as if it had been written today.
"""

import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sep.config.schema import ModelConfig, RunConfig
from megatron_sep.errors import UserError
from megatron_sep.files import flush, flush_tree, remove, sha256, versions

Tree = dict[str, Any]
FORMAT = 2
"""Of a manifest written today. 1 had no number and no `engine`: its tensors are megatron-core's."""
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_SEAL = "manifest.sha256"
_PACKAGES = ("megatron_sep", "torch", "megatron-core", "numpy", "tokenizers")
FREE_SETTINGS = frozenset(
    {"hidden_dropout", "attention_dropout", "init", "output_init", "init_std", "sequence_length", "vocab_multiple"}
)
"""Settings of a model that no weight depends on."""


class CheckpointError(UserError):
    """A checkpoint that cannot be taken up."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; with the seed it fixes data order and dropout."""

    step: int = 0
    consumed: int = 0
    """Training sequences seen."""
    skipped: int = 0
    """Steps whose gradient was not finite."""

    def advance(self, sequences: int) -> "TrainState":
        """After one more step of so many sequences."""
        return replace(self, step=self.step + 1, consumed=self.consumed + sequences)


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself."""

    state: TrainState
    config: RunConfig
    vocab_size: int
    """Rows of the embedding."""
    engine: str
    """What wrote the tensors, and can read them; "weights": one safetensors file a layer, for any engine."""

    @property
    def model(self) -> ModelConfig:
        """The model with its vocabulary."""
        return self.config.model.model_copy(update={"vocab_size": self.vocab_size})

    def record(self, ranks: int) -> Tree:
        """As it stands in the manifest; ``ranks`` is how many processes wrote it."""
        return {
            "state": asdict(self.state),
            "vocab_size": self.vocab_size,
            "engine": self.engine,
            "config": self.config.model_dump(mode="json"),
            "versions": {"python": platform.python_version(), **versions(*_PACKAGES)},
            "ranks": ranks,
        }


def checkpoint_name(step: int) -> str:
    """Of the directory of a step's checkpoint."""
    return f"step-{step:08d}"


def finished_checkpoints(folder: Path) -> list[Path]:
    """Directories of finished checkpoints in a run's ``checkpoints``, oldest first; they are not verified."""
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named)]


def newest_verified(folder: Path) -> Path | None:
    """The newest checkpoint of a run's ``checkpoints`` that verifies; None where there is none at all.

    What does not verify is named and passed over. Raises CheckpointError where there are some and none verifies.
    """
    newest = next(_verified(folder), None)
    damaged = finished_checkpoints(folder)
    if newest is None and damaged:
        raise CheckpointError(
            f"{folder}: none of its {len(damaged)} checkpoint(s) is whole; the damage stands above. Bring one back, "
            "give another dir, or move them away to start anew in this one"
        )
    return newest


def _verified(folder: Path) -> Iterator[Path]:
    for path in reversed(finished_checkpoints(folder)):
        fault = fault_of(path)
        if fault is None:
            yield path
        else:
            print(f"checkpoint passed over: {fault}", flush=True)


def is_checkpoint(path: Path) -> bool:
    """Does a directory say that it is a checkpoint of this program?"""
    return (path / _MANIFEST).is_file()


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        if (path / _SEAL).read_text() != sha256(path / _MANIFEST):
            return f"{path}: {_MANIFEST} and its {_SEAL} do not agree"
        expected: dict[str, Tree] = _manifest(path)["files"]
    except OSError as error:
        return f"{path}: is not whole: {error}"
    except CheckpointError as error:
        return str(error)
    for name, record in expected.items():
        file = path / name
        if not file.is_file():
            return f"{file}: is missing"
        if file.stat().st_size != record["bytes"]:
            return f"{file}: has {file.stat().st_size} bytes, was written with {record['bytes']}"
        if sha256(file) != record["sha256"]:
            return f"{file}: its SHA-256 is not the one it was written with"
    return None


def describe(path: Path) -> Description:
    """What a checkpoint says of itself. Raises CheckpointError."""
    found = _manifest(path)["description"]
    try:
        config = RunConfig.model_validate(found["config"])
        return Description(TrainState(**found["state"]), config, found["vocab_size"], found["engine"])
    except KeyError as error:
        raise CheckpointError(f"{path / _MANIFEST}: says nothing of its {error.args[0]}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path / _MANIFEST}: is not known to this version: {error}") from error


def _manifest(path: Path) -> Tree:
    """The manifest in today's format. Raises CheckpointError, OSError."""
    try:
        found: Tree = json.loads((path / _MANIFEST).read_text())
    except ValueError as error:
        raise CheckpointError(f"{path / _MANIFEST}: is no JSON: {error}") from error
    for number in range(found.get("format", 1), FORMAT):
        found = _UPGRADES[number](found)
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / _MANIFEST}: has format {found.get('format')}, this version reads 1 to {FORMAT}; "
            "use the version of megatron_sep that wrote it"
        )
    return found


def _name_engine(manifest: Tree) -> Tree:
    weights_alone = any(name.startswith("weights-") for name in manifest["files"])
    engine = "weights" if weights_alone else "megatron"
    return {**manifest, "format": 2, "description": {**manifest["description"], "engine": engine}}


_UPGRADES: dict[int, Callable[[Tree], Tree]] = {1: _name_engine}
"""From a format to the next one."""


def file_record(path: Path) -> Tree:
    """Size and sum of a file, as a manifest lists it."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def records_of(folder: Path) -> dict[str, Tree]:
    """Of every file in a folder, by name."""
    return {path.name: file_record(path) for path in sorted(folder.iterdir())}


def write_manifest(folder: Path, description: Tree, files: Mapping[str, Tree]) -> None:
    """The manifest of a folder's files and its sum; the folder is a checkpoint once it has its final name."""
    manifest = {"format": FORMAT, "description": description, "files": dict(sorted(files.items()))}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    (folder / _SEAL).write_text(sha256(folder / _MANIFEST))


def seal(partial: Path, final: Path, description: Tree, files: Mapping[str, Tree]) -> None:
    """Write the manifest of ``partial``, flush everything to the disk and give it its final name.

    ``files`` lists every file with its size and sum. Raises OSError; then ``partial`` is gone and nothing else changed.
    """
    try:
        write_manifest(partial, description, files)
        flush_tree(partial)
        replaced = final.with_suffix(".replaced")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        flush(final.parent)
        remove(replaced)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def tokenizer_of(path: Path, config: RunConfig) -> Path | None:
    """The tokenizer that lies in a checkpoint or in its run's dir, wherever that is now, or the one that was named.

    None where none of them is there.
    """
    named = config.tokenizer.path
    in_run = path.parent.parent / named.relative_to(config.dir) if named.is_relative_to(config.dir) else named
    return tokenizer_in(path) or next((file for file in (in_run, named) if file.is_file()), None)


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer file that lies in a directory."""
    inside = (folder / name for name in ("tokenizer.json", "tokenizer.model"))
    return next((file for file in inside if file.is_file()), None)


def check_fits(path: Path, description: Description, model: ModelConfig, vocab_size: int) -> None:
    """Raise CheckpointError where the model differs from the one that was saved."""
    now = model.model_dump(mode="json") | {"vocab_size": vocab_size}
    saved = description.model.model_dump(mode="json")
    wrong = [
        f"model.{key} is {saved[key]} there and {now[key]} here"
        for key in now
        if key not in FREE_SETTINGS and saved[key] != now[key]
    ]
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}. Set them as they were, or start in another dir")
