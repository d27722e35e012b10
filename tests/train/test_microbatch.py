"""What a micro-batch counts of itself."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases

from megatron_sep.attention.pattern import AttentionPattern, document_numbers
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import ModelConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.train.microbatch import Microbatch

VOCABULARY, END = 6, 0
SIZE = ModelSize(ModelConfig(num_layers=3, hidden_size=32, num_attention_heads=2), VOCABULARY)


@st.composite
def patterns(draw: st.DrawFn) -> AttentionPattern:
    separators = tuple(draw(st.sets(st.integers(0, VOCABULARY - 1))))
    return AttentionPattern(
        draw(st.none() | st.integers(1, 14)), draw(st.integers(0, 4)), separators, draw(st.none() | st.integers(1, 5))
    )


@random_cases(2000)
@given(
    st.tuples(patterns(), patterns(), patterns()),
    st.integers(1, 2),
    st.integers(1, 13),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_operations_of_attention_are_four_times_the_width_for_each_visible_pair(
    layers: tuple[AttentionPattern, ...], rows: int, length: int, seed: int, packed: bool
) -> None:
    """Ones of every layer's dense mask, forward, and twice that backward; separators none, some or all."""
    ids = torch.randint(0, VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    rules = LayerRules(layers, AttentionPattern(), END if packed else None)
    pairs = int(Microbatch.of(ids, rules, torch.device("cpu")).visible_pairs())
    seen = ids[:, :-1]
    document = document_numbers(seen, END) if packed else None
    ones = sum(int(pattern.plan(seen, document).dense().sum()) for pattern in layers)
    assert pairs == ones
    attention = SIZE.training_flops(seen.numel(), pairs) - SIZE.training_flops(seen.numel(), 0)
    assert attention == 3 * 4 * 32 * ones
