"""Random states of dropout: a function of the run's seed, the step and this process's place, so that none is saved."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from megatron_sep.parallel.topology import Topology


def seed_dropout(topology: Topology, seed: int, step: int) -> None:
    """Seed what a step draws.

    Processes with other tokens and pipeline stages draw apart; tensor-parallel ranks draw alike where they hold the
    same activations, and apart in megatron-core's model-parallel state where each holds its own part.
    """
    from megatron.core.tensor_parallel import random

    tokens = topology.data.rank * topology.context.size + topology.context.rank
    place = (seed, step, tokens, topology.pipeline.rank)
    shared, own = derived_seed(*place), derived_seed(*place, topology.tensor.rank)
    tracker = random.get_cuda_rng_tracker()
    tracker.reset()
    torch.manual_seed(shared)
    tracker.add(random._DATA_PARALLEL_RNG_TRACKER_NAME, shared)
    tracker.add(random._MODEL_PARALLEL_RNG_TRACKER_NAME, own)


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Where there is no dropout: megatron-core changes no random state inside, which a CUDA graph could not repeat."""
    from megatron.core.tensor_parallel import random

    tracker = random.get_cuda_rng_tracker()
    tracker.fork = lambda name="": nullcontext()  # noqa: ARG005
    try:
        yield
    finally:
        del tracker.fork


def derived_seed(*numbers: int) -> int:
    """A seed below 2^63 that no other numbers lead to, but by a chance of about 2^-63."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
