"""A conversion loses nothing: there and back, every tensor is bit-identical, and both models compute the same."""

import json
from pathlib import Path

import pytest
import torch
from support.disk import as_bin, hugging_face_dir, neox_layers, stored
from support.models import MODELS, hugging_face, llama_config, neox_config

from megatron_sep.convert.check import Differences, differences
from megatron_sep.convert.convert import ConvertError, convert
from megatron_sep.parallel.groups import topology
from megatron_sep.weights.sealed import fault_of

pytestmark = pytest.mark.usefixtures("single_process")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def assert_no_difference(found: Differences, sep: bool) -> None:
    assert found.full < 1e-5
    assert (found.sep is not None) == sep
    assert found.sep is None or found.sep < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_to_ours_and_back_is_bit_identical(name: str, tmp_path: Path) -> None:
    """Every family and variant; the logits of both models agree within 1e-5 on the way there and on the way back."""
    theirs = hugging_face_dir(tmp_path / "theirs", MODELS[name])
    source = convert(theirs, tmp_path / "ours")
    assert fault_of(tmp_path / "ours") is None
    assert_no_difference(differences(source, tmp_path / "ours", topology()), sep=False)
    back = convert(tmp_path / "ours", tmp_path / "back")
    assert_no_difference(differences(back, tmp_path / "back", topology()), sep=False)
    assert_same(stored(theirs), stored(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "ours again")
    assert_same(stored(tmp_path / "ours"), stored(tmp_path / "ours again"))


def test_shards_and_pickles_hold_the_same(tmp_path: Path) -> None:
    """Sharded safetensors and one pytorch_model.bin give the same checkpoint as one file of safetensors."""
    for name, shard in (("whole", "5GB"), ("shards", "100KB"), ("bin", "5GB")):
        folder = hugging_face_dir(tmp_path / name, llama_config(), shard)
        convert(as_bin(folder) if name == "bin" else folder, tmp_path / f"ours {name}")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for name in ("shards", "bin"):
        assert_same(stored(tmp_path / "ours whole"), stored(tmp_path / f"ours {name}"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """The bits of fp16 and bf16 weights, there and back; config.json names the type."""
    hugging_face(neox_config()).to(dtype).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same(stored(tmp_path / "theirs"), stored(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(dtype)[6:]


@pytest.mark.parametrize("parallel_residual", [True, False])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_neox_layers_of_any_degree_become_the_whole(degree: int, parallel_residual: bool, tmp_path: Path) -> None:
    """Columns, rows, copies and the biases that ranks add: joined, they are the weights that were cut."""
    config = neox_config(parallel_residual)
    folder, whole = neox_layers(tmp_path / "layers", config, degree)
    (tmp_path / "neox.yml").write_text(
        json.dumps(
            {
                "num-layers": 4,
                "hidden-size": 64,
                "num-attention-heads": 4,
                "seq-length": 48,
                "pos-emb": "rotary",
                "rotary-pct": 0.25,
                "no-weight-tying": True,
                "gpt-j-residual": parallel_residual,
                "model-parallel-size": degree,
            }
        )
    )
    source = convert(folder, tmp_path / "ours", tmp_path / "neox.yml")
    assert_no_difference(differences(source, tmp_path / "ours", topology()), sep=False)
    convert(tmp_path / "ours", tmp_path / "theirs")
    assert_same(whole, stored(tmp_path / "theirs"))


def test_layers_are_read_by_gpt_neox_s_defaults(tmp_path: Path) -> None:
    """What their YAML leaves out is a sequential residual and heads that rotate whole; nothing of training is asked."""
    folder, whole = neox_layers(tmp_path / "layers", neox_config(parallel_residual=False, rotary=1.0), degree=1)
    shape = {"num-layers": 4, "hidden-size": 64, "num-attention-heads": 4, "pos-emb": "rotary", "no-weight-tying": True}
    (tmp_path / "neox.yml").write_text(json.dumps(shape))
    source = convert(folder, tmp_path / "ours", tmp_path / "neox.yml")
    assert (source.config.rotary_fraction, source.config.parallel_residual) == (1.0, False)
    convert(tmp_path / "ours", tmp_path / "theirs")
    assert_same(whole, stored(tmp_path / "theirs"))
    del shape["hidden-size"]
    (tmp_path / "half.yml").write_text(json.dumps(shape))
    with pytest.raises(ConvertError, match=r"half.yml: does not say model.hidden_size \(hidden_size\)"):
        convert(folder, tmp_path / "other", tmp_path / "half.yml")
