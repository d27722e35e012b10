"""The fused kernel's index of a plan's keys: what it holds, and that it is made once for all layers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.attention.rules import LayerRules
from megatron_sep.kernels.sep_attention import sep_attention
from megatron_sep.kernels.sep_attention.index import GAP, KeyIndex, indexed, indexed_layers
from megatron_sep.train.microbatch import Microbatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEP = AttentionPattern(window=5, sinks=2, separator_ids=(1,))


def some_ids(length: int, density: float = 0.3) -> Tensor:
    return (torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < density).long().to(DEVICE)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 70, GAP, 3 * GAP + 1])
def test_landmarks_come_first_and_the_others_a_gap_later(length: int, density: float) -> None:
    """Positions and reaches in either part ascend, all keys are there once, and no block of GAP holds both kinds."""
    plan = SEP.plan(some_ids(length, density))
    index = KeyIndex.of(plan)
    assert torch.equal(index.seen_BT, plan.landmark_BT.cumsum(1).int())
    for row, (landmark_T, reach_T) in enumerate(zip(plan.landmark_BT, plan.reach_BT, strict=True)):
        positions, reaches = index.sorted_2BG[:, row].tolist()
        landmarks, others = landmark_T.nonzero()[:, 0].tolist(), (~landmark_T).nonzero()[:, 0].tolist()
        others_from = -(-len(landmarks) // GAP) * GAP
        expected = [0] * (length + GAP)
        expected[: len(landmarks)] = landmarks
        expected[others_from : others_from + len(others)] = others
        assert positions == expected
        there = [*range(len(landmarks)), *range(others_from, others_from + len(others))]
        assert [reaches[slot] for slot in there] == reach_T[landmarks + others].tolist()
        assert sum(reaches) == int(reach_T.sum())


def test_only_plans_that_the_kernel_gets_have_an_index() -> None:
    """Plain causal attention and uneven plans go elsewhere; what has an index keeps it."""
    ids = some_ids(40)
    plan = indexed(SEP.plan(ids))
    assert isinstance(plan.index, KeyIndex)
    assert indexed(plan) is plan
    assert indexed(AttentionPattern().plan(ids)).index is None
    assert indexed(replace(plan, index=None, even=False)).index is None
    assert indexed(SEP.plan(ids, queries=range(3, 9))).index is not None
    first, full, last = indexed_layers(tuple(LayerRules(layer_patterns(SEP, 3, (1,)), SEP, None).plans(ids)))
    assert first is last
    assert (first.index is None, full.index is None) == (False, True)


def test_a_micro_batch_makes_an_index_for_each_pattern_and_its_layers_make_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five layers of three patterns, one of them full: two indices, before any layer runs; the output is right."""
    made: list[MaskPlan] = []
    original = KeyIndex.of

    def counted(plan: MaskPlan) -> KeyIndex:
        made.append(plan)
        return original(plan)

    monkeypatch.setattr(KeyIndex, "of", counted)
    wide = AttentionPattern(window=9, sinks=2, separator_ids=(1,))
    rules = LayerRules((SEP, wide, AttentionPattern(), SEP, wide), SEP, None)
    plans = Microbatch.of(some_ids(41), rules, DEVICE).plans
    assert len(made) == 2
    q, k, v = (torch.randn(2, 2, 40, 32, device=DEVICE) for _ in range(3))
    for plan in plans:
        fused = sep_attention(q, k, v, plan, backend="triton")
        torch.testing.assert_close(fused, sep_attention(q, k, v, plan, backend="reference"), atol=2e-5, rtol=1e-5)
    assert len(made) == 2
    sep_attention(q, k, v, SEP.plan(some_ids(40)), backend="triton")
    assert len(made) == 3
