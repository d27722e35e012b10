"""ALiBi, bilevel positions and the self-adjusting softmax: training, a prompt at once and a token at a time agree."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model.test_positions import KINDS, SEPARATORS, small
from support.cases import random_cases
from support.models import VOCAB
from torch import Tensor

from megatron_sep.attention.bilevel import Bilevel
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.rules import LayerRules
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.config.schema import AttentionConfig, ModelConfig
from megatron_sep.generate.attach import attach
from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.layer_policies import CacheError
from megatron_sep.generate.load import with_positions
from megatron_sep.generate.policies import H2O
from megatron_sep.model.build import build_model
from megatron_sep.parallel.groups import topology

END = 3
NAMES = sorted(KINDS)
TOKENIZER = SimpleNamespace(vocab_size=VOCAB, eod_id=END, special_ids=frozenset({END}))


@dataclass
class Held:
    """The weights of a model in memory, as a source of weights."""

    model: Any
    config: ModelConfig
    vocab_size: int = VOCAB
    attention: AttentionConfig = AttentionConfig()  # noqa: RUF009
    tokenizer: None = None

    def weight(self, name: str) -> Tensor:
        return self.model.state_dict()[name].detach().clone()

    def __iter__(self) -> Any:
        yield {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[ModelConfig, Any, Any]]:
    """Of each kind: the configuration, the model that trains, and transformers' with the same weights."""
    return {}


def pair(models: dict[str, tuple[ModelConfig, Any, Any]], kind: str) -> tuple[ModelConfig, Any, Any]:
    if kind not in models:
        config = small(**KINDS[kind])
        model = build_model(config, topology(), vocab_size=VOCAB, precision="fp32", seed=7, backend="reference").eval()
        source: Any = Held(model, config)
        models[kind] = config, model, with_positions(source, TOKENIZER, torch.device("cpu"), None)  # type: ignore[arg-type]
    return models[kind]


@st.composite
def patterns(draw: st.DrawFn) -> AttentionPattern:
    window = draw(st.integers(1, 8) | st.none())
    return AttentionPattern(window, draw(st.integers(0, 3)), draw(st.sampled_from([(), SEPARATORS])))


def trained_logits(
    config: ModelConfig, model: Any, each: list[AttentionPattern], ids: Tensor, end: int | None
) -> Tensor:
    bilevel = Bilevel(SEPARATORS, config.position.length) if config.position.bilevel else None
    rules = LayerRules(tuple(each), AttentionPattern(), end, bilevel)
    logits: Tensor = model(ids, rules.positions(ids), rules.plans(ids))
    return logits


@random_cases(2000)
@torch.no_grad()
@given(data=st.data(), kind=st.sampled_from(NAMES), end=st.sampled_from([None, END]), seed=st.integers(0, 2**31))
@pytest.mark.usefixtures("single_process")
def test_training_prompt_and_steps_agree(
    models: Any, data: st.DataObject, kind: str, end: int | None, seed: int
) -> None:
    """Logits to 1e-5 for any pattern a layer, documents, padding on the left, cut into any chunks and steps."""
    config, model, theirs = pair(models, kind)
    generator = torch.Generator().manual_seed(seed)
    rows, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 18))
    ids = torch.randint(1, 8, (rows, length), generator=generator)
    padding = [data.draw(st.integers(0, length - 1)) for _ in range(rows)] if data.draw(st.booleans()) else [0] * rows
    each = [data.draw(patterns()), data.draw(patterns())]
    attachment = attach(theirs, each, document_end=end, slack=data.draw(st.integers(1, 4)))
    cache, found, begin = attachment.new_cache(), [], 0
    mask = torch.stack([torch.arange(length) >= p for p in padding]).long()
    while begin < length:
        size = data.draw(st.integers(1, length - begin)) if data.draw(st.booleans()) else 1
        part = slice(begin, begin + size)
        padded = mask[:, part] if not mask[:, part].all() else None
        found.append(theirs(ids[:, part], attention_mask=padded, past_key_values=cache).logits)
        begin += size
    logits = torch.cat(found, 1)
    for row, p in enumerate(padding):
        expected = trained_logits(config, model, each, ids[row : row + 1, p:], end)
        torch.testing.assert_close(logits[row, p:], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("positions", ["text", "cache"])
@torch.no_grad()
def test_distances_of_a_bounded_cache_are_those_that_it_is_asked_for(models: Any, positions: Any) -> None:
    """ALiBi with a capacity: in the text, or between places in the cache, token by token and in chunks alike."""
    _, _, theirs = pair(models, "alibi")
    policy = StreamingPattern(1, 2, 3, 9, SEPARATORS, positions)
    ids = torch.randint(1, 8, (2, 40), generator=torch.Generator().manual_seed(1))
    outcomes = []
    for sizes in ([1] * 40, [13, 1, 1, 25]):
        cache = attach(theirs, policy).new_cache()
        outcomes.append(torch.cat([theirs(part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-5)
    other = StreamingPattern(1, 2, 3, 9, SEPARATORS, "cache" if positions == "text" else "text")
    cache = attach(theirs, other).new_cache()
    assert not torch.allclose(theirs(ids, past_key_values=cache).logits, outcomes[0], atol=1e-3)


@pytest.mark.usefixtures("single_process")
@torch.no_grad()
def test_beams_take_their_counts_along(models: Any) -> None:
    """Texts that change places in the batch, are repeated or left out go on as each alone."""
    for kind in ("bipe, rotary", "bipe, alibi"):
        config, model, theirs = pair(models, kind)
        each = [AttentionPattern(4, 1, SEPARATORS), AttentionPattern()]
        ids = torch.randint(1, 8, (3, 12), generator=torch.Generator().manual_seed(2))
        cache = attach(theirs, each).new_cache()
        theirs(ids, past_key_values=cache)
        rows = torch.tensor([2, 0, 0, 1])
        cache.batch_select_indices(rows)
        new = torch.tensor([[5], [1], [6], [7]])
        logits = theirs(new, past_key_values=cache).logits[:, -1]
        expected = trained_logits(config, model, each, torch.cat([ids[rows], new], 1), None)[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("single_process")
def test_what_does_not_go_together_is_refused(models: Any) -> None:
    """Before anything is computed, by name."""
    stream = StreamingPattern(1, 2, 3, 9, SEPARATORS, "cache")
    for kind, policy, message in (
        ("alibi", StreamingPattern(1, 2, 3, 9, SEPARATORS, "frozen"), "a model with ALiBi counts them in the text"),
        ("bipe, rotary", stream, "a model with bilevel positions counts them in the text"),
        ("rotary, self-adjusting", stream, "self-adjusting softmax counts them in the text"),
        ("alibi", H2O(2, 2), "looks at scores of the plain kind, and the model has ALiBi"),
    ):
        with pytest.raises(AttachError, match=message):
            attach(pair(models, kind)[2], policy)
    theirs = pair(models, "bipe, rotary")[2]
    cache = attach(theirs, AttentionPattern(4)).new_cache()
    with torch.no_grad():
        theirs(torch.tensor([[5, 6, 7, 5]]), past_key_values=cache)
    with pytest.raises(CacheError, match="of bilevel positions what was counted is not taken back"):
        cache.crop(-1)
