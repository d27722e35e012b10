"""Any transformers model with a SepCache: equal to its own attention under the dense mask, through `generate` too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.attach import attach, patterns
from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.layer_policies import CacheError, head_policies

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SEPARATORS = (1, 2, 3)
SEP = AttentionPattern(window=6, sinks=2, separator_ids=SEPARATORS)
LLAMA_31 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_31 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def neox(**more: Any) -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=64, **SIZES, **more))


def llama(**more: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(intermediate_size=64, num_key_value_heads=2, **SIZES, **more))


def falcon(**more: Any) -> Any:
    return FalconForCausalLM(FalconConfig(alibi=False, **SIZES, **more))


MODELS: dict[str, Callable[[], Any]] = {
    "neox": neox,
    "neox, whole heads rotate": lambda: neox(rotary_pct=1.0, use_parallel_residual=False),
    "llama": llama,
    "llama 3.1": lambda: llama(rope_parameters=LLAMA_31),
    "falcon, one key head": lambda: falcon(multi_query=True),
    "falcon, groups": lambda: falcon(multi_query=False, new_decoder_architecture=True, num_kv_heads=2),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval().double()


def some_ids(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_logits(model: Any, ids: Tensor, seen_BTT: Tensor, positions: Tensor | None = None) -> Tensor:
    """transformers' own attention under a dense mask."""
    mask = torch.zeros(seen_BTT.shape, dtype=model.dtype).masked_fill(~seen_BTT, -1e9)[:, None]
    logits: Tensor = model(ids, attention_mask=mask, position_ids=positions).logits
    return logits


@torch.no_grad()
def in_chunks(model: Any, ids: Tensor, chunks: list[int], cache: Any) -> Tensor:
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunks, dim=1)], 1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pattern", [AttentionPattern(), SEP, AttentionPattern(window=5, sinks=1, stride=4)])
def test_cache_is_the_dense_mask(model: Any, pattern: AttentionPattern) -> None:
    """Whole, in chunks and token by token."""
    ids = some_ids()
    expected = own_logits(model, ids, pattern.plan(ids).dense())
    attached = attach(model, pattern)
    with torch.no_grad():
        close(model(ids).logits, expected)
    for chunks in ([1] * 40, [7, 1, 1, 16, 15]):
        close(in_chunks(model, ids, chunks, attached.new_cache()), expected)


def stream_masks(policy: StreamingPattern, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What each token sees, bool [1, T, T], and how many tokens the cache held before it, [1, T]; by lists."""
    seen, held, kept = torch.zeros(1, ids.shape[1], ids.shape[1], dtype=torch.bool), [], []
    for t in range(ids.shape[1]):
        held.append(len(kept))
        kept.append(t)
        seen[0, t, kept] = True
        if policy.capacity is not None and len(kept) >= policy.capacity:
            middle = [p for p in kept[policy.sinks : -policy.window] if int(ids[0, p]) in policy.separator_ids]
            middle = middle[max(0, len(middle) - (policy.separators or 0)) :]
            kept = kept[: policy.sinks] + middle + kept[-policy.window :]
    return seen, torch.tensor([held])


@pytest.mark.parametrize("sizes", [(2, 4, 6, 20), (0, 4, 6, 14), (2, 0, 6, 12), (0, 0, 3, 4)])
@pytest.mark.parametrize("positions", ["text", "frozen"])
def test_stream_is_the_mask_of_its_automaton(model: Any, sizes: tuple[int, int, int, int], positions: Any) -> None:
    """With positions of the text, or frozen at those the tokens came in at; a prompt longer than the capacity too."""
    policy = StreamingPattern(*sizes, SEPARATORS, positions)
    ids = some_ids(rows=1)
    seen, held = stream_masks(policy, ids)
    expected = own_logits(model, ids, seen, held if positions == "frozen" else None)
    attached = attach(model, policy)
    for chunks in ([40], [1] * 40, [7, 1, 1, 16, 15]):
        close(in_chunks(model, ids, chunks, attached.new_cache()), expected)


@pytest.mark.parametrize("separators", [(), SEPARATORS, tuple(range(50))])
def test_positions_in_the_cache(model: Any, separators: tuple[int, ...]) -> None:
    """As in the text until the first eviction; afterwards chunks equal steps. With no separators, and nothing else."""
    policy = StreamingPattern(2, 4, 6, 20, separators)
    ids = some_ids()
    plain = own_logits(model, ids, AttentionPattern().plan(ids).dense())
    attached = attach(model, policy)
    steps = in_chunks(model, ids, [1] * 40, attached.new_cache())
    close(steps[:, :20], plain[:, :20])
    assert (steps[:, 20:] - plain[:, 20:]).abs().max() > 1e-4
    close(in_chunks(model, ids, [7, 1, 1, 16, 15], attached.new_cache()), steps)


def test_generate_as_usual(model: Any) -> None:
    """Greedy, by beams, left-padded and with a prefill in chunks: what the model gives without the cache."""
    ids, mask = some_ids(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :11] = 0
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"attention_mask": mask}, {"prefill_chunk_size": 13}]
    shared: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 49}
    expected = [model.generate(ids, **shared, **way) for way in ways]
    attach(model, AttentionPattern())
    for way, tokens in zip(ways, expected, strict=True):
        assert torch.equal(model.generate(ids, **shared, **way), tokens), way
    attached = attach(model, patterns(SEP, model, [0, -1]))
    cache = attached.new_cache()
    together = model.generate(ids, attention_mask=mask, past_key_values=cache, **shared)
    assert cache.retention().share < 1
    for row in range(2):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **shared)
        assert together[row, -alone.shape[1] :].tolist()[-12:] == alone[0, -12:].tolist()


def test_tokens_are_really_freed(model: Any) -> None:
    """Of 400 tokens, a stream holds the slots of its capacity, and a pattern no more than it sees and some to spare."""
    ids = some_ids(length=400)
    heads = 4 if "NeoX" in type(model).__name__ else 1 if getattr(model.config, "multi_query", False) else 2
    slot = 2 * 3 * 2 * heads * 8 * 8  # rows, layers, keys and values, key heads, head size, bytes
    attached = attach(model, StreamingPattern(2, 4, 6, 20, SEPARATORS))
    cache = attached.new_cache()
    for part in ids.split(100, dim=1):
        in_chunks(model, part, [100], cache)
        assert cache.retention().num_bytes == 20 * slot
    attached = attach(model, SEP)
    cache = attached.new_cache()
    in_chunks(model, ids, [100] * 4, cache)
    seen = int(SEP.plan(ids).num_visible()[:, -1].max())
    assert cache.retention().num_bytes <= (seen + 2 * 256) * slot


def test_detach_puts_the_model_back(model: Any) -> None:
    """Same logits as before, and no hook is left."""
    ids = some_ids()
    with torch.no_grad():
        before = model(ids).logits
        attach(model, SEP)
        attached = attach(model, AttentionPattern(window=3))  # a second one takes the first one's place
        assert not torch.equal(model(ids).logits, before)
        attached.detach()
        assert torch.equal(model(ids).logits, before)
    assert not model.base_model._forward_pre_hooks
    assert not any(hasattr(module, "sep_attachment") for module in model.modules())


@pytest.mark.parametrize(
    ("make", "policy", "message"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(d_model=8, num_layers=1)), SEP, "T5.*attention interface"),
        (
            lambda: MistralForCausalLM(MistralConfig(sliding_window=8, num_key_value_heads=2, **SIZES)),
            StreamingPattern(1, 1, 1, 4),
            "sliding_window=8: .*positions='text'",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2)),
            StreamingPattern(1, 1, 1, 4),
            "gpt2.*'text'",
        ),
        (neox, [SEP, SEP], "2 policies for a model of 3 layers"),
        (neox, [SEP, SEP, StreamingPattern(1, 1, 1, 4)], "positions cache and text.*pass positions='text'"),
        (neox, [StreamingPattern(1, 1, 1, n, (), "frozen") for n in (4, 5, 6)], "positions frozen"),
    ],
)
def test_what_cannot_be_attached_is_refused(make: Callable[[], Any], policy: Any, message: str) -> None:
    """The model stays as it was, and the message says what to change."""
    model = make()
    with pytest.raises((AttachError, CacheError), match=message):
        attach(model, policy)
    assert not any(hasattr(module, "sep_attachment") for module in model.modules())


def test_wrong_use_is_refused() -> None:
    """Ids beyond the vocabulary, embeddings without ids, a foreign or an unfit cache, going back, split groups."""
    model = llama().eval()
    attached = attach(model, SEP)
    ids = some_ids()
    with pytest.raises(CacheError, match="token ids from 50 to 50: the model's vocabulary has 50"):
        model(torch.full((1, 3), 50))
    with pytest.raises(CacheError, match="token ids from -1"):
        model(torch.tensor([[-1, 3]]))
    with pytest.raises(AttachError, match=r"no input_ids: .* pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    cache = attached.new_cache()
    in_chunks(model, ids, [40], cache)
    with pytest.raises(CacheError, match=r"crop\(-33\): the last 32 tokens can be taken back.*rollback=N"):
        cache.crop(-33)
    with pytest.raises(CacheError, match=r"crop\(1\)"):
        cache.crop(1)
    attached.detach()
    foreign = model(ids, use_cache=True).past_key_values
    other = attach(model, AttentionPattern(window=3))
    with pytest.raises(AttachError, match="DynamicCache with 40 tokens"):
        model(ids[:, :1], past_key_values=foreign)
    with pytest.raises(AttachError, match="made for other policies"):
        model(ids[:, :1], past_key_values=cache)
    other.detach()
    with pytest.raises(CacheError, match=r"heads=3 of 8: .* groups of 4 query heads; choose a multiple of 4"):
        head_policies(SEP, 3, 8, 2)
