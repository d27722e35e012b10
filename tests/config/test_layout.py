"""What does not divide is told before anything starts, all of it at once."""

import re
from typing import Any

import pytest

from megatron_sep.config.layout import engine_mistakes, job_mistakes, split_mistakes
from megatron_sep.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig


def test_every_mistake_of_a_layout_is_named_at_once() -> None:
    """Heads, key heads, the MLP, vocabulary, layers and sequence of a model that nothing about the layout fits."""
    model = ModelConfig(
        num_layers=10, hidden_size=36, num_attention_heads=6, num_key_value_heads=3, ffn_hidden_size=26,
        vocab_size=301, sequence_length=1000, rotary_fraction=1.0,
    )  # fmt: skip
    parallel = ParallelConfig(tensor=4, pipeline=3, virtual_pipeline=2, context=8, sequence_parallel=True)
    assert split_mistakes(model, parallel) == [
        "model.num_attention_heads=6 does not divide by parallel.tensor=4",
        "model.num_key_value_heads=3 does not divide by parallel.tensor=4",
        "model.ffn_hidden_size=26 does not divide by parallel.tensor=4",
        "model.vocab_size=301 does not divide by parallel.tensor=4",
        "model.num_layers=10 does not divide by parallel.pipeline x parallel.virtual_pipeline=6",
        "model.sequence_length=1000 does not divide by 2 x parallel.context x parallel.tensor=64",
    ]


@pytest.mark.parametrize(
    ("layout", "processes", "batch", "message"),
    [
        ({"tensor": 2, "context": 2}, 6, (8, 1), "2 x parallel.context=2 x parallel.pipeline=1 does not divide the 6 "),
        ({"tensor": 2}, 6, (8, 1), r"micro_batch_size=1 x 3 data-parallel rank\(s\); set it to a multiple of 3"),
        ({"pipeline": 2, "virtual_pipeline": 2}, 4, (6, 1), "there are 3 in a step; .* to a multiple of 4"),
    ],
)
def test_what_a_job_cannot_hold_names_the_way_out(
    layout: dict[str, Any], processes: int, batch: tuple[int, int], message: str
) -> None:
    """Processes that the layout does not divide, a batch that its ranks do not, rounds of an interleaved schedule."""
    train = TrainConfig(global_batch_size=batch[0], micro_batch_size=batch[1])
    (mistake,) = job_mistakes(ParallelConfig(**layout), train, processes)
    assert re.search(message, mistake)


def test_layouts_that_fit_have_no_mistakes() -> None:
    """The default model on 16 processes, everything split by 2."""
    parallel = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, context=2, sequence_parallel=True)
    assert split_mistakes(ModelConfig(), parallel) == []
    assert job_mistakes(parallel, TrainConfig(global_batch_size=64, micro_batch_size=16), 16) == []


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_layers_that_talk_to_other_ranks_are_not_compiled(axis: str) -> None:
    """Compiled, sequence parallelism had wrong gradients on a GPU, and each micro-batch of context parallelism anew."""
    parallel = ParallelConfig(**{axis: 2})
    (mistake,) = engine_mistakes(parallel, TrainConfig(compile="on"), OptimizerConfig())
    assert "talks to other ranks in its midst" in mistake
    assert engine_mistakes(parallel, TrainConfig(), OptimizerConfig()) == []
