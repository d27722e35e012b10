"""A run directory of GPT-NeoX goes on here: a stand-in of its layout, made of a run whose continuation is known."""

import json
import random
import shutil
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.disk import Bomb
from torch import Tensor

from megatron_sep.config import ConfigError, RunConfig
from megatron_sep.config.load import neox_yaml
from megatron_sep.config.load import sketch_config as sketched
from megatron_sep.config.neox_run import neox_run
from megatron_sep.model.init import global_parameters
from megatron_sep.parallel.groups import topology
from megatron_sep.train.loop import train
from megatron_sep.train.run import build_run
from megatron_sep.weights.names import to_hugging_face
from megatron_sep.weights.tensor_files import WeightsError

pytestmark = pytest.mark.usefixtures("single_process")
KINDS = ("param", "exp_avg", "exp_avg_sq")
STEP = 2


def neox_name(name: str, layers: int) -> str:
    """A parameter of the pipeline, LAYER.key, from Hugging Face's name."""
    outer = {"gpt_neox.embed_in": "0.word_embeddings", "embed_out": f"{layers + 4}.final_linear"}
    outer["gpt_neox.final_layer_norm"] = f"{layers + 3}.norm"
    module, _, part = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{part}"
    number, _, key = name.removeprefix("gpt_neox.layers.").partition(".")
    return f"{int(number) + 2}.{key}"


def states_of(config: RunConfig) -> dict[str, dict[str, Tensor]]:
    """fp32 weights and moments at the newest checkpoint of a run, under the pipeline's names."""
    run = build_run(config, topology())
    assert run.state.step == STEP
    engine: Any = run.engine
    slots, found = engine.optimizer_slots(), {}
    for kind in KINDS:
        named = {
            name: slots[p].tensors[kind].view(p.shape).clone()
            for name, p in global_parameters(engine._weights[0], config.model, topology())
        }
        theirs = to_hugging_face(named, config.model)
        found[kind] = {neox_name(name, config.model.num_layers): tensor for name, tensor in theirs.items()}
    return found


def write_neox(folder: Path, config: RunConfig, states: dict[str, dict[str, Tensor]], ranks: int) -> Path:
    """Layers, the model's state, one optimizer file a rank, `latest` and the YAML."""
    checkpoint = folder / f"global_step{STEP}"
    (checkpoint / "configs").mkdir(parents=True)
    (folder / "latest").write_text(f"global_step{STEP}\n")
    ours = folder / "ours.yaml"
    ours.write_text(json.dumps(config.model_dump(mode="json")))
    (checkpoint / "configs" / "run.yml").write_text(neox_yaml(sketched(ours)))
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in states["param"].items():
        number, _, key = name.partition(".")
        layers.setdefault(number, {})[key] = tensor
    for number, tensors in layers.items():
        torch.save(tensors, checkpoint / f"layer_{int(number):02d}-model_00-model_states.pt")
    groups = [[n for n, t in states["param"].items() if (t.dim() > 1) == decays] for decays in (True, False)]
    shapes = [{name: states["param"][name].shape for name in group} for group in groups]
    client = {"iteration": STEP, "np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}
    torch.save({"param_shapes": shapes, **client}, checkpoint / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        parts = {kind: [part_of(states[kind], group, rank, ranks) for group in groups] for kind in KINDS}
        adam = [{"exp_avg": parts["exp_avg"][g], "exp_avg_sq": parts["exp_avg_sq"][g]} for g in (0, 1)]
        base = {"state": dict(enumerate(adam)), "param_groups": [{"step": STEP}, {"step": STEP}]}
        optimizer = {"zero_stage": 1, "base_optimizer_state": base, "single_partition_of_fp32_groups": parts["param"]}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.12"}, checkpoint / name)
    return checkpoint


def part_of(tensors: dict[str, Tensor], group: list[str], rank: int, ranks: int) -> Tensor:
    """A rank's part of a group, padded to parts of one length."""
    flat = torch.cat([tensors[name].flatten() for name in group])
    size = -(-len(flat) // ranks)
    return torch.nn.functional.pad(flat, (0, size * ranks - len(flat)))[rank * size : (rank + 1) * size].clone()


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[RunConfig, dict[str, dict[str, Tensor]]]:
    """A run of four steps, and its state after the second."""
    folder = tmp_path_factory.mktemp("known")
    tree: dict[str, Any] = {
        "dir": str(folder / "run"),
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "sequence_length": 64},
        "attention": {"window": 8, "sinks": 2, "separator_ids": [5, 9, 11], "full_layers": [0]},
        "tokenizer": {"path": str(corpus / "tokenizer.json")},
        "data": {"path": str(corpus / "corpus"), "split": [0.9, 0.1, 0], "order": "neox"},
        "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "eval_every": 0},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup": 0.2},
        "checkpoint": {"every": STEP},
        "metrics": {"every": 1},
    }
    config = RunConfig.model_validate(tree)
    train(build_run(config, topology()))
    half = RunConfig.model_validate(tree | {"dir": str(folder / "half")})
    shutil.copytree(config.dir, half.dir)
    shutil.rmtree(half.dir / "checkpoints" / "step-00000004")
    return config, states_of(half)


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_goes_on_as_the_run_that_was_not_interrupted(
    known: Any, ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same losses to the bit in steps 3 and 4: weights, moments, rate, and the next samples of GPT-NeoX's order."""
    config, states = known
    write_neox(tmp_path / "neox", config, states, ranks)
    before = sorted(path.name for path in (tmp_path / "neox").rglob("*"))
    asked = neox_run(tmp_path / "neox", [f"dir={tmp_path / 'on'}"])
    assert (asked.checkpoint.init_step, asked.checkpoint.init_optimizer) == (STEP, True)
    train(build_run(asked, topology()))
    whole = losses(config.dir)
    assert losses(tmp_path / "on") == {step: whole[step] for step in (3, 4)}
    assert "weights, AdamW's moments and steps" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "neox").rglob("*")) == before


def test_the_global_batch_is_that_of_the_ranks_that_wrote_it(known: Any, tmp_path: Path) -> None:
    """A file that says only what a rank takes: two optimizer files, so two ranks."""
    config, states = known
    checkpoint = write_neox(tmp_path / "neox", config, states, 2)
    file = checkpoint / "configs" / "run.yml"
    kept = [line for line in file.read_text().splitlines() if not line.startswith("train_batch_size")]
    file.write_text("\n".join([*kept, "gas: 3", "load: somewhere/else"]))
    asked = neox_run(tmp_path / "neox", [f"dir={tmp_path / 'on'}", "checkpoint.init_optimizer=false"])
    assert asked.train.global_batch_size == 2 * 3 * 2
    assert not asked.checkpoint.init_optimizer


def test_what_is_missing_or_strange_is_said_before_training(known: Any, tmp_path: Path) -> None:
    """No code of a file runs; a rank's file that is gone, another kind of optimizer, no dir, no `latest`."""
    config, states = known
    checkpoint = write_neox(tmp_path / "neox", config, states, 3)
    on = f"dir={tmp_path / 'on'}"
    with pytest.raises(ConfigError, match=r"pass dir=\.\.\., where the run goes on"):
        neox_run(tmp_path / "neox", [])
    asked = neox_run(checkpoint, [on])
    middle, last = (checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (1, 2))
    aside, other = checkpoint / "aside", checkpoint / f"bf16_{last.name}"
    for broken, message in (
        (lambda: last.rename(aside), "need .*: files of some ranks are missing"),
        (lambda: (aside.rename(last), middle.rename(aside)), r"has the ranks \[0, 2\] .*one is missing"),
        (lambda: (aside.rename(middle), last.rename(other)), "DeepSpeed's bf16 optimizer"),
        (lambda: (other.rename(last), torch.save(Bomb(tmp_path / "c"), last)), "is damaged, or holds something"),
    ):
        broken()
        with pytest.raises(WeightsError, match=message):
            build_run(asked, topology())
    assert not (tmp_path / "c").exists()
    (tmp_path / "neox" / "latest").write_text("global_step9")
    with pytest.raises(ConfigError, match="names 'global_step9'"):
        neox_run(tmp_path / "neox", [on])


def test_parts_are_padded_and_no_value_is_lost() -> None:
    """The stand-in itself: parts of one length that hold every value."""
    tensors = {"a": torch.arange(5.0), "b": torch.arange(6.0).view(2, 3)}
    parts = [part_of(tensors, ["a", "b"], rank, 4) for rank in range(4)]
    assert [len(part) for part in parts] == [3] * 4
    assert torch.cat(parts)[: sum(prod(t.shape) for t in tensors.values())].tolist() == [*range(5), *range(6)]
