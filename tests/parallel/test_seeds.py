"""Dropout's random states: one for each step and place, none met twice."""

import itertools
from dataclasses import replace

import pytest
import torch

from megatron_sep.parallel.groups import topology
from megatron_sep.parallel.seeds import derived_seed, seed_dropout
from megatron_sep.parallel.topology import Axis, Topology


def test_no_two_steps_ranks_and_stages_share_a_seed() -> None:
    """Data rank 1 at step s is not rank 0 at s + 10,000, stage 1 not stage 0 at s + 100: 200,000 places, all apart."""
    steps = [*range(200), *range(10_000, 10_200), *range(20_000, 20_100)]
    places = list(itertools.product((0, 1234), steps, range(10), range(4), range(5)))
    assert len({derived_seed(*place) for place in places}) == len(places)
    assert all(0 <= derived_seed(*place) < 2**63 for place in places[:1000])


def drawn(place: Topology, seed: int, step: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What a step draws outside and inside megatron-core's model-parallel regions."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    seed_dropout(place, seed, step)
    shared = torch.rand(4, device=place.device)
    with get_cuda_rng_tracker().fork():
        own = torch.rand(4, device=place.device)
    return tuple(shared.tolist()), tuple(own.tolist())


@pytest.mark.usefixtures("single_process")
def test_tensor_parallel_ranks_share_one_state_and_part_in_the_other() -> None:
    """Ranks of one matrix draw alike outside its parts and apart inside; data ranks, stages and steps draw apart."""
    here = topology()
    first = drawn(here, 7, 3)
    other = drawn(replace(here, tensor=Axis(1, 2)), 7, 3)
    assert first == drawn(here, 7, 3)
    assert other[0] == first[0]
    assert other[1] != first[1]
    for place, seed, step in (
        (replace(here, data=Axis(1, 2)), 7, 3),
        (replace(here, pipeline=Axis(1, 2)), 7, 3),
        (here, 7, 4),
        (here, 8, 3),
        (here, 8, 2),
    ):
        shared, own = drawn(place, seed, step)
        assert shared != first[0]
        assert own not in (first[1], other[1])
