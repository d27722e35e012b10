"""An exported directory runs in transformers: as GPTNeoX or Llama, and as SepLLM with its own code alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import trained_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sep.config import RunConfig
from megatron_sep.convert.check import differences
from megatron_sep.convert.convert import convert
from megatron_sep.parallel.groups import topology
from megatron_sep.weights.hugging_face import read_config
from megatron_sep.weights.open_source import open_source

pytestmark = pytest.mark.usefixtures("single_process")

LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "biases": False,
    "parallel_residual": False,
    "rotary_fraction": 1.0,
    "num_key_value_heads": 2,
    "rotary_scaling": {"factor": 4.0, "original_length": 32},
}
PROGRAM = """
import json, sys
sys.modules["megatron_sep"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :40], use_cache=True)
    then = model(ids[:, 40:], past_key_values=first.past_key_values).logits
    padded = torch.cat([torch.zeros(len(ids), 5, dtype=torch.long), ids], 1)
    real = torch.cat([torch.zeros(len(ids), 5, dtype=torch.long), torch.ones_like(ids)], 1)
    left = model(padded, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits[:, 5:]
made = model.generate(ids[:1], max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
again = model.generate(ids[:1], max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
print(json.dumps({"kind": type(model).__name__, "whole": whole.tolist(), "rest": then.tolist(), "left": left.tolist(),
                  "made": made.tolist(), "again": again.tolist()}))
"""


@pytest.fixture(params=[{}, LLAMA], ids=["neox", "llama"])
def exported(request: pytest.FixtureRequest, tiny: Callable[..., RunConfig], tmp_path: Path) -> tuple[RunConfig, Path]:
    """A trained run, H with documents kept apart, and its export."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    config = tiny(model=request.param, attention={"document_boundaries": True}, train={"steps": 2, "eval_every": 0})
    train(build_run(config, topology()))
    convert(config.dir, tmp_path / "export")
    return config, tmp_path / "export"


def test_its_own_code_computes_sep_attention_without_this_package(exported: tuple[RunConfig, Path]) -> None:
    """At once, in two parts through the cache, and padded on the left: the logits of the trained model within 1e-5."""
    config, folder = exported
    ids = torch.randint(1, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    ids[0, 20] = 0  # the end of a document
    told: dict[str, Any] = json.loads(
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(folder), json.dumps(ids.tolist())],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
        ).stdout.splitlines()[-1]
    )
    expected = trained_logits(config, ids)
    assert told["kind"].startswith("Sep")
    for part, found in (("whole", expected), ("rest", expected[:, 40:]), ("left", expected)):
        got = torch.tensor(told[part])
        torch.testing.assert_close(got, found, atol=1e-5, rtol=1e-5, msg=lambda m, p=part: f"{p}: {m}")
    assert told["made"] == told["again"]


def test_transformers_alone_loads_it_with_full_attention(exported: tuple[RunConfig, Path]) -> None:
    """Without remote code it is a plain GPTNeoX or Llama with its tokenizer; config.json still tells the pattern."""
    config, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(model).__name__ in ("GPTNeoXForCausalLM", "LlamaForCausalLM")
    assert model.config.sep_attention["window"] == config.attention.window
    assert len(model.config.sep_attention["separator_ids"]) == 9
    attention = read_config(folder)[1]
    assert (attention.sinks, attention.full_layers, attention.document_boundaries) == (2, (0,), True)
    assert AutoTokenizer.from_pretrained(folder)("one two").input_ids


def test_the_rule_that_is_shipped_is_the_rule(exported: tuple[RunConfig, Path]) -> None:
    """The export holds attention/pattern.py itself, so nothing can differ."""
    from megatron_sep.attention import pattern

    assert (exported[1] / "sep_pattern.py").read_bytes() == Path(pattern.__file__).read_bytes()


def test_its_files_are_for_everybody_and_its_card_tells_the_rest(exported: tuple[RunConfig, Path]) -> None:
    """Mode 0644 whatever wrote them; the pattern, what was measured, and code that names the files there are."""
    config, folder = exported
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"- the newest {config.attention.window} tokens, itself included" in card
    assert "- the first 2 tokens of the document\n- every separator" in card
    assert "Layers 0 see every earlier token." in card
    lines = [json.loads(line) for line in (config.dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert f"| training loss, nats a token | {losses[-1]:.4g} |" in card
    assert {name for name in card.split("`") if name.endswith(".py")} == {path.name for path in folder.glob("*.py")}


def test_saved_again_it_is_the_same_model(exported: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """Loaded and saved by transformers and loaded again, 80 tokens with a small cache are those of no cache at all."""
    first = AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=True)
    first.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    options: dict[str, Any] = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    made = again.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(made.sequences, first.eval().generate(ids, use_cache=False, **options))
    full, windowed = (layer.keys.shape[-2] for layer in made.past_key_values.layers[:2])
    assert windowed < full == 99


def test_check_compares_the_pattern_too(exported: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """Out and in again both differences are under 1e-5; with another window in config.json, that of the pattern is not.

    The sources are a run's dir with H and kept-apart documents, and its export.
    """
    config, folder = exported
    found = [differences(open_source(config.dir), folder, topology())]
    convert(folder, tmp_path / "again")
    found.append(differences(open_source(folder), tmp_path / "again", topology()))
    for each in found:
        assert each.full < 1e-5
        assert each.sep < 1e-5
        assert str(each).endswith(f"with full attention {each.full:.3g}; under the attention pattern {each.sep:.3g}")
    settings = json.loads((folder / "config.json").read_text())
    settings["sep_attention"]["window"] += 1
    (folder / "config.json").write_text(json.dumps(settings))
    other = differences(open_source(config.dir), folder, topology())
    assert other.full == found[0].full
    assert other.sep > 1e-4
