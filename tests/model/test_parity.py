"""The model computes what transformers' GPTNeoXForCausalLM computes from the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megatron_sep.attention.layers import layer_patterns, plan_layers
from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.config.schema import ModelConfig, ParallelConfig
from megatron_sep.model.weights import from_hugging_face, to_hugging_face

pytestmark = pytest.mark.usefixtures("single_process")

LAYERS, LENGTH, VOCAB = 4, 48, 128
SEPARATORS = (5, 9, 77, 101, 102, 103)
PATTERNS = {
    "full": layer_patterns(AttentionPattern(), LAYERS),
    "sep, first and last layer full": layer_patterns(AttentionPattern(6, 3, SEPARATORS), LAYERS, (0, -1)),
}


def hugging_face(parallel_residual: bool, rotary: float) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=256,
            rotary_pct=rotary,
            use_parallel_residual=parallel_residual,
            attn_implementation="eager",
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def with_masks(model: GPTNeoXForCausalLM, plans: tuple[MaskPlan, ...]) -> None:
    """Give each layer of a transformers model its own additive 4-D mask."""
    for layer, plan in zip(model.gpt_neox.layers, plans, strict=True):
        mask = torch.where(plan.dense()[:, None], 0.0, -torch.inf)

        def put(_: Any, args: Any, kwargs: dict[str, Any], mask: Tensor = mask) -> Any:
            return args, kwargs | {"attention_mask": mask}

        layer.register_forward_pre_hook(put, with_kwargs=True)


def ours(theirs: GPTNeoXForCausalLM, **settings: Any) -> Any:
    from megatron_sep.model.build import build_model

    config = theirs.config
    model = build_model(
        ModelConfig(
            num_layers=LAYERS,
            hidden_size=64,
            num_attention_heads=4,
            sequence_length=LENGTH,
            parallel_residual=config.use_parallel_residual,
            rotary_fraction=config.rope_parameters["partial_rotary_factor"],
        ),
        ParallelConfig(),
        vocab_size=VOCAB,
        precision="fp32",
        seed=1,
        **settings,
    )
    model.load_state_dict(from_hugging_face(on_disk(theirs.state_dict()), LAYERS), strict=False)
    return model


def on_disk(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 renames the head when it loads a checkpoint."""
    return {("embed_out.weight" if name == "lm_head.weight" else name): w for name, w in weights.items()}


@pytest.mark.parametrize("rotary", [0.25, 1.0])
@pytest.mark.parametrize("parallel_residual", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_and_gradients_equal_transformers(pattern: str, parallel_residual: bool, rotary: float) -> None:
    """Logits, and every gradient of the mean loss, agree within 1e-5."""
    theirs = hugging_face(parallel_residual, rotary)
    model = ours(theirs)
    ids = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    plans = plan_layers(PATTERNS[pattern], ids)
    with_masks(theirs, plans)

    expected = theirs(ids).logits
    found = model(ids, torch.arange(LENGTH)[None], plans)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    labels = ids.roll(-1, 1)
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    model(ids, torch.arange(LENGTH)[None], plans, labels=labels).mean().backward()
    expected_grads = on_disk({name: p.grad for name, p in theirs.named_parameters()})
    found_grads = to_hugging_face({name: p.grad for name, p in model.named_parameters()}, LAYERS)
    assert found_grads.keys() == expected_grads.keys()
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(found_grads[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_recompute_changes_no_gradient_with_dropout() -> None:
    """Recomputed layers draw the same dropout masks: gradients are bit-equal to those of kept activations."""
    theirs = hugging_face(parallel_residual=True, rotary=0.25)
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    plans = plan_layers(PATTERNS["sep, first and last layer full"], ids)
    gradients = [gradients_with_dropout(ours(theirs, recompute=recompute), ids, plans) for recompute in (False, True)]
    for name, kept in gradients[0].items():
        assert torch.equal(kept, gradients[1][name]), name


def gradients_with_dropout(model: Any, ids: Tensor, plans: tuple[MaskPlan, ...]) -> dict[str, Tensor]:
    from megatron_sep.parallel.groups import seed_everything

    for layer in model.decoder.layers:
        layer.hidden_dropout = 0.1
        layer.self_attention.core_attention.dropout = 0.1
    seed_everything(7)
    model(ids, torch.arange(LENGTH)[None], plans, labels=ids.roll(-1, 1)).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
