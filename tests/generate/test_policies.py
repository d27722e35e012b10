"""The score-based baselines against kvpress, against their papers played out with lists, and against themselves."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from generate import make_kvpress_golden as golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.generate import scored
from megatron_sep.generate.attach import Attachment, attach
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.layer_policies import CacheError, LayerPolicy, head_policies
from megatron_sep.generate.policies import H2O, ScorePolicy, SnapKV, pyramid_kv
from megatron_sep.generate.policies import softmax as wide_softmax
from megatron_sep.generate.scored import HeavyHitters, Prompts

HEADS, KEY_HEADS, SIZE, LAYERS, SCALE = 4, 2, 3, 2, 0.7
GROUP = HEADS // KEY_HEADS
cases = settings(max_examples=150, deadline=None)
heavy_hitters = st.builds(H2O, st.integers(1, 5), st.integers(0, 5)) | st.builds(H2O, st.just(0), st.integers(1, 5))
poolings = st.sampled_from(["mean", "max"])


@st.composite
def snapshots(draw: st.DrawFn) -> SnapKV:
    window = draw(st.integers(1, 4))
    return SnapKV(window + draw(st.integers(0, 5)), window, draw(st.sampled_from([1, 3, 5])), draw(poolings))


@dataclass(frozen=True)
class Texts:
    """Left-padded texts, and queries, keys and values of their tokens in each layer: NaN at padding; some chunks."""

    lengths: list[int]
    tensors_L: list[tuple[Tensor, Tensor, Tensor]]
    chunks: list[int]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def alone(self, row: int) -> "Texts":
        """One text without its padding."""
        padding, chunks, begin = self.longest - self.lengths[row], [], 0
        for chunk in self.chunks:
            chunks.append(min(chunk, max(0, begin + chunk - padding)))
            begin += chunk
        tensors = [tuple(t[row : row + 1, :, padding:] for t in layer) for layer in self.tensors_L]
        return Texts([self.lengths[row]], tensors, [n for n in chunks if n])  # type: ignore[arg-type]

    def cut(self, *chunks: int) -> "Texts":
        assert sum(chunks) == self.longest
        return Texts(self.lengths, self.tensors_L, list(chunks))

    def run(self, cache: SepCache, begin: int = 0) -> Tensor:
        """Attention of the tokens of all chunks, the first in column ``begin``: [L, B, H, T, D]."""
        real_BT = torch.arange(self.longest) >= self.longest - torch.tensor(self.lengths)[:, None]
        outs = []
        for chunk in self.chunks:
            columns = slice(begin, begin + chunk)
            cache.begin(torch.zeros(len(real_BT), chunk, dtype=torch.long), real_BT[:, columns])
            layers = [
                cache.attend(layer, *(t[:, :, columns] for t in tensors), SCALE)
                for layer, tensors in enumerate(self.tensors_L)
            ]
            cache.end()
            outs.append(torch.stack(layers))
            begin += chunk
        return torch.cat(outs, dim=3)


def made_texts(seed: int, lengths: list[int], chunks: list[int] | None = None) -> Texts:
    generator, tensors = torch.Generator().manual_seed(seed), []
    for _layer in range(LAYERS):
        layer = [
            torch.randn(len(lengths), heads, max(lengths), SIZE, generator=generator, dtype=torch.float64) * size
            for heads, size in ((HEADS, 1.5), (KEY_HEADS, 1.5), (KEY_HEADS, 1.0))
        ]
        for t in layer:
            for row, length in enumerate(lengths):
                t[row, :, : max(lengths) - length] = torch.nan
        tensors.append(tuple(layer))
    return Texts(lengths, tensors, [max(lengths)] if chunks is None else chunks)  # type: ignore[arg-type]


@st.composite
def texts(draw: st.DrawFn, rows: int = 1, longest: int = 16) -> Texts:
    lengths = [draw(st.integers(1, longest)) for _ in range(rows)]
    chunks, left = [], max(lengths)
    while left:
        chunks.append(draw(st.integers(1, left)))
        left -= chunks[-1]
    return made_texts(draw(st.integers(0, 2**32)), lengths, chunks)


def new_cache(*policies: LayerPolicy) -> SepCache:
    return SepCache(policies if len(policies) > 1 else policies * LAYERS, vocab_size=1)


def group(cache: SepCache) -> Any:
    """That of the first layer."""
    return cache.groups[cache.policies[0]]


def places(cache: SepCache, layer: int, row: int) -> list[list[int]]:
    """Text positions that each key head keeps, ascending; layers have the same policy."""
    layers = group(cache).layers
    heads_KE = layers[layer][row].place_KE if isinstance(group(cache), Prompts) else layers[layer].place_BKC[row]
    return [sorted(place for place in head if place >= 0) for head in heads_KE.tolist()]


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s) for s in scores]
    return [p / sum(powers) for p in powers]


class Head:
    """A key head of a layer with its query heads, in lists: what a query attends to, and what it sees."""

    def __init__(self, text: Texts, layer: int, head: int) -> None:
        q, k, v = (t[0] for t in text.tensors_L[layer])
        self.q_GTD = q[head * GROUP : (head + 1) * GROUP].tolist()
        self.k_TD, self.v_TD = k[head].tolist(), v[head].tolist()

    def weights(self, query: int, keys: list[int]) -> list[list[float]]:
        """Of each query head."""
        return [
            softmax([SCALE * sum(a * b for a, b in zip(q_TD[query], self.k_TD[j], strict=True)) for j in keys])
            for q_TD in self.q_GTD
        ]

    def out(self, query: int, keys: list[int]) -> list[list[float]]:
        return [
            [sum(w * self.v_TD[j][d] for w, j in zip(weights, keys, strict=True)) for d in range(SIZE)]
            for weights in self.weights(query, keys)
        ]

    def h2o(self, policy: H2O) -> tuple[list[Any], list[int]]:
        """Algorithm 1: attention of each token, and what is kept in the end."""
        kept: list[int] = []
        score = [0.0] * len(self.k_TD)
        outs = []
        for i in range(len(self.k_TD)):
            kept = [*kept, i]
            outs.append(self.out(i, kept))
            for weights in self.weights(i, kept):
                for j, weight in zip(kept, weights, strict=True):
                    score[j] += weight / GROUP
            old, recent = [j for j in kept if j <= i - policy.recent], [j for j in kept if j > i - policy.recent]
            if len(kept) > policy.heavy + policy.recent:
                old = sorted(sorted(old, key=lambda j: -score[j])[: policy.heavy])
            kept = old + recent
        return outs, kept

    def snap_kv(self, policy: SnapKV, prompt: int) -> list[int]:
        """What is kept of a prompt of so many tokens."""
        if prompt <= policy.budget:
            return list(range(prompt))
        past, half = prompt - policy.window, policy.kernel // 2
        total = [0.0] * past
        for head in range(GROUP):
            votes = [0.0] * past
            for i in range(past, prompt):
                weights = self.weights(i, list(range(i + 1)))[head]
                votes = [vote + weight / policy.window for vote, weight in zip(votes, weights[:past], strict=True)]
            for j in range(past):
                around = votes[max(0, j - half) : j + half + 1]
                total[j] += (max(around) if policy.pooling == "max" else sum(around) / policy.kernel) / GROUP
        most = sorted(range(past), key=lambda j: (-round(total[j], 12), j))[: policy.budget - policy.window]
        return sorted(most) + list(range(past, prompt))


def close(a: Tensor, b: Any) -> bool:
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=1e-12)


@cases
@given(texts(), heavy_hitters)
def test_h2o_is_its_algorithm_with_lists(text: Texts, policy: H2O) -> None:
    cache = new_cache(policy)
    out = text.run(cache)
    for layer in range(LAYERS):
        for head in range(KEY_HEADS):
            expected, kept = Head(text, layer, head).h2o(policy)
            assert places(cache, layer, 0)[head] == kept
            assert close(out[layer, 0, head * GROUP : (head + 1) * GROUP].transpose(0, 1), expected)


@cases
@given(texts(longest=14), snapshots(), st.data())
def test_snap_kv_is_its_formula_with_lists(text: Texts, policy: SnapKV, data: st.DataObject) -> None:
    prompt = data.draw(st.integers(1, text.longest))
    later = text.longest - prompt
    cut = [prompt] if later == 0 else [prompt, 1, later - 1]
    cache = new_cache(policy)
    out = text.cut(*(n for n in cut if n)).run(cache)
    for layer in range(LAYERS):
        for head in range(KEY_HEADS):
            lists = Head(text, layer, head)
            kept = lists.snap_kv(policy, prompt) if later else list(range(prompt))
            assert places(cache, layer, 0)[head] == kept + list(range(prompt, text.longest))
            seen = [
                list(range(i + 1)) if i < prompt else kept + list(range(prompt, i + 1)) for i in range(text.longest)
            ]
            expected = [lists.out(i, keys) for i, keys in enumerate(seen)]
            assert close(out[layer, 0, head * GROUP : (head + 1) * GROUP].transpose(0, 1), expected)


@cases
@given(texts(rows=3), heavy_hitters | snapshots())
def test_a_row_of_a_ragged_batch_is_the_row_alone(batch: Texts, policy: ScorePolicy) -> None:
    cache = new_cache(policy)
    out = batch.run(cache)
    for row, length in enumerate(batch.lengths):
        single = new_cache(policy)
        assert close(out[:, row : row + 1, :, batch.longest - length :], batch.alone(row).run(single))
        assert [places(cache, n, row) for n in range(LAYERS)] == [places(single, n, 0) for n in range(LAYERS)]
        for name in ("live_R", "full_R", "seen_R"):
            assert getattr(group(cache), name)[row] == getattr(group(single), name)[0]


@pytest.mark.parametrize("policy", [H2O(3, 2), SnapKV(5, 2, 3)])
def test_padding_anywhere_is_as_if_it_were_not_there(policy: ScorePolicy) -> None:
    """Texts that ended before their neighbours, too."""
    text = made_texts(8, [18, 18, 18])
    real_BT = torch.rand(3, 18, generator=torch.Generator().manual_seed(8)) < 0.6
    chunks = [7, 5, 1, 1, 4]
    cache, outs = new_cache(policy), []
    for columns in torch.arange(18).split(chunks):
        cache.begin(torch.zeros(3, len(columns), dtype=torch.long), real_BT[:, columns])
        outs.append(
            torch.stack([cache.attend(n, *(t[:, :, columns] for t in text.tensors_L[n]), SCALE) for n in (0, 1)])
        )
        cache.end()
    for row, real in enumerate(real_BT):
        own = [tuple(t[row : row + 1, :, real] for t in layer) for layer in text.tensors_L]
        counts = [int(part.sum()) for part in real.split(chunks)]
        single = new_cache(policy)
        expected = Texts([int(real.sum())], own, [n for n in counts if n]).run(single)  # type: ignore[arg-type]
        assert close(torch.cat(outs, dim=3)[:, row : row + 1, :, real], expected)
        assert places(cache, 1, row) == places(single, 1, 0)
        assert (group(cache).live_R[row], group(cache).full_R[row]) == (group(single).live_R, group(single).full_R)


@cases
@given(texts(rows=2), heavy_hitters)
def test_h2o_in_chunks_is_h2o_in_single_tokens(batch: Texts, policy: H2O) -> None:
    chunks, steps = new_cache(policy), new_cache(policy)
    assert close(batch.run(chunks), batch.cut(*[1] * batch.longest).run(steps))
    assert [places(chunks, 1, row) for row in range(2)] == [places(steps, 1, row) for row in range(2)]
    assert chunks.retention() == steps.retention()


@cases
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 6), snapshots())
def test_snap_kv_of_a_prompt_in_chunks_is_that_of_the_whole_prompt(seed: int, a: int, b: int, policy: SnapKV) -> None:
    text = made_texts(seed, [a + b + 3])
    chunks, whole = new_cache(policy), new_cache(policy)
    assert close(text.cut(a, b, 1, 1, 1).run(chunks), text.cut(a + b, 1, 1, 1).run(whole))
    assert [places(chunks, n, 0) for n in range(LAYERS)] == [places(whole, n, 0) for n in range(LAYERS)]
    assert chunks.retention() == whole.retention()


@pytest.mark.parametrize("policy", [H2O(9, 3), H2O(0, 12), H2O(12, 0), SnapKV(10, 2, 3)])
def test_a_budget_of_the_whole_text_is_the_full_cache(policy: ScorePolicy) -> None:
    """SnapKV's is of the prompt."""
    text = made_texts(3, [12, 7], [10, 1, 1])
    expected = text.run(new_cache(AttentionPattern()))
    cache = new_cache(policy)
    assert close(text.run(cache), expected)
    assert cache.retention().share == 1.0
    assert places(cache, 1, 1) == [list(range(7))] * KEY_HEADS


def test_h2o_never_holds_more_than_its_budget_and_does_not_grow() -> None:
    text, cache, sizes = made_texts(5, [60]), new_cache(H2O(4, 3)), []
    for column in range(60):
        Texts([60], text.tensors_L, [1]).run(cache, column)
        assert all(len(kept) == min(column + 1, 7) for layer in range(LAYERS) for kept in places(cache, layer, 0))
        assert all(kept[-3:] == list(range(max(0, column - 2), column + 1)) for kept in places(cache, 0, 0))
        sizes.append(cache.retention().num_bytes)
    assert set(sizes) == {LAYERS * KEY_HEADS * (7 + 1) * 2 * SIZE * 8}


def test_h2o_with_room_for_more_grows_as_the_text_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored, "SPARE", 2)
    text, cache, outs, slots = made_texts(5, [16]), new_cache(H2O(8, 4)), [], []
    for column in range(16):
        outs.append(Texts([16], text.tensors_L, [1]).run(cache, column))
        slots.append(group(cache).layers[0].place_BKC.shape[2])
    assert slots == [3, 3, 3, 6, 6, 6, 9, 9, 9, 12, 12, 12, 13, 13, 13, 13]
    assert close(torch.cat(outs, dim=3), text.run(new_cache(H2O(8, 4))))


def test_snap_kv_frees_what_the_prompt_drops_and_keeps_what_follows() -> None:
    text, cache = made_texts(5, [30]), new_cache(SnapKV(8, 3, 3))
    a_token = LAYERS * KEY_HEADS * 2 * SIZE * 8
    for begin, chunk, entries in ((0, 20, 20), (20, 1, 9), (21, 1, 10), (22, 5, 15), (27, 1, 16), (28, 2, 18)):
        Texts([30], text.tensors_L, [chunk]).run(cache, begin)
        assert cache.retention().num_bytes == entries * a_token
        assert all(len(kept) == entries for layer in range(LAYERS) for kept in places(cache, layer, 0))
        kept = group(cache).layers[0][0]
        assert kept.queries_HWD.shape[1] == (3 if begin == 0 else 0)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in (kept.keys_KED, kept.values_KED, kept.queries_HWD))


def test_layers_and_key_heads_keep_different_tokens() -> None:
    """Otherwise the tests above would pass with one set for all."""
    for policy, text in ((H2O(4, 3), made_texts(5, [40])), (SnapKV(8, 3, 3), made_texts(5, [40], [39, 1]))):
        cache = new_cache(policy)
        text.run(cache)
        assert len({tuple(kept) for layer in range(LAYERS) for kept in places(cache, layer, 0)}) == LAYERS * KEY_HEADS


def test_equal_scores_keep_the_older_token() -> None:
    text = made_texts(1, [12], [11, 1])
    for q, _, _ in text.tensors_L:
        q.zero_()
    cache = new_cache(SnapKV(6, 2, 1))
    text.run(cache)
    assert places(cache, 0, 0) == [[0, 1, 2, 3, 9, 10, 11]] * KEY_HEADS
    score, place = torch.tensor([[[2.0, 1.0, 1.0, 0.5]]]), torch.tensor([[[4, 3, 1, 5]]])
    assert H2O(2, 1).leaving(score, place, torch.tensor([5])).tolist() == [[[False, True, False, False]]]


def test_retention_is_what_a_hand_counts() -> None:
    """Rows of 6 and 2 tokens. H2O(2, 1) sees 1, 2, 3, 4, 4, 4 and 1, 2; a prompt of 5 keeps 3 and then sees 4."""
    text = made_texts(2, [6, 2])
    seen = {H2O(2, 1): ([6], 18), SnapKV(3, 1, 1): ([5, 1], 1 + 2 + 3 + 4 + 5 + 4)}
    for policy, (chunks, live) in seen.items():
        cache = new_cache(policy)
        text.cut(*chunks).run(cache)
        retention = cache.retention()
        assert (retention.live, retention.full) == ((live + 3) / 8, (21 + 3) / 8)


def test_retention_is_the_mean_over_layers_of_different_rules() -> None:
    text, cache = made_texts(2, [6]), new_cache(H2O(2, 1), AttentionPattern())
    text.run(cache)
    assert (cache.retention().live, cache.retention().full) == ((18 + 21) / 12, 21 / 6)


@given(st.integers(1, 200), st.integers(1, 40), st.floats(1, 50), st.integers(1, 40))
def test_a_pyramid_falls_evenly_and_keeps_its_mean(past: int, window: int, beta: float, layers: int) -> None:
    """The papers' sizes: n / beta beyond the window in the last layer, 2 n - n / beta in the first."""
    policies = pyramid_kv(past + window, window, 5, beta, layers)
    sizes = [policy.budget - window for policy in policies]
    assert sum(sizes) == past * layers
    assert {(policy.window, policy.kernel, policy.pooling) for policy in policies} == {(window, 5, "mean")}
    if layers > 1:
        first, last = 2 * past - past / beta, past / beta
        expected = [first - (first - last) / (layers - 1) * layer for layer in range(layers)]
        assert max(abs(size - e) for size, e in zip(sizes, expected, strict=True)) <= 0.5 + 1e-9


@pytest.mark.parametrize("policy", [H2O(3, 2), SnapKV(5, 2, 3)])
@pytest.mark.parametrize(("before", "after"), [([8], [1, 1, 2]), ([1, 1], [8, 1, 1])])
def test_selected_and_repeated_texts_go_on_as_they_would_have(
    policy: ScorePolicy, before: list[int], after: list[int]
) -> None:
    """Also where the prompt of one text is over and that of another is not."""
    text = made_texts(7, [12, 9, 11])
    cache = new_cache(policy)
    Texts(text.lengths, text.tensors_L, before).run(cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    chosen = [tuple(t[rows] for t in layer) for layer in text.tensors_L]
    out = Texts([text.lengths[row] for row in rows], chosen, after).run(cache, sum(before))  # type: ignore[arg-type]
    whole = new_cache(policy)
    assert close(out, text.cut(*before, *after).run(whole)[:, rows, :, sum(before) :])
    expected = [places(whole, 1, row) for row in rows.tolist()]
    assert [places(cache, 1, row) for row in range(4)] == expected
    assert group(cache).live_R.tolist() == group(whole).live_R[rows].tolist()


def test_repeated_texts_of_head_wise_windows_go_on_as_they_would_have() -> None:
    """Where a text has a row of the cache for each key head."""
    policy = head_policies(AttentionPattern(window=3), GROUP, HEADS, KEY_HEADS)
    text, cache = made_texts(7, [12, 9]), new_cache(policy)
    Texts(text.lengths, text.tensors_L, [8]).run(cache)
    cache.batch_repeat_interleave(2)
    twice = [tuple(t.repeat_interleave(2, dim=0) for t in layer) for layer in text.tensors_L]
    out = Texts([12, 12, 9, 9], twice, [1, 3]).run(cache, 8)  # type: ignore[arg-type]
    assert close(out, text.cut(8, 1, 3).run(new_cache(policy)).repeat_interleave(2, dim=1)[..., 8:, :])


@pytest.mark.parametrize("heads", range(0, HEADS + 1, GROUP))
def test_head_wise_windows_are_a_mask_for_each_head(heads: int) -> None:
    """The first heads see the pattern, the others everything: at every step, and in chunks."""
    pattern = AttentionPattern(window=3, sinks=1, separator_ids=(2,))
    length = 20
    tensors = made_texts(4, [length]).tensors_L[0]
    ids = torch.randint(0, 4, (1, length), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(HEADS, length, length, dtype=torch.bool).tril()
    for i in range(length):
        for j in range(i + 1):
            mask[:heads, i, j] = i - j < 3 or j < 1 or int(ids[0, j]) == 2
    expected = scaled_dot_product_attention(*tensors, mask[None], scale=SCALE, enable_gqa=True)
    for chunks in ([1] * length, [length], [7, 1, 5, 7]):
        cache = SepCache([head_policies(pattern, heads, HEADS, KEY_HEADS)], vocab_size=4)
        outs = []
        for part, *q_k_v in zip(ids.split(chunks, 1), *(t.split(chunks, 2) for t in tensors), strict=True):
            cache.begin(part)
            outs.append(cache.attend(0, *q_k_v, SCALE))
            cache.end()
        assert close(torch.cat(outs, dim=2), expected)
        assert cache.retention().live * length == pytest.approx(float(mask.sum()) / HEADS)


@pytest.fixture(scope="module")
def kvpress() -> Any:
    return json.loads(golden.FILE.read_text())


def model_with(policy: LayerPolicy | list[Any]) -> tuple[Any, Attachment]:
    model = golden.model()
    return model, attach(model, policy)


@torch.no_grad()
def steps_after_the_prompt(model: Any, cache: SepCache) -> Tensor:
    parts = golden.tokens()[:, golden.LENGTH :].split(1, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@pytest.mark.parametrize("press", ["snap_kv", "pyramid_kv"])
@torch.no_grad()
def test_snap_kv_votes_keeps_and_goes_on_as_kvpress(press: str, kvpress: Any) -> None:
    """Both with the sizes that the press came to."""
    expected = kvpress[press]
    budgets = [len(layer[0][0]) for layer in expected["kept"]]
    policies = [SnapKV(budget, golden.WINDOW, golden.KERNEL) for budget in budgets]
    model, attachment = model_with(policies)
    cache = attachment.new_cache()
    model(golden.tokens()[:, : golden.LENGTH], past_key_values=cache)
    layers = [cache.groups[policy].layers[0 if len(set(policies)) > 1 else n] for n, policy in enumerate(policies)]
    for policy, layer, scores in zip(policies, layers, expected["scores"], strict=True):
        for kept, score_KN in zip(layer, torch.tensor(scores, dtype=torch.float64), strict=True):
            votes_KP = policy.votes(kept.queries_HWD, kept.keys_KED, model.config.head_dim**-0.5)
            torch.testing.assert_close(votes_KP, score_KN[:, : -golden.WINDOW], rtol=0, atol=1e-7)
    logits = steps_after_the_prompt(model, cache)
    ours = [[kept.place_KE[:, : -golden.STEPS].tolist() for kept in layer] for layer in layers]
    assert ours == expected["kept"]
    assert close(logits, expected["logits"])


def test_a_pyramid_has_the_sizes_of_kvpress(kvpress: Any) -> None:
    """Which counts the window among what falls linearly; the paper, and we, put it on top."""
    mean = round(golden.LENGTH * (1 - golden.RATIO))
    policies = pyramid_kv(mean + golden.WINDOW, golden.WINDOW, golden.KERNEL, golden.BETA, golden.LAYERS)
    kept = [len(layer[0][0]) for layer in kvpress["pyramid_kv"]["kept"]]
    assert [policy.budget - golden.WINDOW for policy in policies] == kept


@torch.no_grad()
def test_h2o_adds_up_the_attention_that_kvpress_observes(kvpress: Any) -> None:
    """The press divides a score by the number of queries that could see the token."""
    model, attachment = model_with(H2O(golden.LENGTH, 0))
    cache = attachment.new_cache()
    model(golden.tokens()[:, : golden.LENGTH], past_key_values=cache)
    expected = kvpress["observed_attention"]
    for layer, slots in group(cache).layers.items():
        score_BKN = torch.zeros(2, 2, golden.LENGTH, dtype=torch.float64)
        held_BKC = slots.place_BKC >= 0
        score_BKN.scatter_add_(2, slots.place_BKC.clamp(min=0), slots.score_BKC * held_BKC)
        observed_BKN = score_BKN / torch.arange(golden.LENGTH, 0, -1)
        golden_BKN = torch.tensor(expected["scores"][layer], dtype=torch.float64)
        torch.testing.assert_close(observed_BKN, golden_BKN, rtol=0, atol=1e-6)
        best = observed_BKN.topk(len(expected["kept"][layer][0][0])).indices.sort().values
        assert best.tolist() == expected["kept"][layer]


POLICIES: dict[str, Any] = {"h2o": H2O(6, 4), "snap_kv": SnapKV(9, 3, 3), "pyramid_kv": pyramid_kv(9, 3, 3, 3, 3)}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_model_generates_from_left_padded_prompts_as_from_each_alone(policy: Any) -> None:
    model, _ = model_with(policy)
    ids, mask = golden.tokens()[:, :24], torch.ones(2, 24, dtype=torch.long)
    mask[1, :9] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = model.generate(ids.where(mask.bool(), 0), attention_mask=mask, **options)[:, 24:]
    alone = []
    for row, padding in enumerate((0, 9)):
        own = {"attention_mask": torch.ones(1, 24 - padding, dtype=torch.long)}
        alone.append(model.generate(ids[row : row + 1, padding:], **own, **options)[0, 24 - padding :])
    assert both.tolist() == [text.tolist() for text in alone]


@torch.no_grad()
def test_what_is_dropped_is_missed() -> None:
    """A small budget changes the logits, a large one does not."""
    plain = golden.model()(golden.tokens()).logits
    for large, small in (
        (H2O(40, 10), H2O(6, 4)),
        (SnapKV(50, 4, 5), SnapKV(10, 4, 5)),
        (pyramid_kv(200, 4, 5, 2, 3), pyramid_kv(10, 4, 5, 2, 3)),
    ):
        for policy, same in ((large, True), (small, False)):
            model, attachment = model_with(policy)
            cache = attachment.new_cache()
            prompt = model(golden.tokens()[:, : golden.LENGTH], past_key_values=cache).logits
            logits = torch.cat([prompt, steps_after_the_prompt(model, cache)], dim=1)
            assert close(logits[:, -golden.STEPS :], plain[:, -golden.STEPS :]) == same


def test_beams_go_on_with_their_own_tokens() -> None:
    """With room for everything, beam search ends where it ends without the cache."""
    ids, options = golden.tokens()[:, :12], {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    expected = golden.model().generate(ids, eos_token_id=None, **options).tolist()
    for policy in (H2O(20, 10), SnapKV(20, 3, 3)):
        model, _ = model_with(policy)
        assert model.generate(ids, eos_token_id=None, **options).tolist() == expected


@pytest.mark.parametrize("policy", [H2O(3, 2), SnapKV(5, 2, 3)])
def test_half_precision_stays_and_scores_in_fp32(policy: ScorePolicy) -> None:
    text, cache = made_texts(6, [16], [12, 1, 3]), new_cache(policy)
    half = Texts([16], [tuple(t.bfloat16() for t in layer) for layer in text.tensors_L], text.chunks)  # type: ignore[misc]
    assert half.run(cache).dtype == torch.bfloat16
    layer = group(cache).layers[0]
    if isinstance(group(cache), HeavyHitters):
        assert (layer.keys_BKCD.dtype, layer.score_BKC.dtype) == (torch.bfloat16, torch.float32)
    else:
        assert layer[0].keys_KED.dtype == torch.bfloat16
    assert wide_softmax(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: H2O(-1, 3), "heavy=-1"),
        (lambda: H2O(1, -3), "recent=-3"),
        (lambda: H2O(0, 0), "heavy=0, recent=0: a cache of no tokens"),
        (lambda: SnapKV(8, 0, 5), "window=0"),
        (lambda: SnapKV(8, 9, 5), "budget=8: must be at least window=9"),
        (lambda: SnapKV(8, 2, 4), "kernel=4: must be odd"),
        (lambda: SnapKV(8, 2, 0), "kernel=0"),
        (lambda: SnapKV(8, 2, 5, "sum"), "pooling='sum'"),  # type: ignore[arg-type]
        (lambda: pyramid_kv(8, 2, 5, 0.5, 4), "beta=0.5"),
        (lambda: pyramid_kv(8, 2, 5, 2, 0), "num_layers=0"),
        (lambda: pyramid_kv(8, 9, 5, 2, 4), "budget=8"),
        (lambda: SepCache([H2O(1, 1)], vocab_size=1, document_end=0), r"document_end=0 with H2O\(heavy=1, recent=1\)"),
        (lambda: SepCache([SnapKV(2, 1, 1)], vocab_size=1, document_end=7), "document_end=7 with SnapKV"),
        (lambda: SepCache([(H2O(1, 1), AttentionPattern())], vocab_size=1), "a tuple takes an AttentionPattern"),  # type: ignore[list-item]
        (lambda: head_policies(AttentionPattern(window=2), 3, 4, 2), "heads=3 of 4"),
        (lambda: head_policies(AttentionPattern(window=2), 6, 4, 2), "heads=6 of 4"),
    ],
)
def test_wrong_settings_are_named(wrong: Any, words: str) -> None:
    with pytest.raises((ValueError, CacheError), match=words):
        wrong()


def test_attach_refuses_a_document_end_and_leaves_the_model_alone() -> None:
    model = golden.model()
    before = model.config._attn_implementation
    with pytest.raises(CacheError, match="document_end=3"):
        attach(model, H2O(2, 2), document_end=3)
    assert model.config._attn_implementation == before


def test_a_cuda_graph_is_refused() -> None:
    with pytest.raises(RuntimeError, match="H2O does not run in a CUDA graph; decode with graph=False"):
        HeavyHitters(H2O(1, 1), 1, 1, torch.device("cpu")).replayed()
