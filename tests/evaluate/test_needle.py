"""Needles in a haystack: where they stand, and how what a model knows of them is measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.evaluate.needle import Haystack, cell, haystack_of, make_trial, try_trial
from megatron_sep.evaluate.texts import EvaluationError
from megatron_sep.generate.session import Session, open_session


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def session(model_dir: Path, pattern_file: Path) -> Session:
    return open_session(model_dir, pattern_file, None, None)


HAY = torch.full((2000,), 70)


@pytest.mark.parametrize("keys", [1, 4])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_stand_where_they_are_asked_for(tokenizer: Tokenizer, keys: int, depth: float) -> None:
    """Texts of the asked length, all needles whole in them, the asked one at its depth; the seed decides."""
    asked = Haystack((400,), (depth,), keys)
    trial = make_trial(tokenizer, HAY, asked, 400, depth, 0)
    text = tokenizer.decode(trial.prompt)
    assert len(trial.prompt) == 400
    assert text.count(" The number of ") == keys + 1
    name = text.rpartition(" The number of ")[2].removesuffix(" is")
    number = tokenizer.decode(trial.candidates[0])
    needle = f" The number of {name} is{number}."
    assert text.count(needle) == 1
    if keys == 1:
        before = len(tokenizer.encode(text[: text.index(needle)]))
        assert abs(before / (400 - len(tokenizer.encode(needle)) - 20) - depth) < 0.1
    assert len({tuple(each) for each in trial.candidates}) == 10
    assert trial == make_trial(tokenizer, HAY, asked, 400, depth, 0)
    assert trial != make_trial(tokenizer, HAY, asked, 400, depth, 1)


@torch.no_grad()
def test_candidates_are_scored_as_whole_texts(session: Session, tokenizer: Tokenizer) -> None:
    """Behind one shared cache each candidate has the loss that it has in a text of its own."""
    trials = [make_trial(tokenizer, HAY, Haystack((120,), (0.5,)), 120, 0.5, sample) for sample in range(12)]
    model, outcomes = session.loaded.model, []
    for trial in trials:
        nats = []
        for each in trial.candidates:
            ids = torch.tensor([trial.prompt + each])
            loss = -model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            nats.append(float(loss[len(trial.prompt) - 1 :].sum()))
        found = try_trial(model, session.attachment, trial)
        outcomes.append(found.choice)
        assert found.choice == (nats[0] < min(nats[1:]))
        assert found.retention.queries == 120
    assert False in outcomes


def test_a_cell_and_its_mistakes(session: Session, tokenizer: Tokenizer) -> None:
    """Shares of samples with their retention; lengths without room, too little text, depths outside."""
    loaded: Any = session.loaded
    found = cell(loaded.model, session.attachment, tokenizer, HAY, Haystack((100,), (0.5,), samples=2), 100, 0.5)
    assert set(found) == {"length", "depth", "choice", "exact", "retention"}
    assert 0 < found["retention"] < 0.5
    with pytest.raises(EvaluationError, match="length 20: has no room for 1 needles"):
        make_trial(tokenizer, HAY, Haystack((20,), (0.5,)), 20, 0.5, 0)
    with pytest.raises(EvaluationError, match="length 3000: needs"):
        make_trial(tokenizer, HAY, Haystack((3000,), (0.5,)), 3000, 0.5, 0)
    with pytest.raises(EvaluationError, match="depth 2: must be from 0 to 1; keys 99"):
        haystack_of("100", "2", 99, 1, 0)
    with pytest.raises(EvaluationError, match="pass numbers with commas"):
        haystack_of("100,x", "0.5", 1, 1, 0)
