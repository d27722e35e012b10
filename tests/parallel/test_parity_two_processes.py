"""A model split over two tensor-parallel processes computes what transformers computes."""

import json
from pathlib import Path

import pytest
import torch
from model.test_positions import KINDS, drawn_ids, rules_of, small
from support.forked import run_job
from support.models import FUSED, FUSED_SEQUENCE, MODELS, VOCAB

from megatron_sep.model.build import build_model
from megatron_sep.parallel.groups import topology


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes found."""
    out = tmp_path_factory.mktemp("two") / "differences.json"
    run_job(2, Path(__file__).with_name("parity_two_processes.py"), out, folder=out.parent)
    return out


def test_logits_and_gradients_equal_transformers_on_two_processes(out: Path) -> None:
    """Every family and variant whose heads divide: logits and every gradient within 1e-5 on both ranks."""
    found = json.loads(out.read_text())
    assert found.keys() == {
        FUSED,
        FUSED_SEQUENCE,
        *(name for name, config in MODELS.items() if config.key_value_heads % 2 == 0),
    }
    assert len(found) == 9
    for model, differences in found.items():
        config = MODELS["neox" if model in (FUSED, FUSED_SEQUENCE) else model]
        weights = config.num_layers * (12 if config.biases else 6) + (4 if config.biases else 3 - config.tie_embeddings)
        assert len(differences) == 1 + weights, model
        worst = max(differences, key=lambda name: differences[name])
        assert differences[worst] < 1, (model, worst, differences[worst])


@pytest.mark.usefixtures("single_process")
@torch.no_grad()
def test_positions_are_those_of_one_process(out: Path) -> None:
    """Each rank has the slopes of its own heads: the logits of every kind of position within 1e-5."""
    found = json.loads(out.with_suffix(".positions.json").read_text())
    ids = drawn_ids().to(topology().device)
    for kind, settings in KINDS.items():
        config = small(**settings)
        model = build_model(config, topology(), vocab_size=VOCAB, precision="fp32", seed=7, backend="reference").eval()
        rules = rules_of(config)
        expected = model(ids, rules.positions(ids), rules.plans(ids))
        torch.testing.assert_close(torch.tensor(found[kind]), expected.cpu(), rtol=1e-5, atol=1e-5, msg=kind)
