"""Instruction data: whole examples in packed rows, and a loss that counts the responses alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sep.config import RunConfig
from megatron_sep.config.schema import InstructionsConfig
from megatron_sep.data.instructions import Instructions, instructions_of
from megatron_sep.data.samples import DataError
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.parallel.groups import topology

EXAMPLES = [{"prompt": f"one {'two ' * (i % 5)}?", "response": f"three {'alpha ' * (i % 7)}."} for i in range(40)]


@pytest.fixture
def tokenizer(corpus: Path) -> Tokenizer:
    return load_tokenizer(corpus / "tokenizer.json")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    return file


def opened(path: Path, tokenizer: Tokenizer, shuffle: bool = False, **settings: Any) -> Instructions:
    config = InstructionsConfig(path=path, **settings)
    return Instructions(config, tokenizer, 64, seed=1, shuffle=shuffle)


def test_every_example_stands_once_and_whole_in_a_row(path: Path, tokenizer: Tokenizer) -> None:
    """The rows, cut at the end-of-document token, are the examples in their order; the rest of a row is filling."""
    samples = opened(path, tokenizer)
    rows = samples.take(0, samples.num_samples).ids
    text = tokenizer.decode(rows[rows != tokenizer.eod_id].tolist())
    assert text == "".join(f"{e['prompt']}\n{e['response']}" for e in EXAMPLES)
    assert int((rows[:, 0] == tokenizer.eod_id).sum()) == 0


def test_the_loss_counts_the_responses_and_their_ends(path: Path, tokenizer: Tokenizer) -> None:
    """Weight has each response with one end-of-document token, all the same, and nothing else has any."""
    samples = opened(path, tokenizer, shuffle=True)
    ids, weights = samples.take(0, samples.num_samples)
    assert weights is not None
    marked = tokenizer.decode(ids[weights > 0].tolist())
    assert sorted(marked.split("<|endoftext|>")[:-1]) == sorted(example["response"] for example in EXAMPLES)
    assert np.unique(weights).tolist() == [0, pytest.approx(weights.max())]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_labels_of_a_whole_batch_mean_1(size: int, path: Path, tokenizer: Tokenizer) -> None:
    """However a global batch is cut among ranks and micro-batches, its weights are those of one taking."""
    samples = opened(path, tokenizer, shuffle=True)
    whole = samples.take(4, 4).weights
    assert whole is not None
    assert whole[:, 1:].mean() == pytest.approx(1)
    parts = [samples.take(first, size, range(4, 8)).weights for first in range(4, 8, size)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_the_order_depends_on_the_seed_and_the_number_alone(path: Path, tokenizer: Tokenizer) -> None:
    """Rows taken one at a time are those taken together, in the second epoch too."""
    samples = opened(path, tokenizer, shuffle=True)
    count = samples.num_samples + 3
    together = samples.take(0, count).ids
    assert all(np.array_equal(together[i : i + 1], samples.take(i, 1).ids) for i in range(count))
    assert not np.array_equal(together, opened(path, tokenizer).take(0, count).ids)


def test_validation_is_the_end_of_the_file(path: Path, tokenizer: Tokenizer) -> None:
    """The splits share no example and hold all of them."""
    config = InstructionsConfig(path=path, valid=0.25)
    train, valid = (instructions_of(config, split, 64, tokenizer, 1, True) for split in ("train", "valid"))
    counts = []
    for samples in (train, valid):
        ids, weights = samples.take(0, samples.num_samples)
        assert weights is not None
        counts.append(int((ids[weights > 0] == tokenizer.eod_id).sum()))
    assert counts == [30, 10]
    assert "?\n" in tokenizer.decode(valid.take(0, 1).ids[0].tolist())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 41: is no JSON"),
        ('{"prompt": "a"}', "line 41: has no text under 'response'"),
        ('["a"]', "line 41: has no text under 'prompt'"),
        (json.dumps({"prompt": "a " * 200, "response": "b"}), "line 41: .* tokens do not fit into a sequence of 64"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, path: Path, tokenizer: Tokenizer) -> None:
    """File, line and the way out."""
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        opened(path, tokenizer)


def test_long_examples_are_dropped_and_counted_where_asked(path: Path, tokenizer: Tokenizer) -> None:
    """on_long: drop."""
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "a " * 200, "response": "b"}) + "\n")
    assert opened(path, tokenizer, on_long="drop").dropped == 1


@pytest.mark.usefixtures("single_process")
def test_prompts_give_no_gradient_and_the_loss_is_one_mean(tiny: Callable[..., RunConfig], path: Path) -> None:
    """The training loss is the mean over the response tokens of the whole batch, whatever the micro-batches."""
    from megatron_sep.train.run import build_run

    losses = []
    for size in (2, 8):
        config = tiny(
            attention={"document_boundaries": True},
            data={"path": None, "instructions": {"path": str(path)}},
            train={"eval_every": 0, "micro_batch_size": size},
        )
        run = build_run(config, topology())
        batches = list(run.train_data.take(1, 0))
        losses.append(float(run.engine.forward_backward(iter(batches), len(batches))))
    (batch,) = batches
    with torch.no_grad():
        each = run.engine._modules[0](batch.ids_BT, batch.position_BT, batch.plans, labels=batch.labels_BT)
    learnt = torch.from_numpy(run.train_data.samples.take(0, 8).weights)[:, 1:] > 0
    assert losses[0] == pytest.approx(float(each[learnt].mean()), rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_special_tokens_in_what_people_wrote_are_text(path: Path, tokenizer: Tokenizer) -> None:
    """The end of a document that is written out in a prompt or a response ends nothing: one token a row does."""
    written = {"prompt": "what is <|endoftext|> ?", "response": "one <|endoftext|> two"}
    path.write_text(json.dumps(written) + "\n")
    samples = opened(path, tokenizer)
    ids, weights = samples.take(0, 1)
    assert weights is not None
    used = int(np.flatnonzero(weights[0])[-1]) + 1
    assert (ids[0, :used] == tokenizer.eod_id).sum() == 1
    assert tokenizer.decode(ids[0, : used - 1].tolist()) == f"{written['prompt']}\n{written['response']}"
    meant = opened(path, tokenizer, special_tokens="tokens")
    ids, weights = meant.take(0, 1)
    assert weights is not None
    assert (ids[0, : int(np.flatnonzero(weights[0])[-1]) + 1] == tokenizer.eod_id).sum() == 3


def test_special_tokens_of_the_template_are_tokens(path: Path, tokenizer: Tokenizer) -> None:
    """The configuration's own text means what it says; around it prompts are text."""
    path.write_text(json.dumps({"prompt": "is <|endoftext|> it", "response": "two"}) + "\n")
    ids = opened(path, tokenizer, template="one<|endoftext|>{prompt}<|endoftext|>").take(0, 1).ids[0]
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.eod_id))
    assert [tokenizer.decode(part[part != tokenizer.eod_id].tolist()) for part in parts[:3]] == [
        "one",
        "is <|endoftext|> it",
        "two",
    ]


def test_what_was_dropped_is_said(path: Path, tokenizer: Tokenizer, tiny: Callable[..., RunConfig]) -> None:
    """Examples, tokens, sequences and what was left out, when a run starts and in `batch`."""
    from megatron_sep.report.batch import to_json, to_text, view_step

    long = {"prompt": "one " * 80, "response": "two"}
    path.write_text("".join(json.dumps(example) + "\n" for example in [*EXAMPLES, long, long]))
    (note,) = opened(path, tokenizer, on_long="drop").notes()
    assert note.startswith(f"{path}: 40 examples of ")
    assert note.endswith("2 dropped as longer than a sequence, none cut")
    section = {"path": None, "instructions": {"path": str(path), "on_long": "drop", "valid": 0.1}}
    config = tiny(data=section, attention={"document_boundaries": True})
    (view,) = view_step(config, 1)
    assert "dropped as longer than a sequence" in to_text(view).plain
    assert "dropped as longer than a sequence" in json.loads(to_json([view]))[0]["notes"][0]
