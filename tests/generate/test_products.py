"""Products of the same input as one: the same numbers, and nothing of a model is lost by it."""

import copy
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.generate.attach import attach
from megatron_sep.generate.decode import Decoder, compile_layers
from megatron_sep.generate.products import merge_products, part_products

POLICY = AttentionPattern(window=8, sinks=2, separator_ids=(1, 2, 3))
LAYERS, PARTS = 3, 5
LINEAR = torch._C._nn.linear


def llama(bias: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        attention_bias=bias,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)  # biases, too
    return model


def ids() -> Tensor:
    return torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids_BT: Tensor | None = None) -> Tensor:
    found: Tensor = model(ids() if ids_BT is None else ids_BT).logits
    return found


def parts_of(model: nn.Module) -> list[nn.Linear]:
    """Products that are part of another."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear]


def products_of_rows(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of a forward pass: output features of each product with several weights at once."""
    found: list[int] = []

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append(len(weight))
        return LINEAR(x, weight, bias)

    monkeypatch.setattr("megatron_sep.generate.products.linear", noted)
    logits(model)
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_a_forward_pass_is_the_same_with_two_products_a_layer_instead_of_five(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(bias)
    expected = logits(model)
    merge_products(model)
    merge_products(model)  # again: nothing is left to do
    assert len(parts_of(model)) == LAYERS * PARTS
    torch.testing.assert_close(logits(model), expected)
    assert products_of_rows(model, monkeypatch) == [64 + 16 + 16, 96 + 96] * LAYERS


def test_steps_are_the_same_and_layers_still_share_one_compilation() -> None:
    frames, runs = [], []
    for merged in (False, True):
        torch.compiler.reset()
        model = llama()
        decoder = Decoder(model, attach(model, POLICY).new_cache(), graph=False)
        decoder.read(ids())
        counter: Any = CompileCounterWithBackend("eager")
        compile_layers(model, counter, merged=merged)
        runs.append(torch.stack([decoder.step(ids()[:, t : t + 1]).clone() for t in range(6)]))
        frames.append(counter.frame_count)
    torch.testing.assert_close(runs[0], runs[1])
    assert frames[0] == frames[1]


def test_weights_are_saved_loaded_and_trained_as_before(tmp_path: Path) -> None:
    """Loading writes into the common weight, and gradients reach each part's own."""
    model, other = llama(), llama()
    merge_products(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model), logits(other))
    for each in (model, other):
        each(ids(), labels=ids()).loss.backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    torch.testing.assert_close(logits(model), logits(other))
    assert parts_of(model)


def another_weight(model: Any) -> Any:
    model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(torch.ones(16, 64))
    return model


def another_bias(model: Any) -> Any:
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(64))
    return model


def loaded_by_assignment(model: Any) -> Any:
    model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()}, assign=True)
    return model


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another weight": another_weight,
    "another bias": another_bias,
    "loaded by assignment": loaded_by_assignment,
    "another type": lambda model: model.double(),
    "copied": copy.deepcopy,
    "pickled": pickled,
}


@pytest.mark.parametrize("name", CHANGES)
def test_who_is_given_other_weights_or_is_copied_multiplies_with_its_own(name: str) -> None:
    model, plain = llama(), llama()
    merge_products(model)
    before = logits(model)
    changed, expected = CHANGES[name](model), CHANGES[name](plain)
    torch.testing.assert_close(logits(changed), logits(expected))
    alone = 3 if name in ("another weight", "another bias") else LAYERS * PARTS
    assert len(parts_of(changed)) == LAYERS * PARTS - alone
    if changed is not model:
        torch.testing.assert_close(logits(model), before)
        assert len(parts_of(model)) == LAYERS * PARTS


def test_products_that_are_asked_with_another_input_multiply_it() -> None:
    model = llama()
    merge_products(model)
    attention = model.model.layers[0].self_attn
    one, other = torch.randn(2, 3, 64)
    with torch.no_grad():
        attention.q_proj(one)
        torch.testing.assert_close(
            attention.k_proj(other), LINEAR(other, attention.k_proj.weight, attention.k_proj.bias)
        )
        torch.testing.assert_close(attention.v_proj(one), LINEAR(one, attention.v_proj.weight, attention.v_proj.bias))
        torch.testing.assert_close(attention.v_proj(one), LINEAR(one, attention.v_proj.weight, attention.v_proj.bias))


def test_two_threads_at_once_get_what_each_gets_alone() -> None:
    model, barrier = llama(), Barrier(2)
    texts = torch.randint(0, 64, (2, 1, 12))
    expected = [logits(model, text) for text in texts]
    merge_products(model)
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def read(number: int) -> None:
        barrier.wait()
        found[number] += [logits(model, texts[number]) for _ in range(40)]

    threads = [Thread(target=read, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, each in itertools.chain(((n, x) for n, xs in found.items() for x in xs)):
        torch.testing.assert_close(each, expected[number])


def test_what_does_not_fit_together_stays_as_it_is() -> None:
    """Another class, another type, a bias of one alone, a forward pass that a hook has replaced."""
    model = llama(bias=False)
    first, second, third = (layer.self_attn for layer in model.model.layers)
    first.k_proj.to(torch.float64)
    second.v_proj.bias = nn.Parameter(torch.zeros(16))
    third.q_proj.forward = third.q_proj.forward
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    merge_products(model)
    assert len(parts_of(model)) == 2 * (LAYERS - 1)


def test_parted_again_the_weights_stay_and_no_common_one_is_kept() -> None:
    model = llama()
    expected = logits(model)
    merge_products(model)
    part_products(model)
    torch.testing.assert_close(logits(model), expected)
    assert not parts_of(model)
    assert not any("whole" in vars(module) for module in model.modules())
