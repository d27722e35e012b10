"""The sum of weights: other weights have another one, and what does not change them changes nothing."""

import os
import shutil
from pathlib import Path

import pytest

from megatron_sep.weights import identity
from megatron_sep.weights.identity import weights_sum
from megatron_sep.weights.open_source import SourceError
from megatron_sep.weights.sealed import CheckpointError, records_of, write_manifest


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What looks like a directory of Hugging Face; its weights have 1,000 bytes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(250)) * 4)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_text("{}")
    return folder


def change(file: Path, at: int) -> None:
    """Another byte, at the old size and under the old time."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_checkpoint_is_known_by_its_seal(tmp_path: Path) -> None:
    """Other tensors or other settings under the same name have another sum, a copy has the same."""
    sums = []
    for number, (weights, description) in enumerate((("a", {}), ("b", {}), ("a", {"seed": 2}), ("a", {}))):
        folder = tmp_path / str(number) / "step-00000008"
        folder.mkdir(parents=True)
        (folder / "weights-00000.safetensors").write_text(weights)
        write_manifest(folder, description, records_of(folder))
        sums.append(weights_sum(folder))
    assert len(set(sums)) == 3
    assert sums[0] == sums[3]
    (folder / "manifest.sha256").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.sha256: cannot be read"):
        weights_sum(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_each_byte_of_a_directory_counts(directory: Path, name: str) -> None:
    """Of weights, settings and tokenizer, at the old size and time; a file more or less counts too."""
    before = weights_sum(directory)
    change(directory / name, 1)
    assert weights_sum(directory) != before
    change(directory / name, 1)
    assert weights_sum(directory) == before
    (directory / name).unlink()
    assert weights_sum(directory) != before


def test_what_loading_does_not_read_changes_nothing(directory: Path) -> None:
    """Another place, other times, and what an evaluation writes beside the weights."""
    before = weights_sum(directory)
    (directory / "needle.json").write_text("{}")
    (directory / "needle.json.parts").mkdir()
    (directory / "README.md").write_text("A model.")
    assert weights_sum(directory) == before
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert weights_sum(copy) == before


def test_a_large_directory_counts_by_pieces_and_times(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin, end and pieces between them, size, time of change; a byte between the pieces alone is not noticed.

    The smallest files count with their content still.
    """
    whole = weights_sum(directory)
    monkeypatch.setattr(identity, "_WHOLE", 1006)  # 1,000 bytes and three times two
    assert weights_sum(directory) == whole
    monkeypatch.setattr(identity, "_WHOLE", 1005)
    monkeypatch.setattr(identity, "_PIECES", 4)
    monkeypatch.setattr(identity, "_PIECE", 10)
    weights = directory / "model.safetensors"
    before = weights_sum(directory)
    for at in (0, 9, 330, 339, 660, 669, 990, 999):
        change(weights, at)
        assert weights_sum(directory) != before
        change(weights, at)
    for at in (10, 329, 340, 989):
        change(weights, at)
        assert weights_sum(directory) == before
    change(directory / "tokenizer.json", 1)
    assert weights_sum(directory) != before
    change(directory / "tokenizer.json", 1)
    assert weights_sum(directory) == before
    old = weights.stat().st_mtime_ns
    os.utime(weights, ns=(old, old + 1))
    assert weights_sum(directory) != before
    weights.write_bytes(weights.read_bytes()[:500] + weights.read_bytes()[499:])
    os.utime(weights, ns=(old, old))
    assert weights_sum(directory) != before


def test_a_place_without_weights_is_told(tmp_path: Path) -> None:
    """A folder with neither a manifest nor files of a model."""
    with pytest.raises(SourceError, match=r"has no manifest.json, and none of \*.safetensors"):
        weights_sum(tmp_path)
