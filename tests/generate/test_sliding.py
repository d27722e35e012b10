"""Models with sliding windows, softcaps and attention sinks of their own: what both they and the policy let be seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
)

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.attach import attach
from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.layer_policies import CacheError
from megatron_sep.generate.policies import H2O

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 9, "head_dim": 8, "pad_token_id": 0}
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
SEPARATORS = (1, 2, 3)
SEP = AttentionPattern(window=6, sinks=2, separator_ids=SEPARATORS)

MODELS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "gemma 2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **KINDS, attn_logit_softcapping=0.5)),
    "gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **KINDS)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, **KINDS, num_local_experts=2, num_experts_per_tok=2)),
    "cohere 2": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, **KINDS)),
    "olmo 3": lambda: Olmo3ForCausalLM(Olmo3Config(**SIZES, **KINDS)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.set_attn_implementation("eager")
    return made if request.param == "gpt-oss" else made.double()


def some_ids() -> Tensor:
    return torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))


def streamed(policy: StreamingPattern, ids: Tensor) -> Tensor:
    """What each token sees of a stream, bool [B, T, T], by lists."""
    seen = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool)
    for row, text in enumerate(ids.tolist()):
        kept: list[int] = []
        for t in range(len(text)):
            kept.append(t)
            seen[row, t, kept] = True
            if policy.capacity is not None and len(kept) >= policy.capacity:
                middle = [p for p in kept[policy.sinks : -policy.window] if text[p] in policy.separator_ids]
                middle = middle[max(0, len(middle) - (policy.separators or 0)) :]
                kept = kept[: policy.sinks] + middle + kept[-policy.window :]
    return seen


@torch.no_grad()
def own_logits(model: Any, ids: Tensor, seen_BTT: Tensor) -> Tensor:
    """transformers' own attention, each kind of layer under its mask."""
    place = torch.arange(ids.shape[1])
    near_BTT = seen_BTT & (place[:, None] - place < 9)
    masks = [
        torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, -1e9)[:, None] for seen in (seen_BTT, near_BTT)
    ]
    kinds: Any = {"full_attention": masks[0], "sliding_attention": masks[1]}
    mask = masks[1] if model.config.model_type == "mistral" else kinds
    logits: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return logits


@pytest.mark.parametrize("policy", [AttentionPattern(), SEP, StreamingPattern(2, 4, 12, 20, SEPARATORS, "text")])
def test_a_layer_sees_what_both_let_it_see(model: Any, policy: Any) -> None:
    """Whole, in chunks and token by token."""
    ids = some_ids()
    seen_BTT = streamed(policy, ids) if isinstance(policy, StreamingPattern) else policy.plan(ids).dense()
    expected = own_logits(model, ids, seen_BTT)
    tolerance = 1e-6 if model.dtype == torch.float64 else 2e-4  # transformers' softmax is in fp32
    attached = attach(model, policy)
    for chunks in ([40], [1] * 40, [13, 1, 1, 16, 9]):
        cache = attached.new_cache()
        with torch.no_grad():
            found = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunks, dim=1)], 1)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_what_a_sliding_layer_cannot_see_is_freed(model: Any) -> None:
    """Of 400 tokens under full attention, a window of 9 leaves the 8 that the next one sees."""
    ids = some_ids().repeat(1, 10)
    attached = attach(model, AttentionPattern(), rollback=0)
    cache = attached.new_cache()
    with torch.no_grad():
        for part in ids.split(100, dim=1):
            model(part, past_key_values=cache)
    held = [sum(blocks.values()) for _, blocks in cache.blocks()]
    assert held == ([8] if model.config.model_type == "mistral" else [8, 400])


def test_policies_that_do_not_go_into_a_window_are_refused() -> None:
    """Those that look at scores, and positions inside the cache; scores that are not plain under H2O."""
    model = MODELS["mistral"]()
    with pytest.raises(AttachError, match=r"H2O.* in a layer with sliding_window=9: .*positions='text'"):
        attach(model, H2O(4, 4))
    with pytest.raises(AttachError, match=r"in a layer with sliding_window=9"):
        attach(model, StreamingPattern(2, 4, 12, 20, SEPARATORS))
    full = SIZES | {"layer_types": ["full_attention"] * 2}
    capped = Gemma2ForCausalLM(Gemma2Config(**full, attn_logit_softcapping=0.5)).eval()
    attach(capped, H2O(4, 4))
    with pytest.raises(CacheError, match=r"layer 0: H2O.* knows no softcap; pass an AttentionPattern"):
        capped(some_ids())
