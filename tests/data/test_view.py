"""The view of a step shows what the mask says, and where the text is from."""

import json
from pathlib import Path

import pytest
import torch

from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import AttentionConfig, DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from megatron_sep.data.batches import DataError
from megatron_sep.data.shards import write_shards
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.data.view import to_json, to_text, view_step


@pytest.fixture
def run(tmp_path: Path, tokenizer_path: Path) -> tuple[RunConfig, LayerRules]:
    tokenizer = load_tokenizer(tokenizer_path)
    texts = ["The cat sat, as cats do; the dog barked!", "Is it?", "Yes: it is.\n" * 5]
    documents = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    write_shards(tmp_path / "s", documents, tokenizer.vocab_size)
    config = RunConfig(
        dir=tmp_path, tokenizer=TokenizerConfig(path=tokenizer_path),
        data=DataConfig(path=tmp_path / "s", split=(1, 0, 0), shuffle=False),
        model=ModelConfig(num_layers=3, sequence_length=16, hidden_size=8, num_attention_heads=1),
        attention=AttentionConfig(window=4, sinks=2, separators=tuple(",;.:"), full_layers=(0,)),
        train=TrainConfig(steps=4, global_batch_size=2, micro_batch_size=1),
    )  # fmt: skip
    return config, LayerRules.of(config.attention, 3, tokenizer)


def test_what_a_position_sees_is_the_row_of_the_mask(run: tuple[RunConfig, LayerRules]) -> None:
    """For every position and pattern: the tokens listed are those of the dense mask."""
    config, rules = run
    view = view_step(config, rules, 2, [1])[0]
    assert [layer.layers for layer in view.layers] == [(0,), (1, 2)]
    for layer in view.layers:
        dense = rules.patterns[layer.layers[0]].plan(torch.tensor([view.ids])).dense()[0]
        for position in range(16):
            assert layer.sees(position) == dense[position].nonzero().flatten().tolist()
            assert layer.visible[position] == len(layer.sees(position))


def test_steps_count_from_one_and_rows_from_zero(run: tuple[RunConfig, LayerRules]) -> None:
    """Step k row r is sample (k - 1) * batch + r; its documents cover its tokens."""
    config, rules = run
    views = [view for step in (1, 2) for view in view_step(config, rules, step, [0, 1])]
    assert [view.sample for view in views] == [0, 1, 2, 3]
    assert all(sum(span.tokens for span in view.spans) == 16 for view in views)
    assert (views[0].spans[0].document, views[0].spans[0].offset) == (0, 0)
    for step, row in ((0, 0), (5, 0), (1, 2)):
        with pytest.raises(DataError, match="steps 1 to 4 of rows 0 to 1"):
            view_step(config, rules, step, [row])


def test_json_and_text_hold_the_same_sample(run: tuple[RunConfig, LayerRules]) -> None:
    """JSON has the separators and what the position sees; the text has every token, and dims what is hidden."""
    config, rules = run
    view = view_step(config, rules, 1)[0]
    value = json.loads(to_json([view], position=15))[0]
    assert value["ids"] == view.ids
    assert [view.tokens[i] for i in value["separators"]] == [t for t in view.tokens if t in {",", ";", ".", ":"}]
    assert value["layers"][1]["sees"] == {"position": 15, "tokens": view.layers[1].sees(15)}
    text = to_text(view, 15)
    assert "layers 1-2: position 15 sees" in text.plain
    dimmed = {s.start for s in text.spans if "dim" in str(s.style)}
    assert len(dimmed) == sum(16 - len(layer.sees(15)) for layer in view.layers)
    assert "".join(view.tokens[:3]) in to_text(view).plain
    for position in (-1, 16):
        with pytest.raises(DataError, match="positions 0 to 15"):
            to_text(view, position)
