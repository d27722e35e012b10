"""A run that an older version began goes on: the checkpoint in tests/fixtures was written by version 0.1.0."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saved import saved_tensors

from megatron_sep.config import RunConfig, load_config
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl
from megatron_sep.weights.open_source import open_source
from megatron_sep.weights.sealed import CheckpointError, describe, fault_of, newest_verified

pytestmark = pytest.mark.usefixtures("single_process")

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-of-format-1"
MOVED = ("data.path", "tokenizer.path")
"""The older version wrote down no sums of what lies there."""
EXACT = ("train/lr", "train/consumed", "train/skipped", "attention/visible", "attention/separator_density")
CLOSE = ("train/loss", "train/grad_norm", "valid/loss")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """The run's configuration, on a copy of it."""
    folder = tmp_path / "run"
    shutil.copytree(FIXTURE, folder)
    paths = [f"dir={folder}", f"tokenizer.path={folder / 'tokenizer.json'}", f"data.path={folder / 'corpus'}"]
    return load_config(folder / "run.yaml", [*paths, "optimizer.decay_steps=8", "checkpoint.keep=null"])


def build(config: RunConfig) -> "Run":  # noqa: F821
    from megatron_sep.train.run import build_run

    return build_run(config, topology(), MOVED)


def sums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each tensor's bytes."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in saved_tensors(checkpoint).items()
    }


def test_what_is_loaded_is_what_was_saved_bit_for_bit(config: RunConfig) -> None:
    """Weights, both moments and the step survive being loaded and saved again, in today's format."""
    old = newest_verified(config.dir / "checkpoints")
    assert old is not None
    assert "format" not in json.loads((old / "manifest.json").read_text())
    run = build(config)
    assert (run.state.step, run.state.consumed) == (4, 16)
    shutil.rmtree(old)
    run.save()
    new = newest_verified(config.dir / "checkpoints")
    assert new is not None
    assert json.loads((new / "manifest.json").read_text())["format"] == 3
    assert fault_of(new) is None
    assert sums(new) == json.loads((FIXTURE / "sums.json").read_text())


def test_it_trains_on_as_the_older_version_did(config: RunConfig) -> None:
    """Steps 5 to 8 have the data, the rates and, to the rounding of another processor, the losses of that version."""
    from megatron_sep.train.loop import train

    train(build(config))
    expected = read_jsonl(FIXTURE / "after.jsonl")
    found = [line for line in read_jsonl(config.dir / "metrics.jsonl") if line["step"] > 4 and "time/save" not in line]
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [5, 6, 7, 8, 8]
    for new, old in zip(found, expected, strict=True):
        assert {k: new[k] for k in EXACT if k in old} == {k: old[k] for k in EXACT if k in old}
        for key in CLOSE:
            assert new.get(key) == (pytest.approx(old[key], rel=1e-5) if key in old else None), (new["step"], key)


def test_its_weights_are_opened_too(config: RunConfig) -> None:
    """Conversion and inference read an older checkpoint by its upgraded manifest."""
    source = open_source(config.dir)
    assert source.config.vocab_size == 384
    assert describe(source.place).engine == "megatron"
    assert sum(len(group) for group in source) == 2 * 12 + 4


def test_a_setting_that_moved_is_found_where_it_was(config: RunConfig) -> None:
    """Format 2 had the engine under `train`: it is read, and the run goes on."""
    path = newest_verified(config.dir / "checkpoints")
    assert path is not None
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["description"]["engine"] = "megatron"
    manifest["description"]["config"]["train"]["engine"] = "megatron"
    rewrite(path, manifest | {"format": 2})
    assert describe(path).config.parallel.engine == "megatron"
    assert build(config).state.step == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 4}, r"has format 4, this version reads 1 to 3; use the version of megatron_sep that wrote it"),
        ({"format": 2}, r"says nothing of its engine"),
        ({"format": 2, "description": {}}, r"says nothing of its config"),
    ],
)
def test_a_manifest_that_is_not_known_is_refused_by_name(
    config: RunConfig, change: dict[str, Any], message: str
) -> None:
    """A newer format, and one that claims to be of today and lacks what today's has."""
    path = newest_verified(config.dir / "checkpoints")
    assert path is not None
    rewrite(path, json.loads((path / "manifest.json").read_text()) | change)
    with pytest.raises(CheckpointError, match=message):
        describe(path)


def rewrite(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Give a checkpoint another manifest, with its sum."""
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    (checkpoint / "manifest.sha256").write_text(digest)
