"""Holds every model against transformers in a job of two tensor-parallel processes.

torchrun --nproc-per-node 2 tests/parallel/parity_two_processes.py OUT.json

OUT.json: for each model, its logits and each gradient, the largest difference in units of 1e-5 x (1 + |expected|).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model.test_positions import KINDS, drawn_ids, rules_of, small
from support.models import (
    FUSED,
    FUSED_ROWS,
    FUSED_SEQUENCE,
    LAYERS,
    LENGTH,
    MODELS,
    VOCAB,
    from_hugging_face,
    hugging_face,
    on_disk,
    ours,
    with_masks,
)
from torch import Tensor

from megatron_sep.attention.layers import layer_patterns, plan_layers
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config.schema import ModelConfig, ParallelConfig
from megatron_sep.kernels.sep_attention.index import indexed_layers
from megatron_sep.model.build import build_model
from megatron_sep.parallel.groups import join_job, set_layout
from megatron_sep.parallel.topology import Topology

PATTERNS = layer_patterns(AttentionPattern(6, 3, (5, 9, 77, 101, 102, 103)), LAYERS, (0, -1))


def main() -> None:
    torch.set_num_threads(1)
    join_job(timeout_minutes=2)
    topology = set_layout(ParallelConfig(tensor=2), seed=1)
    names = [name for name, config in MODELS.items() if config.key_value_heads % 2 == 0]
    here = {name: differences(MODELS[name], topology) for name in names}
    here[FUSED] = differences(MODELS["neox"], topology, other_backends=FUSED_ROWS)
    here[FUSED_SEQUENCE] = differences(MODELS["neox"], topology, other_backends=FUSED_ROWS, sequence_parallel=True)
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, here)
    if topology.first:
        worst = {n: {key: max(rank[n][key] for rank in everywhere) for key in here[n]} for n in here}
        Path(sys.argv[1]).write_text(json.dumps(worst))
    logits: list[Any] = [None, None]
    dist.all_gather_object(logits, {kind: position_logits(kind, topology) for kind in KINDS})
    if topology.first:
        joined = {kind: torch.cat([rank[kind] for rank in logits], -1).tolist() for kind in KINDS}
        Path(sys.argv[1]).with_suffix(".positions.json").write_text(json.dumps(joined))


def position_logits(kind: str, topology: Topology) -> Tensor:
    """This rank's columns of the logits of a model with other positions, from weights that any layout has."""
    config = small(**KINDS[kind])
    model = build_model(config, topology, vocab_size=VOCAB, precision="fp32", seed=7, backend="reference").eval()
    ids, rules = drawn_ids().to(topology.device), rules_of(config)
    with torch.no_grad():
        logits: Tensor = model(ids, rules.positions(ids), indexed_layers(rules.plans(ids)))
    return logits.cpu()


def differences(config: ModelConfig, topology: Topology, **settings: Any) -> dict[str, float]:
    """Of this rank's part of the logits and of every gradient."""
    from megatron_sep.model.init import global_parameters, local_part

    theirs = hugging_face(config)
    model = ours(theirs, config, **settings)
    ids = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    labels, position, plans = ids.roll(-1, 1), torch.arange(LENGTH)[None], plan_layers(PATTERNS, ids)
    with_masks(theirs, plans)
    expected = theirs(ids).logits
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    here = [tensor.to(topology.device) for tensor in (ids, position)]
    plans = indexed_layers(plan_layers(PATTERNS, here[0]))
    found = {"logits": off(model(*here, plans), expected.chunk(2, -1)[topology.tensor.rank])}
    model(*here, plans, labels=labels.to(topology.device)).mean().backward()
    gradients = from_hugging_face(on_disk({n: p.grad for n, p in theirs.named_parameters()}, config), config)
    for name, parameter in global_parameters(model, config, topology):
        part = local_part(name, gradients[name], parameter, config, topology.tensor)
        if getattr(parameter, "sequence_parallel", False):  # each rank has the share of its tokens
            dist.all_reduce(parameter.grad, group=topology.tensor_group)
        found[name] = off(parameter.grad, part)
    return found


def off(found: Tensor, expected: Tensor) -> float:
    return float(((found.cpu() - expected).abs() / (1 + expected.abs())).max()) / 1e-5


if __name__ == "__main__":
    main()
