"""A checkpoint on disk: complete and verified, or ignored; and what it says of itself.

It is written into `step-NNNNNNNN.partial`, with the SHA-256 of every file in `manifest.json`, flushed to the disk and
renamed to `step-NNNNNNNN`. A directory without that final name, or whose files differ from its manifest, is never
loaded. The manifest has a format number; one of an older format is read as if it had been written today.
"""

import json
import math
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_sep.config.schema import ModelConfig, RunConfig
from megatron_sep.errors import UserError
from megatron_sep.files import flush, flush_tree, read_json, remove, sha256, versions

Tree = dict[str, Any]
FORMAT = 3
"""Of a manifest written today. 1 had no number and no `engine`: its tensors are megatron-core's. 2 had the setting
`parallel.engine` under `train`."""
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


_MEMORY = 100
"""Steps that the level of the loss remembers."""
_LEAST_SPREAD = 0.01
"""Of the mean: losses that hardly differ from step to step still may."""


@dataclass(frozen=True)
class LossLevel:
    """Exponential mean and variance of the losses that were learnt from: what the next one is judged by."""

    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0

    def after(self, loss: float) -> "LossLevel":
        """With one more loss; one that is no number is left out."""
        if not math.isfinite(loss):
            return self
        weight, off = 1 / min(self.steps + 1, _MEMORY), loss - self.mean
        return LossLevel(self.mean + weight * off, (1 - weight) * (self.variance + weight * off * off), self.steps + 1)

    def bound(self, deviations: float) -> float:
        """So many standard deviations above the mean."""
        return self.mean + deviations * max(math.sqrt(self.variance), _LEAST_SPREAD * abs(self.mean))


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; with the seed it fixes data order and dropout."""

    step: int = 0
    consumed: int = 0
    """Training sequences seen."""
    skipped: int = 0
    """Steps that changed no weight: their gradient was not finite, or their loss was a spike."""
    level: LossLevel = LossLevel()

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
    contents: Mapping[str, str] | None = None
    """Sums of what the run reads, by the settings that name it; None: written by a version that kept none."""

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
            "versions": versions_here(),
            "ranks": ranks,
            **({} if self.contents is None else {"contents": dict(self.contents)}),
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


def newest_verified(folder: Path, passed_over: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint of a run's ``checkpoints`` that verifies; None where there is none at all.

    What does not verify is named, here and to ``passed_over``, and passed over. Raises CheckpointError where there are
    some and none verifies.
    """
    newest = next(_verified(folder, passed_over), None)
    damaged = finished_checkpoints(folder)
    if newest is None and damaged:
        raise CheckpointError(
            f"{folder}: none of its {len(damaged)} checkpoint(s) is whole; the damage stands above. Bring one back, "
            "give another dir, or move them away to start anew in this one"
        )
    return newest


def _verified(folder: Path, passed_over: Callable[[str], None]) -> Iterator[Path]:
    for path in reversed(finished_checkpoints(folder)):
        fault = fault_of(path)
        if fault is None:
            yield path
        else:
            print(f"checkpoint passed over: {fault}", flush=True)
            passed_over(fault)


def is_checkpoint(path: Path) -> bool:
    """Does a directory say that it is a checkpoint of this program?"""
    return (path / _MANIFEST).is_file()


def seal_of(path: Path) -> str:
    """The sum of a checkpoint's manifest, which lists the sum of every file; nothing is verified.

    Raises CheckpointError where it has none.
    """
    try:
        return (path / _SEAL).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path / _SEAL}: cannot be read: {error}; bring it back, or save the model anew"
        ) from error


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        if (path / _SEAL).read_text() != sha256(path / _MANIFEST):
            return f"{path}: {_MANIFEST} and its {_SEAL} do not agree"
        expected: dict[str, Tree] = _manifest(path)["files"]
    except (OSError, UnicodeDecodeError) as error:
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
        counts = {key: value for key, value in found["state"].items() if key != "level"}
        state = TrainState(
            **{key: _count(key, value) for key, value in counts.items()}, level=_level(found["state"].get("level", {}))
        )
        rows, contents = _count("vocab_size", found["vocab_size"]), found.get("contents")
        if contents is not None and not isinstance(contents, dict):
            raise ValueError("contents are no sums by name")
        return Description(state, config, rows, str(found["engine"]), contents)
    except KeyError as error:
        raise CheckpointError(f"{path / _MANIFEST}: says nothing of its {error.args[0]}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / _MANIFEST}: is not known to this version: {error}") from error


def written_by(path: Path) -> dict[str, str]:
    """The versions that wrote a checkpoint, by package. Raises CheckpointError."""
    found = _manifest(path)["description"].get("versions", {})
    return {str(name): str(version) for name, version in found.items()} if isinstance(found, dict) else {}


def versions_here() -> dict[str, str]:
    """The same of this program, as a checkpoint would name them."""
    return {"python": platform.python_version(), **versions(*_PACKAGES)}


def _level(saved: Tree) -> LossLevel:
    return LossLevel(
        float(saved.get("mean", 0)), float(saved.get("variance", 0)), _count("level.steps", saved.get("steps", 0))
    )


def _count(key: str, value: Any) -> int:
    """A value that counts something. Raises ValueError for any other."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{key} is {str(value)[:40]!r}, which counts nothing")
    return value


def _manifest(path: Path) -> Tree:
    """The manifest in today's format. Raises CheckpointError, OSError."""
    try:
        found: Tree = read_json(path / _MANIFEST)
    except ValueError as error:
        raise CheckpointError(f"{path / _MANIFEST}: is no JSON: {error}") from error
    _check_form(path, found)
    for number in range(found.get("format", 1), FORMAT):
        found = _UPGRADES[number](found)
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / _MANIFEST}: has format {found.get('format')}, this version reads 1 to {FORMAT}; "
            "use the version of megatron_sep that wrote it"
        )
    return found


def _check_form(path: Path, manifest: Any) -> None:
    """Raise CheckpointError for what is no manifest of any format, or lists a file that lies elsewhere."""
    found = manifest if isinstance(manifest, dict) else {}
    files, number = found.get("files"), found.get("format", 1)
    if not isinstance(files, dict) or not isinstance(found.get("description"), dict):
        raise CheckpointError(f"{path / _MANIFEST}: is no manifest: it lacks `files` or `description`")
    if type(number) is not int or number < 1:
        raise CheckpointError(f"{path / _MANIFEST}: has format {str(number)[:40]!r}, which is no number of one")
    for name, record in files.items():
        if PurePosixPath(name).name != name or "\0" in name:
            raise CheckpointError(f"{path / _MANIFEST}: lists {name[:200]!r}; the files of a checkpoint lie beside it")
        if not isinstance(record, dict) or not {"bytes", "sha256"} <= record.keys():
            raise CheckpointError(f"{path / _MANIFEST}: has no size and sum of {name}")


def _name_engine(manifest: Tree) -> Tree:
    weights_alone = any(name.startswith("weights-") for name in manifest["files"])
    engine = "weights" if weights_alone else "megatron"
    return {**manifest, "format": 2, "description": {**manifest["description"], "engine": engine}}


def _move_engine(manifest: Tree) -> Tree:
    description = manifest["description"]
    if "config" not in description:
        return {**manifest, "format": 3}
    config, train = description["config"], dict(description["config"].get("train", {}))
    moved = {"engine": train.pop("engine")} if "engine" in train else {}
    config = {**config, "train": train, "parallel": {**config.get("parallel", {}), **moved}}
    return {**manifest, "format": 3, "description": {**description, "config": config}}


_UPGRADES: dict[int, Callable[[Tree], Tree]] = {1: _name_engine, 2: _move_engine}
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
