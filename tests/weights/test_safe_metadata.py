"""A checkpoint that someone else made runs no code, whatever its sums say."""

import io
import json
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disk import Bomb
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_sep.config import RunConfig
from megatron_sep.files import sha256
from megatron_sep.generate.load import load
from megatron_sep.parallel.device import current_device
from megatron_sep.parallel.groups import topology
from megatron_sep.weights.safe_metadata import read_metadata
from megatron_sep.weights.sealed import CheckpointError, fault_of, newest_verified
from megatron_sep.weights.tensor_files import WeightsError

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def trained(tiny: Callable[..., RunConfig]) -> tuple[RunConfig, Path]:
    """A run and its checkpoint."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    config = tiny(train={"steps": 2, "eval_every": 0})
    train(build_run(config, topology()))
    newest = newest_verified(config.dir / "checkpoints")
    assert newest is not None
    return config, newest


def replace(checkpoint: Path, name: str, data: bytes) -> None:
    """Put other bytes in the place of a file, with sums and seal made to fit."""
    (checkpoint / name).write_bytes(data)
    about = {"bytes": len(data), "sha256": sha256(checkpoint / name)}
    seal(checkpoint, lambda files: files.update({name: about}))


def seal(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the list of files, and make the seal fit."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(manifest["files"])
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "manifest.sha256").write_text(sha256(checkpoint / "manifest.json"))
    assert fault_of(checkpoint) is None


def resume(config: RunConfig) -> Any:
    from megatron_sep.train.run import build_run

    return build_run(config, topology())


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    """An unrestricted reader runs it: what the other tests show is not for want of a working one."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("hidden", [False, True])
def test_code_in_the_metadata_runs_neither_on_resume_nor_on_generate(
    trained: tuple[RunConfig, Path], tmp_path: Path, hidden: bool
) -> None:
    """As the whole file, and inside metadata that is whole: one clear message, and nothing has happened."""
    config, checkpoint = trained
    canary = tmp_path / "canary"
    value: Any = Bomb(canary)
    if hidden:
        value = pickle.loads((checkpoint / ".metadata").read_bytes())
        value.planner_data = Bomb(canary)
    replace(checkpoint, ".metadata", pickle.dumps(value))
    for use in (lambda: resume(config), lambda: load(config.dir, current_device())):
        with pytest.raises(
            WeightsError, match=r"\.metadata: is damaged, or no checkpoint of torch 2\.\S+ or older: names"
        ):
            use()
    assert not canary.exists()


class ByName(pickle.Pickler):
    """As Python 3.11.0 to 3.11.3 does: a value of an enumeration is an attribute of its class."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def pickled_by_name(value: object) -> bytes:
    file = io.BytesIO()
    ByName(file).dump(value)
    return file.getvalue()


def test_enumerations_of_an_early_python_3_11_are_read(trained: tuple[RunConfig, Path]) -> None:
    """They say the same, and the run goes on."""
    config, checkpoint = trained
    before = read_metadata(checkpoint)
    data = pickled_by_name(pickle.loads((checkpoint / ".metadata").read_bytes()))
    assert b"getattr" in data
    replace(checkpoint, ".metadata", data)
    assert read_metadata(checkpoint).state_dict_metadata == before.state_dict_metadata
    assert resume(config).state.step == 2


@pytest.mark.parametrize("asked", [(TensorStorageMetadata, "__init__"), (WriteItemType, "mro"), (torch.Size, "numel")])
def test_no_other_attribute_is_read(tmp_path: Path, asked: tuple[type, str]) -> None:
    """Not of a class that a checkpoint may name, and no method of an enumeration."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute(*asked)))
    with pytest.raises(WeightsError, match="asks for an attribute"):
        read_metadata(tmp_path)


class Attribute:
    """Pickled as what `getattr` gives."""

    def __init__(self, owner: type, name: str) -> None:
        self.asked = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.asked


def test_no_pickled_object_is_asked_for(trained: tuple[RunConfig, Path]) -> None:
    """torch would unpickle it, and nothing here would notice: all are tensors, but for a copy of what is in common.pt.

    megatron-core 0.19 writes that copy, and reads it where that file is missing.
    """
    _, checkpoint = trained
    saved = read_metadata(checkpoint).state_dict_metadata
    others = [name for name, value in saved.items() if not isinstance(value, TensorStorageMetadata)]
    assert [name for name in others if not name.startswith("common_state/")] == []


def test_what_is_no_tensor_is_not_looked_for_among_the_tensors(trained: tuple[RunConfig, Path]) -> None:
    """Without its file a checkpoint is refused, though its sums are right."""
    config, checkpoint = trained
    (checkpoint / "common.pt").unlink()
    seal(checkpoint, lambda files: files.pop("common.pt"))
    with pytest.raises(CheckpointError, match=r"has no common\.pt"):
        resume(config)


def test_a_tensor_lies_in_the_checkpoint_itself(trained: tuple[RunConfig, Path]) -> None:
    """A name that leads out of the directory is refused."""
    config, checkpoint = trained
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../elsewhere.distcp"
    replace(checkpoint, ".metadata", pickle.dumps(metadata))
    with pytest.raises(WeightsError, match=r"names the file '\.\./\.\./elsewhere\.distcp'; tensors lie beside it"):
        load(config.dir, current_device())


@pytest.mark.parametrize("data", [b"", b"\x80", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps([1] * 10)[:-3]])
def test_damaged_metadata_is_one_message(trained: tuple[RunConfig, Path], data: bytes) -> None:
    """Empty, cut short, no pickle, a pickle of something else."""
    _, checkpoint = trained
    (checkpoint / ".metadata").write_bytes(data)
    with pytest.raises(WeightsError, match=r"\.metadata: "):
        read_metadata(checkpoint)
