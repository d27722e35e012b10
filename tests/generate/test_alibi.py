"""Models of transformers with ALiBi: Falcon, BLOOM, MPT under the cache compute what they compute themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.attach import attach
from megatron_sep.generate.interface import AttachError

LENGTH, SEPARATORS = 300, (1, 2, 3)
PATTERNS = [AttentionPattern(), AttentionPattern(6, 2, SEPARATORS), AttentionPattern(200, 0, SEPARATORS)]


def falcon(heads: int, **more: Any) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 8 * heads, "num_hidden_layers": 2, "num_attention_heads": heads}
    return FalconForCausalLM(FalconConfig(alibi=True, attn_implementation="eager", **sizes, **more))


def bloom(heads: int) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 8 * heads, "n_layer": 2, "n_head": heads}
    return BloomForCausalLM(BloomConfig(attn_implementation="eager", **sizes))


def mpt(heads: int) -> Any:
    sizes = {"vocab_size": 50, "d_model": 8 * heads, "n_layers": 2, "n_heads": heads, "max_seq_len": LENGTH}
    return MptForCausalLM(MptConfig(attn_implementation="eager", **sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "falcon, sequential": lambda: falcon(4, multi_query=False, parallel_attn=False, bias=True),
    "falcon, one key head": lambda: falcon(6, multi_query=True),
    "bloom": lambda: bloom(4),
    "bloom, six heads": lambda: bloom(6),
    "mpt": lambda: mpt(4),
    "mpt, six heads": lambda: mpt(6),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def some_ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_logits(model: Any, ids: Tensor, seen_BTT: Tensor) -> Tensor:
    """transformers' own attention, each block given a mask: True, or as numbers to add, as its kind wants it."""
    added = torch.zeros(seen_BTT.shape).masked_fill(~seen_BTT, -1e9)[:, None]
    mask = ~seen_BTT[:, None] if model.config.model_type == "mpt" else added
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
        for block in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    ]
    logits: Tensor = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("pattern", PATTERNS, ids=["full", "narrow", "wide"])
@torch.no_grad()
def test_the_cache_computes_the_models_own_bias(model: Any, pattern: AttentionPattern) -> None:
    """1e-5 in fp32, whole, in chunks and token by token, past the distances that bf16 holds exactly; and back again."""
    ids = some_ids()
    expected, plain = own_logits(model, ids, pattern.plan(ids).dense()), model(ids).logits
    attached = attach(model, pattern)
    for chunks in ([LENGTH], [100, 1, 1, 150, 48]):
        cache = attached.new_cache()
        found = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunks, 1)], 1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    cache = attached.new_cache()
    model(ids[:, :270], past_key_values=cache)
    for t in range(270, LENGTH):
        step = model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0]
        torch.testing.assert_close(step, expected[:, t], rtol=1e-5, atol=1e-5)
    attached.detach()
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)


@torch.no_grad()
def test_padding_does_not_count_as_distance(model: Any) -> None:
    """A padded text in a batch is the text alone."""
    ids = some_ids(2, 20)
    attached = attach(model, AttentionPattern(6, 2, SEPARATORS))
    mask = (torch.arange(20) >= torch.tensor([[0], [7]])).long()
    together = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(together[1, 7:], model(ids[1:, 7:]).logits[0], rtol=1e-5, atol=1e-5)
    del attached


@torch.no_grad()
def test_generate_goes_on_as_without_a_cache(model: Any) -> None:
    """transformers' own `generate`, greedy: with everything visible the same tokens.

    In eager attention Falcon adds its bias twice, in the mask and to the scores; what it was trained with is sdpa's.
    """
    ids = some_ids(1, 12)
    if model.config.model_type == "falcon":
        model.config._attn_implementation = "sdpa"
    expected = model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False, pad_token_id=0)
    attach(model, AttentionPattern())
    assert model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0).tolist() == expected.tolist()


def test_a_bias_that_is_rounded_by_position_has_no_other_positions() -> None:
    """Falcon rounds its bias to bf16: places in a cache would round to others. BLOOM's is a distance."""
    stream = StreamingPattern(1, 2, 3, 9, SEPARATORS, "cache")
    with pytest.raises(AttachError, match="a model with ALiBi counts them in the text; pass positions='text'"):
        attach(MODELS["falcon, one key head"](), stream)
    attach(MODELS["bloom"](), stream)
