"""Rows are read ahead of the step, and are those of the step whatever was read ahead."""

import threading

import numpy as np
import pytest
import torch

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import TrainConfig
from megatron_sep.data.samples import DataError, Rows, SourceShare
from megatron_sep.parallel.topology import Axis, Topology
from megatron_sep.train.feed import Feed

RULES = LayerRules(layer_patterns(AttentionPattern(), 1), AttentionPattern(), None)


class Counted:
    """Samples whose tokens are their own number; it notes who read what, and fails from sample ``broken`` on."""

    name, num_samples = "counted", 1000

    def __init__(self, broken: int = 10**9) -> None:
        self.broken, self.read = broken, []
        self.threads: set[str] = set()

    def take(self, first_sample: int, count: int, batch: range | None = None) -> Rows:
        assert batch is not None
        assert first_sample in batch
        if first_sample + count > self.broken:
            raise DataError(f"sample {self.broken} is broken")
        self.read.append(first_sample)
        self.threads.add(threading.current_thread().name)
        rows = np.repeat(np.arange(first_sample, first_sample + count)[:, None], 5, 1)
        return Rows(rows, np.full(rows.shape, 0.5, np.float32))

    def shares(self, consumed: int) -> list[SourceShare]:
        return [SourceShare(self.name, 1.0, 1.0, consumed, consumed / self.num_samples)]


def feed(samples: Counted, rank: int = 0, ranks: int = 1) -> Feed:
    place = Topology(
        Axis(rank, ranks), Axis(rank, ranks), Axis(), Axis(), Axis(), device=torch.device("cpu"), data_group=None
    )
    return Feed(samples, lambda _: RULES, TrainConfig(global_batch_size=8, micro_batch_size=2), place)


def numbers(taken: Feed, consumed: int) -> list[int]:
    return [int(row[0]) for batch in taken.take(1, consumed) for row in batch.ids_BT]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_sequence_is_taken_once_whatever_the_ranks(ranks: int) -> None:
    """The ranks of a global batch have its 8 sequences between them, step after step, and jumping back too."""
    feeds = [feed(Counted(), rank, ranks) for rank in range(ranks)]
    for consumed in (0, 8, 16, 800, 8):
        found = [number for one in feeds for number in numbers(one, consumed)]
        assert sorted(found) == list(range(consumed, consumed + 8))


def test_the_next_step_is_read_while_this_one_runs() -> None:
    """Once a step's rows are handed out a thread reads those of the next, and they are not read again."""
    samples = Counted()
    taken = feed(samples)
    numbers(taken, 0)
    assert taken._ahead is not None
    taken._ahead[1].result()
    assert samples.read == list(range(0, 16, 2))
    assert len(samples.threads) == 2
    numbers(taken, 8)
    assert samples.read[:8] == list(range(0, 16, 2))
    assert samples.read.count(8) == 1


def test_broken_data_stop_the_step_that_they_are_of() -> None:
    """What was read ahead and failed is an error when its step comes, not before."""
    taken = feed(Counted(broken=12))
    assert numbers(taken, 0) == list(range(8))
    with pytest.raises(DataError, match="sample 12 is broken"):
        numbers(taken, 8)


def test_weights_come_with_their_rows() -> None:
    """The weights of a row's labels are those of its last T tokens."""
    (first, *_) = feed(Counted()).take(1, 0)
    assert first.weight_BT is not None
    assert first.weight_BT.shape == first.labels_BT.shape == (2, 4)
    assert torch.all(first.weight_BT == 0.5)
