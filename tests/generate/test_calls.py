"""Every way in which transformers calls an attached model: without a cache, packed, in threads, interrupted."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.attach import attach
from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.layer_policies import CacheError
from megatron_sep.generate.policies import H2O, SnapKV

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48}
SEPARATORS = (1, 2, 3)
SEP = AttentionPattern(window=6, sinks=2, separator_ids=SEPARATORS)
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": 49}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES, **more)).eval().double()


def gpt2() -> Any:
    """Its positions are learned, so that a wrong one shows."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)).eval().double()


def some_ids(rows: int = 2, length: int = 30, seed: int = 1) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.fixture(autouse=True)
def no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


@pytest.mark.parametrize("policy", [SEP, StreamingPattern(2, 4, 6, 20, SEPARATORS), H2O(4, 4)])
@pytest.mark.parametrize("in_config", [False, True])
def test_without_a_cache_each_step_reads_the_whole_text(policy: Any, in_config: bool) -> None:
    """`generate(use_cache=False)`, or so in the configuration after training: the tokens that the cache gives."""
    model, ids = llama(), some_ids(length=18)
    attach(model, policy)
    options = GREEDY | {"max_new_tokens": 5}
    expected = model.generate(ids, **options)
    model.config.use_cache = model.generation_config.use_cache = not in_config
    found = model.generate(ids, **options) if in_config else model.generate(ids, use_cache=False, **options)
    assert torch.equal(found, expected)
    output = model(ids, use_cache=False)
    assert output.past_key_values is None


def test_a_cache_answers_as_a_dynamic_cache_does() -> None:
    """Truth, layers, tokens: library code asks before it uses one."""
    model, ids = llama(), some_ids()
    theirs = DynamicCache(config=model.config)
    model(ids, past_key_values=theirs)
    attached = attach(model, SEP)
    empty, ours = attached.new_cache(), attached.new_cache()
    model(ids, past_key_values=ours)
    for ask in (bool, len, lambda c: c.is_initialized, lambda c: c.get_seq_length()):
        assert ask(ours) == ask(theirs)
    fresh = DynamicCache(config=model.config)
    for ask in (bool, len, lambda c: c.is_initialized, lambda c: c.get_seq_length()):
        assert ask(empty) == ask(fresh)
    assert (ours.is_sliding, ours.is_linear, ours.is_dummy) == (theirs.is_sliding, theirs.is_linear, theirs.is_dummy)
    assert ours.get_max_length() == theirs.get_max_length()


def test_phi_3_changes_its_rotation_as_without_the_cache() -> None:
    """Beyond its first length the model starts its cache over, if it finds that there is one."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 24}
    sizes = SIZES | {"max_position_embeddings": 64, "original_max_position_embeddings": 24}
    config = Phi3Config(**sizes, num_key_value_heads=2, rope_parameters=rope, pad_token_id=0, sliding_window=None)
    model, ids = Phi3ForCausalLM(config).eval().double(), some_ids(length=18)
    options = GREEDY | {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(ids, **options)
    attach(model, AttentionPattern())
    found = model.generate(ids, **options)
    close(torch.stack(found.logits), torch.stack(expected.logits))


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Numbers of documents and positions in them, [1, T]."""
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return document, torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("policy", [SEP, StreamingPattern(2, 4, 6, 20, SEPARATORS, "text")])
def test_packed_documents_are_texts_of_their_own(policy: Any) -> None:
    """By positions that begin at 0 again, by a mask of blocks, or both; and the text goes on behind the last one."""
    lengths = [9, 1, 14, 6]
    ids, (document, positions) = some_ids(rows=1), packed(lengths)
    blocks = (document[:, :, None] == document[:, None]) & torch.ones(30, 30, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 30, 30, dtype=torch.float64).masked_fill(~blocks[:, None], torch.finfo(torch.float64).min)
    model = gpt2()
    attached = attach(model, policy)
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    close(model(ids, position_ids=positions).logits, alone)
    close(model(ids, position_ids=positions, attention_mask=blocks[:, None]).logits, alone)
    close(model(ids, position_ids=positions, attention_mask=added).logits, alone)
    cache = attached.new_cache()
    parts = zip(ids.split([13, 17], 1), positions.split([13, 17], 1), strict=True)
    close(torch.cat([model(i, position_ids=p, past_key_values=cache).logits for i, p in parts], 1), alone)
    more, last = some_ids(rows=1, length=2, seed=5), attached.new_cache()
    model(ids[:, -6:], past_key_values=last)
    for part in more.split(1, dim=1):
        close(model(part, past_key_values=cache).logits, model(part, past_key_values=last).logits)


def test_positions_that_say_nothing_new_are_taken() -> None:
    """Those that `generate` counts, with padding on the left, one row for all texts, and behind a cache."""
    model, ids = llama(), some_ids()
    attached = attach(model, SEP)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask).logits
    close(model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()], expected[mask.bool()])
    square = (mask.bool()[:, None, None] & torch.ones(30, 30, dtype=torch.bool).tril()).clone()
    close(model(ids, attention_mask=square).logits[mask.bool()], expected[mask.bool()])
    cache = attached.new_cache()
    model(ids[:, :20], past_key_values=cache)
    rest = model(ids[:, 20:], past_key_values=cache, position_ids=torch.arange(20, 30)[None]).logits
    close(rest, model(ids).logits[:, 20:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.arange(5, 35)[None]}, "position_ids: 5 for token 0 of row 0, which stands at 0"),
        ({"position_ids": torch.arange(60).view(2, 30)}, "position_ids: 30 for token 0 of row 1"),
        ({"position_ids": torch.arange(29)[None]}, r"position_ids of shape \(1, 29\)"),
        ({"attention_mask": torch.ones(2, 1, 30, 30)}, "is not causal attention within documents"),
        ({"attention_mask": torch.zeros(2, 1, 30, 30)}, "is not causal attention within documents"),
        ({"attention_mask": torch.ones(2, 30, 30)}, r"attention_mask of shape \(2, 30, 30\)"),
        ({"attention_mask": torch.ones(2, 31)}, r"attention_mask of shape \(2, 31\) .* behind 0"),
        ({"attention_mask": torch.arange(60).view(2, 30)}, "values from 0 to 59: .* packed documents by position_ids"),
    ],
)
def test_what_would_be_misread_is_refused(given: dict[str, Any], message: str) -> None:
    model = llama()
    attach(model, SEP)
    with pytest.raises(AttachError, match=message):
        model(some_ids(), **given)


def test_policies_that_know_no_documents_refuse_packed_ones() -> None:
    model = llama()
    attach(model, SnapKV(8, 2, 3))
    with pytest.raises(CacheError, match=r"packed documents with SnapKV.*a text of its own"):
        model(some_ids(rows=1), position_ids=packed([10, 20])[1])


def test_a_layer_that_attends_twice_is_refused() -> None:
    model = DiffLlamaForCausalLM(DiffLlamaConfig(num_key_value_heads=2, **SIZES)).eval()
    attached = attach(model, SEP)
    with pytest.raises(AttachError, match=r"DiffLlamaAttention: layer 0 attends twice.*detach"):
        model(some_ids())
    attached.detach()
    assert model(some_ids()).logits.isfinite().all()


def texts(model: Any, cache: Any, ids: Tensor) -> Iterator[Tensor]:
    """Logits of a text, as it is read in chunks and token by token."""
    for part in ids.split([9, 1, 1, 12, 1, 6], dim=1):
        yield model(part, past_key_values=cache).logits


def test_heads_with_policies_of_their_own_in_a_batch() -> None:
    """Each text as alone, and a chunk as its tokens, whatever the strides of the queries."""
    model, ids = llama(), some_ids(rows=3)
    attached = attach(model, (SEP, AttentionPattern(window=5, stride=4)))
    alone = torch.cat([model(row[None]).logits for row in ids])
    close(model(ids).logits, alone)
    cache = attached.new_cache()
    close(torch.cat([model(part, past_key_values=cache).logits for part in ids.split(1, dim=1)], 1), alone)


@pytest.mark.parametrize("policy", [SEP, StreamingPattern(2, 4, 6, 20, SEPARATORS)])
def test_texts_interleaved_on_one_model_equal_each_alone(policy: Any) -> None:
    model = llama()
    attached = attach(model, policy)
    ids = [some_ids(rows=1, seed=seed) for seed in range(3)]
    alone = [list(texts(model, attached.new_cache(), each)) for each in ids]
    together = zip(*(texts(model, attached.new_cache(), each) for each in ids), strict=True)
    for step, found in enumerate(together):
        for row, logits in enumerate(found):
            assert torch.equal(logits, alone[row][step])


def test_threads_share_a_model() -> None:
    """Six texts in three threads: each as alone."""
    model = llama()
    attached = attach(model, StreamingPattern(2, 4, 6, 20, SEPARATORS))

    def whole(seed: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([*texts(model, attached.new_cache(), some_ids(rows=1, seed=seed))], dim=1)

    alone = [whole(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for found, expected in zip(pool.map(whole, range(6)), alone, strict=True):
            assert torch.equal(found, expected)


def test_encoders_are_refused() -> None:
    model = BertModel(BertConfig(**SIZES))
    with pytest.raises(AttachError, match=r"BertModel \(bert\): its tokens see later ones too.*is_decoder=True"):
        attach(model, SEP)


def test_positions_and_windows_of_its_own_kind_are_refused() -> None:
    """RoBERTa counts no padding by its id; Moshi has a window that its masks do not know."""
    roberta = RobertaForCausalLM(RobertaConfig(**SIZES, is_decoder=True))
    with pytest.raises(AttachError, match=r"RobertaModel \(roberta\): leaves padding out of its positions by its id"):
        attach(roberta, SEP)
    moshi = MoshiForCausalLM(MoshiConfig(**SIZES, num_key_value_heads=4, ffn_dim=48, sliding_window=9))
    with pytest.raises(AttachError, match=r"MoshiModel \(moshi\): has sliding_window=9 and makes no mask of it"):
        attach(moshi, SEP)


def test_a_cache_keeps_its_number_of_texts() -> None:
    model = llama()
    attached = attach(model, SEP)
    cache = attached.new_cache()
    model(some_ids(rows=1), past_key_values=cache)
    with pytest.raises(CacheError, match=r"holds 1 texts, and 2 came; .*batch_select_indices"):
        model(some_ids(rows=2), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    model(some_ids(rows=2), past_key_values=cache)


@pytest.mark.parametrize(
    "ids",
    [[3, 1], (3, 1), {3, 1}, torch.tensor([3, 1]), numpy.array([3, 1]), iter((3, 1)), torch.tensor([3, 1]).unbind()],
)
@pytest.mark.parametrize("kind", [AttentionPattern, lambda **ids: StreamingPattern(1, 2, 3, 9, **ids)])
def test_separator_ids_of_any_kind(ids: Any, kind: Any) -> None:
    """They become a tuple of integers; so a policy has a hash, which a cache needs."""
    ids = iter((3, 1)) if isinstance(ids, Iterator) else ids
    found = kind(separator_ids=ids)
    assert found.separator_ids == ((1, 3) if isinstance(ids, set) else (3, 1))
    assert all(type(i) is int for i in found.separator_ids)
    assert isinstance(hash(found), int)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionPattern(separator_ids=".,;"), "separator_ids='.,;': pass token ids"),
        (lambda: AttentionPattern(separator_ids=13), "separator_ids=13: pass token ids"),
        (lambda: AttentionPattern(separator_ids=(".", 3)), r"separator_ids=\['.'\]: a token id is a whole number"),
        (lambda: AttentionPattern(separator_ids=torch.tensor([1.5])), r"separator_ids=\[1.5\]: a token id is a whole"),
        (lambda: AttentionPattern(window=6.5), "window=6.5: must be a whole number, is a float"),
        (lambda: StreamingPattern(2, "4", 6, 20), "separators='4': must be a whole number, is a str"),
        (lambda: attach(llama(), "sep"), "policy='sep': pass an AttentionPattern"),
        (lambda: attach(llama(), AttentionPattern), "policy=<class .*: pass an AttentionPattern"),
        (lambda: attach(llama(), [SEP, None]), "policy=None: pass an AttentionPattern"),
        (lambda: attach(llama(), SEP, document_end="</s>"), "document_end='</s>': pass the id of a token, or None"),
    ],
)
def test_wrong_types_are_told_before_the_first_pass(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_separators_of_the_past_window_are_told_from_those_kept() -> None:
    """Every other token is one. Those that came since the last eviction wait for the next one."""
    model = llama()
    attached = attach(model, StreamingPattern(2, 4, 6, 20, SEPARATORS))
    cache = attached.new_cache()
    for part in torch.tensor([[1, 9] * 13 + [1]]).split(9, dim=1):
        model(part, past_key_values=cache)
    ((_, blocks),) = cache.blocks()
    # the eviction at 20 tokens left 2 + 4 + 6; the window has moved on by 7 tokens since, 4 of them separators
    told = {"sinks": 2, "separators": 4, "separators of the past window": 4, "past window": 3, "to be freed": 0}
    assert blocks == told | {"window": 6}
