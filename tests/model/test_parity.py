"""The model computes what transformers computes from the same weights: GPTNeoXForCausalLM and LlamaForCausalLM."""

from typing import Any

import pytest
import torch
from support.models import LAYERS, LENGTH, MODELS, VOCAB, hugging_face, on_disk, ours, with_masks
from torch import Tensor

from megatron_sep.attention.layers import layer_patterns, plan_layers
from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.parallel.groups import topology
from megatron_sep.weights.names import to_hugging_face

pytestmark = pytest.mark.usefixtures("single_process")

SEPARATORS = (5, 9, 77, 101, 102, 103)
PATTERNS = {
    "full": layer_patterns(AttentionPattern(), LAYERS),
    "sep, first and last layer full": layer_patterns(AttentionPattern(6, 3, SEPARATORS), LAYERS, (0, -1)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_and_gradients_equal_transformers(pattern: str, name: str) -> None:
    """Logits, and every gradient of the mean loss, agree within 1e-5."""
    config = MODELS[name]
    theirs = hugging_face(config)
    model = ours(theirs, config)
    ids = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    plans = plan_layers(PATTERNS[pattern], ids)
    with_masks(theirs, plans)

    expected = theirs(ids).logits
    found = model(ids, torch.arange(LENGTH)[None], plans)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    labels = ids.roll(-1, 1)
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    model(ids, torch.arange(LENGTH)[None], plans, labels=labels).mean().backward()
    expected_grads = on_disk({name: p.grad for name, p in theirs.named_parameters()}, config)
    found_grads = to_hugging_face({name: p.grad for name, p in model.named_parameters()}, config)
    assert found_grads.keys() == expected_grads.keys()
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(found_grads[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["neox", "llama, grouped heads, scaled rotation"])
def test_recompute_changes_no_gradient_with_dropout(name: str) -> None:
    """Recomputed layers and attention draw the same dropout: gradients are bit-equal to those of kept activations."""
    config = MODELS[name]
    theirs = hugging_face(config)
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    plans = plan_layers(PATTERNS["sep, first and last layer full"], ids)
    gradients = [
        gradients_with_dropout(ours(theirs, config, recompute=recompute), ids, plans)
        for recompute in (False, True, "selective")
    ]
    for name, kept in gradients[0].items():
        assert all(torch.equal(kept, recomputed[name]) for recomputed in gradients[1:]), name


def gradients_with_dropout(model: Any, ids: Tensor, plans: tuple[MaskPlan, ...]) -> dict[str, Tensor]:
    from megatron_sep.parallel.seeds import seed_dropout

    for layer in model.decoder.layers:
        layer.hidden_dropout = 0.1
        layer.self_attention.core_attention.dropout = 0.1
    seed_dropout(topology(), 7, step=1)
    model(ids, torch.arange(LENGTH)[None], plans, labels=ids.roll(-1, 1)).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
