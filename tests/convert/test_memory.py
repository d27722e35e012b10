"""A conversion holds one group of tensors at a time, however many layers a checkpoint has."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.cases import full_run
from support.disk import hugging_face_dir, neox_layers
from support.engines import WeightsOnly
from support.models import VOCAB, hugging_face, neox_config, ours

from megatron_sep.config import RunConfig
from megatron_sep.config.schema import ModelConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.convert.convert import convert
from megatron_sep.parallel.groups import topology
from megatron_sep.train.checkpoint import Checkpoints
from megatron_sep.weights.sealed import Description, TrainState

pytestmark = pytest.mark.usefixtures("single_process")

SHAPE = ModelConfig(num_layers=12 if full_run() else 6, hidden_size=640, num_attention_heads=8, sequence_length=64)
GROUP = 4 * ModelSize(SHAPE, VOCAB).layer_matrices
"""Bytes of a layer, the largest group: 18.75 MiB of fp32."""
PROGRAM = """
import re, sys
from pathlib import Path
from megatron_sep.convert.convert import convert

def resident(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

small, src, dst, *config = map(Path, sys.argv[1:])
convert(small, dst / "small")  # whatever is imported on the way is there now
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
convert(src, dst / "large", *config)
print(resident("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights as every kind of source, 225 MiB each or half of it, and a small model."""
    folder = tmp_path_factory.mktemp("large")
    hugging_face_dir(folder / "small", neox_config())
    hugging_face_dir(folder / "hugging face", SHAPE, shard="20MB")
    neox_layers(folder / "layers", SHAPE, 2)
    convert(folder / "hugging face", folder / "converted")
    (folder / "layers.yaml").write_text(
        "dir: x\ntokenizer: {path: x}\ndata: {path: x}\n"
        f"model: {{num_layers: {SHAPE.num_layers}, hidden_size: 640, num_attention_heads: 8, sequence_length: 64}}\n"
    )
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def sources(folder: Path, tiny: Callable[..., RunConfig]) -> Path:
    """The same with the weights of a checkpoint as training writes it, which stacks the layers."""
    config = tiny(dir=str(folder / "trained"), model=SHAPE.model_dump())
    if not config.dir.exists():
        model = ours(hugging_face(SHAPE), SHAPE)
        described = Description(TrainState(), config, VOCAB, WeightsOnly.name)
        Checkpoints(config.dir, None, topology()).begin(described, WeightsOnly(model)).finish()
    return folder


@pytest.mark.parametrize("kind", ["hugging face", "converted", "trained", "layers"])
def test_twice_the_largest_group_is_enough(kind: str, sources: Path, tmp_path: Path) -> None:
    """Into ours from safetensors and from layer files of two parts, and out of both kinds of checkpoint of ours.

    Beside it there is the loaded shard: all files but training's are mapped, and hold one group each.
    """
    config = [sources / "layers.yaml"] if kind == "layers" else []
    needed = peak(sources / "small", sources / kind, tmp_path, *config)
    assert (tmp_path / "large").is_dir()
    shutil.rmtree(tmp_path / "large")
    shard = 0 if kind == "trained" else GROUP
    assert needed - shard < 2 * GROUP, f"{(needed - shard) / GROUP:.2f} groups"


def peak(*arguments: Path) -> int:
    """Bytes by which the resident memory of a process that converts grows at most, mapped files included.

    glibc keeps freed blocks for later up to a size that grows to 32 MiB. Pythia-12b's tensors are larger and go back at
    once; so do those of this model, with the limit at 1 MiB.
    """
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120, env=env)
    return int(done.stdout.splitlines()[-1])
