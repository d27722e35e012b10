"""Loss of long texts: window by window and through a cache, against one masked full forward pass."""

from typing import Any

import pytest
import torch
from support.models import MODELS, VOCAB, hugging_face, with_masks
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.evaluate.stretches import flow, slide, together, windows
from megatron_sep.evaluate.texts import EvaluationError
from megatron_sep.generate.attach import Attachment, attach

TOKENS = 150
PATTERN = AttentionPattern(window=7, sinks=2, separator_ids=(3, 5, 8, 13))
CONFIG = MODELS["llama, grouped heads, scaled rotation"]


@pytest.fixture(scope="module")
def ids_N() -> Tensor:
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def attached() -> tuple[Any, Attachment]:
    model = hugging_face(CONFIG).eval()
    return model, attach(model, PATTERN)


@torch.no_grad()
def masked_losses(ids_N: Tensor) -> Tensor:
    """Nats of every token after the first, from a forward pass of transformers under the dense mask."""
    model = hugging_face(CONFIG).eval()
    with_masks(model, (PATTERN.plan(ids_N[None]),) * CONFIG.num_layers)
    return cross_entropy(model(ids_N[None]).logits[0, :-1], ids_N[1:], reduction="none").double()


def test_windows_predict_every_token_once() -> None:
    """All lengths up to 40: the windows' predicted parts join without a gap, behind enough context."""
    for tokens in range(2, 40):
        for length, stride in ((2, 1), (8, 3), (8, 7), (16, 8), (64, 32)):
            found = windows(tokens, length, stride)
            predicted = [t for each in found for t in range(max(each.first, each.begin + 1), each.end)]
            assert predicted == list(range(1, tokens))
            assert all(each.first - each.begin >= length - stride for each in found[1:])
    with pytest.raises(EvaluationError, match="--stride 8: must be from 1 to 7"):
        windows(20, 8, 8)


def test_windows_are_the_masked_forward_pass(attached: tuple[Any, Attachment], ids_N: Tensor) -> None:
    """Loss within 1e-5 of the dense mask over each window, whatever the batch."""
    chosen = windows(TOKENS, 32, 16)
    expected = sum(
        float(masked_losses(ids_N[each.begin : each.end])[max(each.first - each.begin - 1, 0) :].sum())
        for each in chosen
    )
    for batch in (1, 3):
        found = together(list(slide(*attached, ids_N, chosen, batch)))
        assert found.tokens == TOKENS - 1
        assert found.end == TOKENS
        assert found.nats == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("chunk", [1, 5, 25])
def test_a_stream_is_the_masked_forward_pass(attached: tuple[Any, Attachment], ids_N: Tensor, chunk: int) -> None:
    """Each stretch has the loss of its tokens under the dense mask, and the share of keys that the mask has."""
    stretches = list(flow(*attached, ids_N, chunk=chunk, every=25))
    losses = masked_losses(ids_N)
    assert [each.end for each in stretches] == [26, 51, 76, 101, 126, 150]
    for each, expected in zip(stretches, losses.split(25), strict=True):
        assert each.loss == pytest.approx(float(expected.mean()), abs=1e-5)
    visible = PATTERN.plan(ids_N[None, :-1]).num_visible().sum()
    whole = together(stretches)
    assert whole.seen == float(visible)
    assert whole.retention == pytest.approx(float(visible) / (TOKENS * (TOKENS - 1) / 2))


def test_a_stream_stays_small(ids_N: Tensor) -> None:
    """Under a cache of bounded size each query sees less than its capacity, and chunks say what single tokens do."""
    model = hugging_face(CONFIG).eval()
    attachment = attach(model, StreamingPattern(2, 4, 8, 20, (3, 5, 8, 13)))
    single, chunked = (list(flow(model, attachment, ids_N, chunk=chunk, every=50)) for chunk in (1, 10))
    assert all(each.seen / each.queries <= 20 for each in single)
    for one, other in zip(single, chunked, strict=True):
        assert (one.seen, one.all) == (other.seen, other.all)
        assert one.nats == pytest.approx(other.nats, abs=1e-3)
    with pytest.raises(EvaluationError, match="--every 50: must be a multiple of --chunk 20"):
        next(flow(model, attachment, ids_N, chunk=20, every=50))
