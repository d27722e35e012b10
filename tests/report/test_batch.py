"""The view of a step shows what the mask says, and where the text is from."""

import json
from pathlib import Path

import pytest
import torch

from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import AttentionConfig, DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from megatron_sep.data.samples import DataError
from megatron_sep.data.shards import write_shards
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.report.batch import to_json, to_text, view_step
from megatron_sep.train.run import open_inputs


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
    view = view_step(config, 2, [1])[0]
    assert [layer.layers for layer in view.layers] == [(0,), (1, 2)]
    for layer in view.layers:
        dense = rules.patterns[layer.layers[0]].plan(torch.tensor([view.ids])).dense()[0]
        for position in range(16):
            assert layer.sees(position) == dense[position].nonzero().flatten().tolist()
            assert layer.visible[position] == len(layer.sees(position))


def test_steps_count_from_one_and_rows_from_zero(run: tuple[RunConfig, LayerRules]) -> None:
    """Step k row r is sample (k - 1) * batch + r; its documents cover its tokens."""
    config, _ = run
    views = [view for step in (1, 2) for view in view_step(config, step, [0, 1])]
    assert [view.sample for view in views] == [0, 1, 2, 3]
    assert all(sum(origin.tokens for origin in view.origins) == 16 for view in views)
    assert (views[0].origins[0].document, views[0].origins[0].offset) == (0, 0)
    for step, row in ((0, 0), (5, 0), (1, 2)):
        with pytest.raises(DataError, match="steps 1 to 4 of rows 0 to 1"):
            view_step(config, step, [row])


def test_json_and_text_hold_the_same_sample(run: tuple[RunConfig, LayerRules]) -> None:
    """JSON has the separators and what the position sees; the text has every token, and dims what is hidden."""
    config, _ = run
    view = view_step(config, 1)[0]
    value = json.loads(to_json([view], position=15))[0]
    assert value["ids"] == view.ids
    assert [view.tokens[i] for i in value["separators"]] == [t for t in view.tokens if t in {",", ";", ".", ":"}]
    assert value["layers"][1]["sees"] == {"position": 15, "tokens": view.layers[1].sees(15)}
    reach = value["layers"][1]["reach"]
    assert [j for j in range(16) if j <= 15 < j + reach[j]] == view.layers[1].sees(15)
    text = to_text(view, 15)
    assert "layers 1-2: position 15 sees" in text.plain
    dimmed = {s.start for s in text.spans if "dim" in str(s.style)}
    assert len(dimmed) == sum(16 - len(layer.sees(15)) for layer in view.layers)
    assert "".join(view.tokens[:3]) in to_text(view).plain
    for position in (-1, 16):
        with pytest.raises(DataError, match="positions 0 to 15"):
            to_text(view, position)


def test_instructions_show_their_lines_and_what_the_loss_counts(run: tuple[RunConfig, LayerRules]) -> None:
    """The samples are those that training takes; each example's line is named, and the responses alone are learnt."""
    config, _ = run
    path = config.dir / "examples.jsonl"
    examples = [{"prompt": f"Is it {i}?", "response": f"Yes, {i}."} for i in range(6)]
    path.write_text("\n".join(json.dumps(example) for example in examples))
    tree = config.model_dump() | {"data": {"instructions": {"path": path, "valid": 0.2}}}
    tree["model"]["sequence_length"], tree["attention"]["document_boundaries"] = 48, True
    config = RunConfig.model_validate(tree)
    trained = open_inputs(config).train
    views = view_step(config, 2, [0, 1])
    lines = [origin.record()["line"] for view in views for origin in view.origins]
    assert lines
    assert {str(origin) for view in views for origin in view.origins} == {f"{path}, line {line}" for line in lines}
    for index, (view, value) in enumerate(zip(views, json.loads(to_json(views)), strict=True), 2):
        (ids,), weights = trained.take(index, 1)
        assert weights is not None
        assert view.ids == ids[:-1].tolist()
        assert view.learnt == (weights[0, :-1] > 0).tolist()
        told = "".join(view.tokens[i] for i in value["learnt"])
        assert told.split("<|endoftext|>")[:-1] == [examples[o.record()["line"] - 1]["response"] for o in view.origins]
        text = to_text(view)
        assert sum("green" in str(span.style) for span in text.spans) == len(value["learnt"])
