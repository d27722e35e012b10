"""A run says what share of the separating characters of its data its separators miss."""

import json
from pathlib import Path

import pytest

from megatron_sep.attention.separator_lists import LISTS, SeparatorList
from megatron_sep.config.schema import AttentionConfig, DataConfig, InstructionsConfig, ModelConfig, TokenizerConfig
from megatron_sep.data.open_data import open_data
from megatron_sep.data.resolved import Resolved, resolve
from megatron_sep.data.separator_notes import MEASURED, separator_notes, shown_samples
from megatron_sep.data.shards import write_shards
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

LENGTH = 16
MERGED = {"texts": "default", "merged": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that merges `."` but not `,`, and a shard in which a quarter of the separators is merged."""
    folder = tmp_path_factory.mktemp("notes")
    tokenizer = train_tokenizer(['Go," she said. "Stay." They went,'] * 40, 300, folder / "tokenizer.json")
    merged, comma, word = (tokenizer.token_ids(text)[0] for text in ('."', ",", "e"))
    write_shards(folder / "corpus", [[comma, word, comma, comma, merged] * 40], tokenizer.vocab_size)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer.json")


def resolved_of(folder: Path, **attention: object) -> tuple[AttentionConfig, Resolved]:
    section = AttentionConfig.model_validate({"window": 4} | attention)
    return section, resolve(TokenizerConfig(path=folder / "tokenizer.json"), ModelConfig(num_layers=2), section)


def notes(folder: Path, tokenizer: Tokenizer, **attention: object) -> list[str]:
    data = DataConfig(path=folder / "corpus", split=(1, 0, 0))
    return separator_notes(*resolved_of(folder, **attention), open_data(data, "train", LENGTH, tokenizer, 1))


def test_the_share_that_is_missed_is_said_with_the_tokens_and_the_way_out(folder: Path, tokenizer: Tokenizer) -> None:
    """Of 192 tokens in twelve samples; a quarter of the separating characters stands in `."`, which `merged` takes."""
    (note,) = notes(folder, tokenizer, separators="default")
    ids = open_data(DataConfig(path=folder / "corpus", split=(1, 0, 0)), "train", LENGTH, tokenizer, 1).take(0, 12).ids
    merged = int((ids[:, :-1] == tokenizer.token_ids('."')[0]).sum())
    commas = int((ids[:, :-1] == tokenizer.token_ids(",")[0]).sum())
    assert note == (
        f"separators: {commas / 192:.1%} of 192 tokens of the training data; {merged / (merged + commas):.1%} of the "
        "separating characters stand in a token that is none, most in '.\"'; 0.0% with `merged: true`"
    )


def test_nothing_is_missed_or_asked_for(folder: Path, tokenizer: Tokenizer) -> None:
    """With merged tokens none is left to name; who asks for commas misses no others; no separators, no word."""
    (note,) = notes(folder, tokenizer, separators=MERGED)
    assert note.endswith("; 0.0% of the separating characters stand in a token that is none")
    (note,) = notes(folder, tokenizer, separators=[","])
    assert note.endswith("; 0.0% of the separating characters stand in a token that is none")
    assert notes(folder, tokenizer) == []


def test_ids_alone_are_held_against_the_nine(folder: Path, tokenizer: Tokenizer) -> None:
    """Of a list of ids nobody knows which texts were meant."""
    (note,) = notes(folder, tokenizer, separator_ids=tokenizer.token_ids('."'))
    assert "most in ','" in note


def test_a_token_that_begins_texts_is_named(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken, for the list is the authors', and said to be no separator."""
    ids = [tokenizer.token_ids(",")[0], tokenizer.eod_id]
    texts = {number: tokenizer.decode([number]) for number in ids}
    monkeypatch.setitem(LISTS, "llama-3-training-free", SeparatorList("this one", texts))
    strange, _ = notes(folder, tokenizer, separators="llama-3-training-free")
    assert strange.startswith(
        f"attention.separators=llama-3-training-free: {tokenizer.eod_id} is '<|endoftext|>', which begins"
    )


def test_no_more_than_some_tokens_are_read(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of a long text the first samples."""
    write_shards(tmp_path / "long", [[5] * (2 * MEASURED)], tokenizer.vocab_size)
    data = DataConfig(path=tmp_path / "long", split=(1, 0, 0))
    samples = open_data(data, "train", LENGTH, tokenizer, 1)
    (note,) = separator_notes(*resolved_of(folder, separators="default"), samples)
    assert f"of {MEASURED:,} tokens" in note


def test_instructions_and_every_order_are_shown(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Before a run as in it, without the index of GPT-NeoX's order."""
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "Go,", "response": 'she said."'}) for _ in range(600)))
    instructions = DataConfig(instructions=InstructionsConfig(path=path))
    neox = DataConfig(path=folder / "corpus", split=(1, 0, 0), order="neox", cache=tmp_path / "cache")
    for data in (instructions, neox):
        (note,) = separator_notes(*resolved_of(folder, separators="default"), shown_samples(data, 32, tokenizer))
        assert "most in '.\"'" in note
    assert not (tmp_path / "cache").exists()
