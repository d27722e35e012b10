"""A prompt that is kept whole and compressed from the first new token on, against lists and dense masks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.attach import attach
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.decode import Decoder

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "num_key_value_heads": 2}
PATTERN = StreamingPattern(2, 3, 6, 16, (1, 2, 3), "text", "dense")
PROMPT, TOKENS = 30, 48


def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().double()


def some_ids(rows: int = 2) -> Tensor:
    return torch.randint(0, 50, (rows, TOKENS), generator=torch.Generator().manual_seed(1)) % 12


def seen_by_lists(ids: Tensor, prompt: int) -> Tensor:
    """What each token sees, bool [B, T, T]: everything in the prompt, then four blocks with an eviction when due."""
    seen = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool)
    for row, text in enumerate(ids.tolist()):
        kept: list[int] = []
        for t in range(len(text)):
            kept.append(t)
            seen[row, t, kept] = True
            if t >= prompt and len(kept) >= 16:
                past = [p for p in kept[2:-6] if text[p] in (1, 2, 3)]
                kept = kept[:2] + past[max(0, len(past) - 3) :] + kept[-6:]
    return seen


@torch.no_grad()
def masked_logits(model: Any, ids: Tensor, seen: Tensor) -> Tensor:
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e9)[:, None]
    logits: Tensor = model(ids, attention_mask=added).logits
    return logits


@torch.no_grad()
def through(model: Any, cache: SepCache, ids: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)], 1)


@pytest.mark.parametrize("sizes", [[30] + [1] * 18, [13, 10, 7] + [1] * 18, [30, 1, 12, 1, 4]])
def test_the_prompt_is_whole_until_the_first_new_token(sizes: list[int]) -> None:
    """In chunks or at once; what comes behind it is compressed, later chunks too."""
    made, ids = model(), some_ids()
    expected = masked_logits(made, ids, seen_by_lists(ids, PROMPT))
    found = through(made, attach(made, PATTERN).new_cache(), ids, sizes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    compressed = through(made, attach(made, StreamingPattern(2, 3, 6, 16, (1, 2, 3), "text")).new_cache(), ids, sizes)
    assert float((compressed - expected).abs().max()) > 1e-2


@torch.no_grad()
def test_a_padded_row_is_the_row_alone() -> None:
    """Prompts of unequal length, padded on the left; positions inside the cache."""
    made, ids = model(), some_ids()
    policy = StreamingPattern(2, 3, 6, 16, (1, 2, 3), "cache", "dense")
    attached = attach(made, policy)
    alone = through(made, attached.new_cache(), ids[:1, 5:], [25] + [1] * 18)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :5] = 0
    cache = attached.new_cache()
    first = made(ids[:, :PROMPT], attention_mask=mask, past_key_values=cache).logits
    rest = through(made, cache, ids[:, PROMPT:], [1] * 18)
    torch.testing.assert_close(torch.cat([first, rest], 1)[:1, 5:], alone, rtol=0, atol=1e-9)


def test_memory_of_the_prompt_is_given_back() -> None:
    """After the second new token there are ``capacity`` slots, whether the prompt had more or fewer."""
    made = model()
    attached = attach(made, PATTERN)
    for prompt in (40, 5):
        cache = attached.new_cache()
        decoder = Decoder(made, cache)
        decoder.read(some_ids()[:, :prompt])
        (slots,) = cache.groups.values()
        before = cache.retention().num_bytes
        assert before >= 2 * 2 * 2 * 2 * prompt * 8 * 8
        for _ in range(12):
            decoder.step(torch.ones(2, 1, dtype=torch.long))
        assert (slots.num_slots, cache.retention().num_bytes) == (16, 2 * 2 * 2 * 2 * 16 * 8 * 8)  # type: ignore[attr-defined]


def test_in_a_sliding_window_of_the_model() -> None:
    """The prompt's tokens see no further than the layer does."""
    torch.manual_seed(0)
    made, ids = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9)).eval().double(), some_ids()
    place = torch.arange(TOKENS)
    seen = seen_by_lists(ids, PROMPT) & (place[:, None] - place < 9)
    expected = masked_logits(made, ids, seen)
    found = through(made, attach(made, PATTERN).new_cache(), ids, [13, 17] + [1] * 18)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_published_training_free_setting() -> None:
    """a=4, s=128, w=256, c=512 of the authors' code, which evicts when c is exceeded, is c=513 here."""
    assert StreamingPattern(4, 128, 256, 513, (1,), "text", "dense").mean_size == 450.5
    with pytest.raises(ValueError, match="prefill='whole': choose 'compressed' or 'dense'"):
        StreamingPattern(4, 128, 256, 513, (1,), "text", "whole")  # type: ignore[arg-type]
