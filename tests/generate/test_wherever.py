"""Models of other builds, wrapped or trained on, and what an interrupted pass leaves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
)

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.attach import attach, patterns
from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.layer_policies import CacheError
from megatron_sep.generate.policies import H2O

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "num_key_value_heads": 2}
SEP = AttentionPattern(window=6, sinks=2, separator_ids=(1, 2, 3))


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().double()


def some_ids(rows: int = 2, length: int = 30, seed: int = 1) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def added(ids: Tensor, pattern: AttentionPattern = SEP) -> Tensor:
    """The pattern as a mask of numbers to add, for transformers' own attention."""
    seen = pattern.plan(ids).dense()[:, None]
    return torch.zeros_like(seen, dtype=torch.float64).masked_fill(~seen, -1e9)


@torch.no_grad()
def is_the_dense_mask(model: Any) -> None:
    """Whole, in chunks and token by token: transformers' own attention under the mask."""
    ids = some_ids()
    expected = model(ids, attention_mask=added(ids)).logits
    attached = attach(model, SEP)
    close(model(ids).logits, expected)
    cache = attached.new_cache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([11, 1, 1, 1, 16], dim=1)]
    close(torch.cat(parts, 1), expected)
    attached.detach()
    close(model(ids, attention_mask=added(ids)).logits, expected)


def test_values_of_another_size_than_keys() -> None:
    """Multi-head latent attention."""
    torch.manual_seed(0)
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    sizes = SIZES | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4}
    groups = {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
    }
    is_the_dense_mask(DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **latent, **groups)).eval().double())


def opt() -> Any:
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name not in ("intermediate_size", "num_key_value_heads")}
    config = OPTConfig(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **sizes)
    return OPTForCausalLM(config).eval().double()


def test_opt_calls_its_decoder_and_not_its_model() -> None:
    """Its positions come from a mask, which it is given here for its own attention."""
    model, ids = opt(), some_ids()
    with torch.no_grad():
        positions = torch.arange(30)[None]
        expected = model(ids, attention_mask=added(ids), position_ids=positions).logits
        attached = attach(model, SEP)
        close(model(ids).logits, expected)
        cache = attached.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split([11, 1, 1, 1, 16], dim=1)]
        close(torch.cat(parts, 1), expected)


class Wrapped(nn.Module):
    """A model inside another one that is none of transformers, as adapters wrap it: its own base model is itself."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    @property
    def base_model(self) -> nn.Module:
        return self.inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


def test_a_wrapped_model() -> None:
    ids, model = some_ids(), llama()
    with torch.no_grad():
        expected = model(ids, attention_mask=added(ids)).logits
        wrapped: Any = Wrapped(model)
        attached = attach(wrapped, patterns(SEP, wrapped))
        close(wrapped(ids).logits, expected)
    attached.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_mask(checkpointing: bool) -> None:
    """Of two passes whose losses are added, with the layers run once or again for the backward pass."""
    model, two = llama().train(), (some_ids(), some_ids(seed=2))
    sum(model(ids, attention_mask=added(ids), use_cache=False).logits.square().mean() for ids in two).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    attach(model, SEP)
    if checkpointing:
        model.gradient_checkpointing_enable()
    sum(model(ids).logits.square().mean() for ids in two).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        close(parameter.grad, gradient)


def test_a_model_that_sees_reads_text() -> None:
    """Its decoder gets embeddings, and the ids are found all the same; pictures are refused by name."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=49)
    model = LlavaForConditionalGeneration(config).eval().double()
    ids = some_ids() % 49
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        alone = model(ids[:1, 5:], attention_mask=added(ids[:1, 5:])).logits
        attached = attach(model, SEP)
        close(model(ids, attention_mask=mask).logits[:1, 5:], alone)
        cache = attached.new_cache()
        model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        close(model(ids[:, 20:], attention_mask=mask, past_key_values=cache).logits[:1], alone[:, 15:])
        with pytest.raises(AttachError, match=r"LlavaForConditionalGeneration: pixel_values: the cache reads text"):
            model(ids, pixel_values=torch.zeros(2, 3, 8, 8))
        with pytest.raises(AttachError, match="no input_ids"):
            model(inputs_embeds=torch.zeros(2, 3, 32).double())
    assert config.vision_config._attn_implementation != "sep_cache"


def test_arguments_by_position() -> None:
    """Of the decoder itself: ids, mask, positions, cache."""
    model, ids = llama(), some_ids()
    attached = attach(model, SEP)
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        cache = attached.new_cache()
        found = model.model(ids, torch.ones_like(ids), torch.arange(30)[None], cache).last_hidden_state
    close(found, expected)
    assert cache.get_seq_length() == 30


def test_detach_by_a_handle_that_is_stale() -> None:
    """A second attachment stays when the first one is detached; what the user set since stays too."""
    model, ids = llama(), some_ids()
    with torch.no_grad():
        plain = model(ids).logits
        first = attach(model, AttentionPattern(window=3))
        second = attach(model, SEP)
        expected = model(ids).logits
        first.detach()
        close(model(ids).logits, expected)
        model.set_attn_implementation("eager")
        with pytest.raises(AttachError, match=r"attn_implementation='eager' was set after attach.*call detach"):
            model(ids)
        second.detach()
        second.detach()
        assert model.config._attn_implementation == "eager"
        close(model(ids).logits, plain)


class Interrupted(Exception):  # noqa: N818
    """What breaks a pass off."""


STREAM = StreamingPattern(2, 4, 6, 20, (1, 2, 3))


@pytest.mark.parametrize(
    ("policy", "new", "whole"),
    [(SEP, 1, True), (SEP, 6, False), (STREAM, 1, True), (STREAM, 3, True), (STREAM, 10, False), (H2O(4, 4), 1, False)],
)
@torch.no_grad()
def test_an_exception_inside_a_pass(policy: Any, new: int, whole: bool) -> None:
    """In the last layer, after one has attended: the cache goes on as if it had not begun, or says that it cannot.

    It cannot where the first layer had to give up what the last one still needs.
    """
    model, ids = llama(), some_ids()
    attached = attach(model, policy, rollback=0)
    cache, untouched = attached.new_cache(), attached.new_cache()
    for each in (cache, untouched):
        model(ids[:, :20], past_key_values=each)

    def fail(*_: Any) -> None:
        raise Interrupted

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(Interrupted):
        model(ids[:, 20 : 20 + new], past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 20
    expected = model(ids[:, 20:], past_key_values=untouched).logits
    if not whole:
        with pytest.raises(CacheError, match=r"failed midway .* call reset\(\) and send the text again"):
            model(ids[:, 20:], past_key_values=cache)
        cache.reset()
        model(ids[:, :20], past_key_values=cache)
    close(model(ids[:, 20:], past_key_values=cache).logits, expected)
