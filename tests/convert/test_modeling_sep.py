"""The model that an export ships: what `generate` does with its cache, it does with what the masks need too."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPTNeoXConfig, LlamaConfig, StaticCache

from megatron_sep.attention.pattern import AttentionPattern, document_numbers
from megatron_sep.convert.modeling_sep import SepGPTNeoXForCausalLM, SepLlamaForCausalLM
from megatron_sep.convert.sep_cache import ROLLBACK, SLACK
from megatron_sep.generate.attach import attach, patterns

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48}
RULES = {"window": 4, "sinks": 1, "separator_ids": [1, 2, 3], "stride": None, "full_layers": [0], "document_end": 9}
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 39, "do_sample": False}


@pytest.fixture(params=["neox", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "neox":
        return SepGPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, sep_attention=RULES)).eval().double()
    return SepLlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, sep_attention=RULES)).eval().double()


def some_ids(rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(1, 39, (rows, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("way", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_take_their_masks_along(model: Any, way: dict[str, int]) -> None:
    """More new tokens than the window: as without a cache, where no mask can be another beam's."""
    expected = model.generate(some_ids(), use_cache=False, **way, **OPTIONS)
    assert torch.equal(model.generate(some_ids(), use_cache=True, **way, **OPTIONS), expected)


def test_what_a_cache_can_do_its_ids_do_too(model: Any) -> None:
    """Texts chosen and repeated, tokens taken back: the rest as if the text had always been so."""
    ids = some_ids(rows=3)
    with torch.no_grad():
        expected = model(ids[[2, 2, 0, 0]], use_cache=False).logits[:, 10:]
        cache = model(ids[:, :12], past_key_values=DynamicCache()).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.crop(-2)
        found = model(ids[[2, 2, 0, 0], 10:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_by_either_name(model: Any, name: str) -> None:
    """What transformers calls it since 5.24, and before, whichever is installed: the new tokens see the old ones."""
    ids, cache = some_ids(), DynamicCache()
    expected = model.base_model(ids, use_cache=False).last_hidden_state[:, 12:]
    model.base_model(ids[:, :12], **{name: cache})
    found = model.base_model(ids[:, 12:], **{name: cache}).last_hidden_state
    assert cache.get_seq_length() == 16
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_assisted_decoding_gives_the_same_tokens(model: Any) -> None:
    ids = some_ids(rows=1).repeat(1, 3)
    expected = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **OPTIONS), expected)


LONG: dict[str, Any] = OPTIONS | {"max_new_tokens": 90, "eos_token_id": None}


def padded() -> dict[str, Tensor]:
    """Three prompts of unequal length, padded on the left."""
    ids, mask = some_ids(rows=3), torch.ones(3, 16, dtype=torch.long)
    mask[0, :7], mask[2, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def stepped(model: Any, ids: Tensor, sizes: list[int], **options: Any) -> tuple[Tensor, Any]:
    cache = DynamicCache()
    parts = [model(part, past_key_values=cache, **options).logits for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, 1), cache


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 240, [100, 1, 1, 1, 90, 20, 1, 26], [33] * 7 + [9]])
def test_what_nothing_sees_is_freed(model: Any, sizes: list[int]) -> None:
    """Logits of 240 tokens are those of the mask; of a windowed layer a fraction stays, of the full one all."""
    ids = torch.randint(3, 39, (2, 240), generator=torch.Generator().manual_seed(5))
    ids[:, 50::40] = torch.tensor([1, 9, 2, 3, 1])
    found, cache = stepped(model, ids, sizes)
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=0, atol=1e-9)
    held = [layer.keys.shape[-2] for layer in cache.layers[:3]]
    visible = int(AttentionPattern(4, 1, (1, 2, 3)).plan(ids, document_numbers(ids, 9)).num_visible()[:, -1].max())
    assert held[0] == 240
    assert held[1] == held[2] < visible + ROLLBACK + SLACK + sizes[-1]
    assert cache.get_seq_length() == 240


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_it_says_what_the_cache_of_this_package_says(model: Any, way: dict[str, int]) -> None:
    """90 new tokens of a padded batch, greedily and with beams: those without a cache, and those of ``attach``."""
    given = padded()
    found = model.generate(**given, **way, **LONG)
    assert torch.equal(found, model.generate(**given, use_cache=False, **way, **LONG))
    kind = next(base for base in type(model).__mro__ if base.__module__.startswith("transformers.models"))
    config = type(model.config).from_dict(model.config.to_dict())
    plain: Any = kind(config).eval().double()
    weights = {name.replace("embed_out", "lm_head"): weight for name, weight in model.state_dict().items()}
    plain.load_state_dict(weights)
    attach(plain, patterns(AttentionPattern(4, 1, (1, 2, 3)), plain, [0]), document_end=9)
    assert torch.equal(plain.generate(**given, **way, **LONG), found)


@torch.no_grad()
def test_texts_are_chosen_and_drafts_taken_back_from_a_cache_that_freed(model: Any) -> None:
    """As if the text had always been so; more than ``ROLLBACK`` tokens are refused, and a reset cache begins anew."""
    ids = torch.randint(3, 39, (3, 200), generator=torch.Generator().manual_seed(6))
    expected = model(ids[[2, 2, 0, 0]], use_cache=False).logits
    _, cache = stepped(model, ids[:, :160], [100] + [1] * 60)
    assert cache.layers[1].keys.shape[-2] < 100
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match=r"the last \d+ tokens can be taken back"):
        cache.crop(-60)
    cache.crop(-30)
    found = model(ids[[2, 2, 0, 0], 130:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[:, 130:], rtol=0, atol=1e-9)
    cache.reset()
    again = model(ids[:1, :20], past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids[:1, :20], use_cache=False).logits, rtol=0, atol=1e-9)


def test_a_draft_longer_than_what_is_kept_back(model: Any) -> None:
    """A pass of many drafted tokens frees nothing that taking them back needs, up to ``ROLLBACK`` of them."""
    ids = some_ids(rows=1).repeat(1, 12)
    expected = model.generate(ids, **LONG)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=30, **LONG), expected)


def texts(model: Any, ids: Tensor) -> Iterator[Tensor]:
    cache = DynamicCache()
    for part in ids.split([7, 1, 1, 7], dim=1):
        yield model(part, past_key_values=cache).logits.detach()


def test_texts_in_turn_and_in_threads_equal_each_alone(model: Any) -> None:
    ids = [some_ids(rows=1, seed=seed) for seed in range(6)]
    alone = [torch.cat([*texts(model, each)], 1) for each in ids]
    in_turn = zip(*(texts(model, each) for each in ids), strict=True)
    for found, expected in zip(zip(*in_turn, strict=True), alone, strict=True):
        assert torch.equal(torch.cat(found, 1), expected)
    with ThreadPoolExecutor(3) as pool:
        for found, expected in zip(pool.map(lambda each: torch.cat([*texts(model, each)], 1), ids), alone, strict=True):
            assert torch.equal(found, expected)


def test_an_exception_leaves_nothing_behind(model: Any) -> None:
    """And gradient checkpointing runs the layers again under the masks of their own pass."""
    ids = some_ids()
    expected = model(ids, use_cache=False).logits
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 40))
    model.train().gradient_checkpointing_enable()
    losses = [model(part, labels=part, use_cache=False).loss for part in (ids, some_ids(seed=7))]
    sum(losses).backward()
    again = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_disable()
    sum(model(part, labels=part, use_cache=False).loss for part in (ids, some_ids(seed=7))).backward()
    for found, parameter in zip(again, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-9)
    assert torch.equal(model.eval()(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 16, 16)}, r"attention_mask of shape \(2, 1, 16, 16\)"),
        ({"attention_mask": torch.arange(32).view(2, 16)}, r"pass 0 at padding and 1 elsewhere"),
        ({"attention_mask": (torch.arange(32).view(2, 16) % 5 > 0).long()}, "padding between tokens"),
        ({"position_ids": torch.arange(16)[None] % 8}, "packed documents are not kept apart"),
        ({"inputs_embeds": torch.zeros(2, 16, 32), "input_ids": None}, "pass them, and all else by name"),
    ],
)
def test_what_would_be_misread_is_refused(model: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": some_ids()} | given))


def test_caches_of_unknown_tokens_are_refused(model: Any) -> None:
    """Filled elsewhere, for another number of texts, or of fixed room."""
    foreign = DynamicCache()
    for layer in range(3):
        foreign.update(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8), layer)
    with pytest.raises(ValueError, match="not made by this model"):
        model(some_ids(), past_key_values=foreign)
    cache = model(some_ids(), past_key_values=DynamicCache()).past_key_values
    with pytest.raises(ValueError, match="holds 2 sequences, input_ids 1"):
        model(some_ids(rows=1), past_key_values=cache)
    with pytest.raises(ValueError, match="StaticCache has room of a fixed size"):
        model(some_ids(), past_key_values=StaticCache(config=model.config, max_cache_len=64))
