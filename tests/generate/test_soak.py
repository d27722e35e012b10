"""A stream without end: memory stays flat and no invariant is lost."""

import gc
import os

import psutil
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.attach import attach
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.decode import Decoder
from megatron_sep.generate.slots import Slots

SEPARATORS = tuple(range(7))
VOCABULARY = 61  # 11.5 % separators


def small_model(hidden_size: int = 64) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * hidden_size,
        )
    ).eval()


def check(cache: SepCache, policy: StreamingPattern, tokens: int) -> None:
    """Order, block sizes and counts of every row."""
    assert policy.capacity is not None
    (group,) = cache.groups.values()
    assert isinstance(group, Slots)
    assert group.seen_R.tolist() == [tokens] * len(group.seen_R)
    for place, separator, length in zip(
        group.place_RC.cpu(), group.landmark_RC.cpu(), group.length_R.tolist(), strict=True
    ):
        assert policy.sinks + policy.window <= length < policy.capacity
        kept = place[:length]
        assert (kept[1:] > kept[:-1]).all()
        assert kept[: policy.sinks].tolist() == list(range(policy.sinks))
        assert kept[-policy.window :].tolist() == list(range(tokens - policy.window, tokens))
        past_any_window = (kept >= policy.sinks) & (kept < tokens - policy.capacity)
        assert separator[:length][past_any_window].all()
        assert int(past_any_window.sum()) <= (policy.separators or 0)


def test_two_hundred_thousand_tokens_on_the_cpu() -> None:
    """Resident memory after the first 40,000 tokens and at the end differ by less than 1 %."""
    policy = StreamingPattern(4, 64, 256, 800, SEPARATORS)
    model = small_model()
    cache = attach(model, policy).new_cache()
    generator = torch.Generator().manual_seed(0)
    process, sizes = psutil.Process(os.getpid()), []
    with torch.no_grad():
        for begin in range(0, 200_000, 400):
            model(torch.randint(0, VOCABULARY, (1, 400), generator=generator), past_key_values=cache, logits_to_keep=1)
            if begin % 40_000 == 39_600:
                gc.collect()
                check(cache, policy, begin + 400)
                sizes.append((process.memory_info().rss, cache.retention().num_bytes))
    assert max(rss for rss, _ in sizes) < 1.01 * sizes[0][0]
    assert len({held for _, held in sizes}) == 1
    assert cache.retention().live == pytest.approx(policy.mean_size, rel=0.005)


@pytest.mark.gpu
def test_ten_million_tokens_on_a_gpu() -> None:
    """128 texts of 78,125 tokens, a token a step: device memory at the end is what it was after the first tenth."""
    policy = StreamingPattern(4, 64, 256, 800, SEPARATORS)
    model = small_model(128).to("cuda", torch.bfloat16)
    decoder = Decoder(model, attach(model, policy).new_cache())
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = []
    for step in range(1, 78_126):
        decoder.step(torch.randint(0, VOCABULARY, (128, 1), generator=generator, device="cuda"))
        if step % 7_800 == 0:
            check(decoder.cache, policy, step)
            sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert max(allocated for allocated, _ in sizes) < 1.01 * sizes[0][0]
    assert max(reserved for _, reserved in sizes) < 1.01 * sizes[0][1]
    assert decoder.cache.retention().live == pytest.approx(policy.mean_size, rel=0.01)
