"""SepCache against the mask, itself in other chunks, and itself with other neighbours: attention alone, float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.layer_policies import LayerPolicy
from megatron_sep.generate.rotary import Rotary
from megatron_sep.generate.slots import Slots

HEADS, KEY_HEADS, SIZE, VOCABULARY, END = 4, 2, 4, 5, 4
cases = random_cases(2000)


@dataclass(frozen=True)
class Texts:
    """Left-padded texts and, for each layer, queries, keys and values of their tokens; split into chunks."""

    ids_BT: Tensor
    real_BT: Tensor
    tensors_L: list[tuple[Tensor, Tensor, Tensor]]
    chunks: list[int]

    def alone(self, row: int) -> "Texts":
        """One text without its padding."""
        real = self.real_BT[row]
        tensors = [tuple(t[row : row + 1, :, real] for t in layer) for layer in self.tensors_L]
        ids = self.ids_BT[row : row + 1, real]
        return Texts(ids, torch.ones_like(ids, dtype=torch.bool), tensors, self._chunks_without_padding(row))  # type: ignore[arg-type]

    def _chunks_without_padding(self, row: int) -> list[int]:
        return [n for n in (int(part.sum()) for part in self.real_BT[row].split(self.chunks)) if n]

    def run(self, cache: SepCache) -> tuple[Tensor, Tensor]:
        """Attention of all tokens in all layers, [L, B, H, T, D], and the position ids, [B, T]."""
        outs, positions, begin = [], [], 0
        for length in self.chunks:
            columns = slice(begin, begin + length)
            positions.append(cache.begin(self.ids_BT[:, columns], self.real_BT[:, columns]))
            layers = [
                cache.attend(layer, *(t[:, :, columns] for t in tensors), 0.5)
                for layer, tensors in enumerate(self.tensors_L)
            ]
            cache.end()
            outs.append(torch.stack(layers))
            begin += length
        return torch.cat(outs, dim=3), torch.cat(positions, dim=1)


@st.composite
def texts(draw: st.DrawFn, rows: int = 2, layers: int = 2, longest: int = 14) -> Texts:
    """Rows of unequal length; the chunks of a batch are whatever."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    length = draw(st.integers(1, longest))
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    padding = torch.tensor([[draw(st.integers(0, length - 1))] for _ in range(rows)])
    chunks, left = [], length
    while left:
        chunks.append(draw(st.integers(1, left)) if draw(st.booleans()) else 1)
        left -= chunks[-1]
    shapes = [(rows, heads, length, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    tensors = [
        tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes) for _ in range(layers)
    ]
    return Texts(ids, torch.arange(length) >= padding, tensors, chunks)  # type: ignore[arg-type]


@st.composite
def patterns(draw: st.DrawFn) -> AttentionPattern:
    window = draw(st.integers(1, 8) | st.none())
    stride = draw(st.none() | st.integers(1, 4))
    return AttentionPattern(window, draw(st.integers(0, 3)), draw(st.sampled_from([(), (1,), (0, 1, 2)])), stride)


@st.composite
def streaming(draw: st.DrawFn) -> StreamingPattern:
    a, s, w = draw(st.integers(0, 2)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    positions = draw(st.sampled_from(["cache", "text", "frozen"]))
    return StreamingPattern(a, s, w, a + s + w + draw(st.integers(1, 3)), (1, 2), positions)


@st.composite
def policies(draw: st.DrawFn) -> list[LayerPolicy]:
    """For two layers: masks, all alike or not, one for each key head, or streams, of sizes of their own too."""
    masks = st.tuples(patterns(), patterns())
    return draw(
        st.builds(list, masks)
        | st.builds(list, st.tuples(masks, patterns()))
        | st.builds(lambda policy: [policy, policy], streaming() | patterns())
        | st.builds(_two_sizes, streaming(), streaming())
    )


def _two_sizes(one: StreamingPattern, two: StreamingPattern) -> list[LayerPolicy]:
    positions = "text" if one.positions == "frozen" else one.positions  # frozen ones would differ between the layers
    return [replace(one, positions=positions), replace(two, positions=positions)]


def new_cache(policy: list[LayerPolicy], slack: int = 1, document_end: int | None = None) -> SepCache:
    rotary = Rotary(torch.tensor([0.7]))
    return SepCache(policy, vocab_size=VOCABULARY, rotary=rotary, slack=slack, document_end=document_end)


def masked(texts: Texts, layer: int, pattern: AttentionPattern, document_end: int | None = None) -> Tensor:
    """Attention under the whole mask, each text alone: [B, H, T, D], zero at padding."""
    out = torch.zeros_like(texts.tensors_L[layer][0])
    for row in range(len(texts.ids_BT)):
        real = texts.real_BT[row]
        ids = texts.ids_BT[row : row + 1, real]
        document = None
        if document_end is not None:
            ends = (ids == document_end).long()
            document = ends.cumsum(1) - ends
        seen = pattern.plan(ids, document).dense()[0]
        q, k, v = (t[row][:, real] for t in texts.tensors_L[layer])
        k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 0) for t in (k, v))
        out[row][:, real] = (0.5 * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return out


def kept(cache: SepCache, row: int) -> list[list[int]]:
    """Text positions that a text's rows hold, in every group."""
    found = []
    for group in cache.groups.values():
        assert isinstance(group, Slots)
        heads = len(group.policies)
        for index in range(row * heads, (row + 1) * heads):
            found.append(group.place_RC[index, : group.length_R[index]].tolist())
    return found


@cases
@given(texts(), patterns(), st.booleans(), st.integers(1, 4), st.sampled_from([None, END]))
def test_cache_is_the_mask_at_every_step(
    text: Texts, pattern: AttentionPattern, hybrid: bool, slack: int, document_end: int | None
) -> None:
    """Whatever the chunks and the padding, in a full and a sparse layer, with documents and without."""
    layers = [AttentionPattern() if hybrid else pattern, pattern]
    out, positions = text.run(new_cache(list(layers), slack, document_end))
    for layer, own in enumerate(layers):
        torch.testing.assert_close(out[layer], masked(text, layer, own, document_end), rtol=0, atol=1e-12)
    assert torch.equal(positions[text.real_BT], (text.real_BT.cumsum(1) - 1)[text.real_BT])


@cases
@given(texts(longest=18), st.integers(0, 3), st.integers(1, 4), st.booleans())
def test_unbounded_stream_is_the_mask(text: Texts, sinks: int, window: int, never: bool) -> None:
    """No capacity: everything is seen. All separators kept, an eviction a token: the mask of a window one wider."""
    if never:
        stream, mask = StreamingPattern(sinks, None, window, None, (1, 2), "text"), AttentionPattern()
    else:
        stream = StreamingPattern(sinks, None, window, sinks + window + 1, (1, 2), "text")
        mask = AttentionPattern(window + 1, sinks, (1, 2))
    out, _ = text.run(new_cache([stream, stream]))
    for layer in range(2):
        torch.testing.assert_close(out[layer], masked(text, layer, mask), rtol=0, atol=1e-12)


@cases
@given(texts(rows=3), policies(), st.integers(0, 2))
def test_row_does_not_depend_on_its_neighbours(text: Texts, policy: list[LayerPolicy], row: int) -> None:
    """A text of a ragged batch gives the bits, the positions and the kept tokens that it gives alone."""
    together, apart = new_cache(policy), new_cache(policy)
    out, positions = text.run(together)
    single, single_positions = text.alone(row).run(apart)
    real = text.real_BT[row]
    assert torch.equal(out[:, row][:, :, real], single[:, 0])
    assert torch.equal(positions[row, real], single_positions[0])
    assert kept(together, row) == kept(apart, 0)


@cases
@given(texts(), policies(), st.sampled_from([None, END]))
def test_chunks_are_single_steps(text: Texts, policy: list[LayerPolicy], document_end: int | None) -> None:
    """Chunks of any size leave the same tokens as one token after another, and give the same attention."""
    steps = replace(text, chunks=[1] * text.ids_BT.shape[1])
    chunked, stepped = new_cache(policy, 1, document_end), new_cache(policy, 1, document_end)
    out, positions = text.run(chunked)
    other, other_positions = steps.run(stepped)
    torch.testing.assert_close(out, other, rtol=0, atol=1e-12)
    assert torch.equal(positions[text.real_BT], other_positions[text.real_BT])
    assert chunked.retention().live == stepped.retention().live
    for row in range(2):
        assert kept(chunked, row) == kept(stepped, row)


@cases
@given(texts(), policies(), st.sampled_from([None, END]))
def test_the_counter_is_the_slots_that_were_attended_to(
    text: Texts, policy: list[LayerPolicy], document_end: int | None
) -> None:
    """Equal scores over values that are each a direction of their own: what was attended to can be read off."""
    rows, length = text.ids_BT.shape
    size = max(length, 2)  # of a head: a pair of values turns by an angle
    q, k = (torch.zeros(rows, heads, length, size, dtype=torch.float64) for heads in (HEADS, KEY_HEADS))
    apart = torch.eye(length, size, dtype=torch.float64).expand_as(k)
    cache = new_cache(policy, 1, document_end)
    out, _ = replace(text, tensors_L=[(q, k, apart)] * 2).run(cache)
    attended_BT = (out != 0).sum(-1).double().mean((0, 2))
    assert cache.retention().seen == pytest.approx(float(attended_BT[text.real_BT].sum()), abs=1e-9)
    assert cache.retention().queries == int(text.real_BT.sum())


@random_cases(300)
@given(texts(rows=1, layers=1, longest=20), streaming())
def test_positions_inside_the_cache(text: Texts, stream: StreamingPattern) -> None:
    """A key turns by its index among the kept tokens, the query by the index behind them."""
    policy = replace(stream, positions="cache")
    cache, turn = new_cache([policy]), Rotary(torch.tensor([0.7]))
    text = text.alone(0)
    before: list[int] = []
    q, k, v = text.tensors_L[0]
    for t in range(text.ids_BT.shape[1]):
        cache.begin(text.ids_BT[:, t : t + 1])
        out = cache.attend(0, q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], 0.5)
        cache.end()
        entries = [*before, t]
        keys = turn.rotate(k[0][:, entries], 0).repeat_interleave(HEADS // KEY_HEADS, 0)
        values = v[0][:, entries].repeat_interleave(HEADS // KEY_HEADS, 0)
        query = turn.rotate(q[0][:, t : t + 1], len(before))
        expected = (0.5 * query @ keys.mT).softmax(-1) @ values
        torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-6)  # tables of angles are float32
        before = kept(cache, 0)[0]
