"""Drafts that are not accepted: after `crop`, a cache goes on as if the tokens had never come."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.attach import attach
from megatron_sep.generate.layer_policies import CacheError
from megatron_sep.generate.policies import H2O

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
SEP = AttentionPattern(window=3, sinks=1, separator_ids=(1, 2, 3))
POLICIES: dict[str, Any] = {
    "full": AttentionPattern(),
    "sep": SEP,
    "hybrid": [AttentionPattern(), SEP],
    "by head": (SEP, AttentionPattern(window=5, stride=4)),
    "without a capacity": StreamingPattern(2, None, 4, None, (1, 2, 3), "text"),
}
END = 9


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().double()


def mistral() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval().double()


def some_ids(length: int, seed: int, rows: int = 2) -> Tensor:
    ids = torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(ids == END, 1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slack", [1, 64])
@pytest.mark.parametrize("make", [llama, mistral])
@torch.no_grad()
def test_a_draft_leaves_no_trace(make: Any, policy: str, slack: int) -> None:
    """Drafts of up to 31 tokens, in chunks or one by one, taken back with the token before them: logits and counts."""
    chosen, draw, model = POLICIES[policy], random.Random(7), make()
    attached = attach(model, chosen, document_end=END, slack=slack)
    drafting, plain = attached.new_cache(), attached.new_cache()
    for turn in range(5):
        accepted, drafted = draw.choice([1, 2, 9]), draw.choice([1, 5, 20, 31])
        ids = torch.cat([some_ids(accepted, 2 * turn), some_ids(drafted, 2 * turn + 1)], 1)
        for part in ids.split(draw.choice([1, 7, 64]), dim=1):
            model(part, past_key_values=drafting)
        drafting.crop(-drafted)
        expected = model(ids[:, :accepted], past_key_values=plain).logits[:, -1]
        drafting.crop(-1)
        found = model(ids[:, accepted - 1 : accepted], past_key_values=drafting).logits[:, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert drafting.get_seq_length() == plain.get_seq_length()
        kept, told = drafting.retention(), plain.retention()
        assert (kept.seen, kept.all, kept.queries) == (told.seen, told.all, told.queries)


@pytest.mark.parametrize("way", [{"prompt_lookup_num_tokens": 4}, {"assistant_early_exit": 1}])
def test_assisted_decoding_gives_the_tokens_of_plain_decoding(way: dict[str, int]) -> None:
    model, ids = llama(), some_ids(8, 3, rows=1).repeat(1, 3)
    attach(model, SEP)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 49}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **way, **options), expected)


def test_an_assistant_may_have_a_cache_of_its_own() -> None:
    model, assistant, ids = llama(), llama(), some_ids(24, 3, rows=1)
    attach(model, SEP)
    attach(assistant, AttentionPattern(window=2))
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 49}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)


@torch.no_grad()
def test_what_is_gone_cannot_be_taken_back() -> None:
    """More than the cache keeps back, at once or in turn; a document's end; padding; policies that free for good."""
    model = llama()
    attached = attach(model, SEP, document_end=END, rollback=8)
    cache = attached.new_cache()
    model(some_ids(40, 1), past_key_values=cache)
    with pytest.raises(CacheError, match=r"crop\(-9\): the last 8 tokens can be taken back.*rollback=N in attach"):
        cache.crop(-9)
    cache.crop(-5)
    with pytest.raises(CacheError, match=r"crop\(-4\): the last 3 tokens"):
        cache.crop(-4)
    cache.crop(-3)
    model(torch.tensor([[4, END, 4], [4, 4, 4]]), past_key_values=cache)
    with pytest.raises(CacheError, match=r"crop\(-2\).*as far as one document has them"):
        cache.crop(-2)
    cache.crop(-1)
    padded = attached.new_cache()
    model(some_ids(6, 1), attention_mask=torch.tensor([[1, 1, 1, 0, 1, 1], [1] * 6]), past_key_values=padded)
    with pytest.raises(CacheError, match=r"crop\(-3\): the last 2 tokens"):
        padded.crop(-3)
    for policy in (StreamingPattern(2, 4, 6, 20, (1, 2, 3)), H2O(4, 4)):
        bounded = attach(model, policy).new_cache()
        model(some_ids(12, 1), past_key_values=bounded)
        with pytest.raises(CacheError, match=r"crop\(-1\): under .* freed for good; .*without assisted"):
            bounded.crop(-1)
