"""Trains a tiny model, saves it and goes on from there: what test_optimizer starts where packages are installed.

    python optimizer_run.py FOLDER ROW:NEXT ...

ROW and NEXT are rows of ``adamw``, as a GPU would take them: before and after the checkpoint. Prints what was found of
each pair as JSON.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core.optimizer
import torch
from torch import Tensor

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import LossScaleConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.registry import OPERATIONS
from megatron_sep.model.build import build_model
from megatron_sep.parallel.groups import process_groups, topology
from megatron_sep.train.megatron_engine import MegatronEngine
from megatron_sep.train.microbatch import Microbatch

LENGTH, VOCAB = 16, 64
CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, sequence_length=LENGTH)
RULES = LayerRules(layer_patterns(AttentionPattern(4), 2), AttentionPattern(), None)


def engine(row: str) -> MegatronEngine:
    """A new one, of the same first weights."""
    model = build_model(CONFIG, topology(), vocab_size=VOCAB, precision="bf16", seed=1)
    adamw = OPERATIONS["adamw"].resolve(Call("cuda", torch.bfloat16, (9, 0)), row)
    model.operations = replace(model.operations, adamw=adamw)
    settings = {"loss_scale": LossScaleConfig(), "sequence_length": LENGTH, "micro_batch_size": 4}
    return MegatronEngine(model, topology(), OptimizerConfig(), precision="bf16", **settings)


def train(of: MegatronEngine, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, VOCAB, (4, LENGTH + 1), generator=generator)
        of.forward_backward([Microbatch.of(rows, RULES, topology().device)], 1)
        assert of.step(1e-2).grad_norm.isfinite()


def library(kind: type) -> str:
    return kind.__module__.split(".")[0]


def weights(of: MegatronEngine) -> list[Tensor]:
    """In fp32."""
    return [parameter.detach() for group in of._optimizer.param_groups for parameter in group["params"]]


def digest(of: MegatronEngine) -> str:
    """Of the fp32 weights and their moments."""
    sha = hashlib.sha256()
    states = of._optimizer.optimizer.state.values()
    for tensor in (*weights(of), *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))):
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def found(folder: Path, row: str, following: str) -> dict[str, Any]:
    """Five steps without a break, and with a checkpoint after three."""
    whole, half, resumed = engine(row), engine(row), engine(following)
    train(whole, range(5))
    train(half, range(3))
    folder.mkdir()
    half.begin_save(folder).finish()
    resumed.load(folder)
    train(resumed, range(3, 5))
    return {
        "taken": [library(type(of._optimizer.optimizer)) for of in (whole, resumed)],
        "fused": [group.get("fused") for group in resumed._optimizer.param_groups],
        "digests": [digest(of) for of in (whole, resumed)],
        "norms": [[weight.double().norm().item() for weight in weights(of)] for of in (whole, resumed)],
    }


def main(folder: Path, pairs: list[str]) -> None:
    by_pair = {pair: found(folder / str(n), *pair.split(":")) for n, pair in enumerate(pairs)}
    print(json.dumps(by_pair | {"megatron-core": library(megatron.core.optimizer.Adam)}))


if __name__ == "__main__":
    with process_groups(ParallelConfig(), seed=1):
        main(Path(sys.argv[1]), sys.argv[2:])
