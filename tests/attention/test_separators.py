"""Which tokens are separators is found in any tokenizer, and what begins or ends texts is never one."""

import os
import random
from pathlib import Path

import pytest

from megatron_sep.attention.rules import LayerRules
from megatron_sep.attention.separators import (
    PAPER_SEPARATORS,
    SeparatorError,
    check_separators,
    merged_separators,
    separator_ids,
)
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megatron_sep.errors import UserError
from megatron_sep.report.separators import describe_separators, measure

TOKENIZER = "GPT_NEOX_TOKENIZER"


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    text = ['"Go," said one. "Stay." \n\n They went; (both). ' * draw.randint(1, 3) for _ in range(40)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(text, 320, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


def test_merged_tokens_are_found(tokenizer: Tokenizer) -> None:
    """Each is made of separators, quotes and brackets alone, and is not among the nine; words with a space are not."""
    found = merged_separators(tokenizer)
    assert {',"', '."'} <= set(found.values())
    assert not set(found) & set(separator_ids(PAPER_SEPARATORS, tokenizer))
    assert all(any(char in PAPER_SEPARATORS for char in text) for text in found.values())
    assert not any(char.isalnum() for text in found.values() for char in text)


def test_density_coverage_and_gap_are_counted(tokenizer: Tokenizer) -> None:
    """On known ids, counted by hand."""
    comma, dot, word = (tokenizer.token_ids(text)[0] for text in (",", ".", "e"))
    merged = next(number for number, text in merged_separators(tokenizer).items() if text == '."')
    cut = measure([word, comma, word, word, merged, word, dot, word], (comma, dot), tokenizer)
    assert (cut.tokens, cut.density, cut.largest_gap) == (8, 2 / 8, 5)
    assert cut.coverage == pytest.approx(2 / 3)
    assert measure([word] * 5, (comma,), tokenizer).largest_gap == 6


def test_what_ends_texts_is_refused(tokenizer: Tokenizer, tokenizer_path: Path) -> None:
    """In the configuration and in the verb; so is an id that the vocabulary does not have."""
    with pytest.raises(SeparatorError, match=r"0 is '<\|endoftext\|>', which begins, ends or fills up texts"):
        LayerRules.of(AttentionConfig(window=4, separator_ids=(0,)), 2, tokenizer)
    with pytest.raises(SeparatorError, match="endoftext"):
        describe_separators(tokenizer_path, None, merged=False, more=(0,))
    for number in (9999, -5):
        with pytest.raises(SeparatorError, match=rf"{number} is no token of a vocabulary of \d+"):
            check_separators((number,), tokenizer)


def test_a_layer_that_the_model_lacks_is_refused(tokenizer: Tokenizer) -> None:
    """An attention section alone does not know how many layers there are; who reads it with a model does."""
    with pytest.raises(UserError, match=r"attention\.full_layers: 9 is no layer of a model with 2"):
        LayerRules.of(AttentionConfig(window=4, full_layers=(9,)), 2, tokenizer)


def test_ids_join_the_default_ones(tokenizer: Tokenizer) -> None:
    """The nine first, then those given by id, each once."""
    extra = next(iter(merged_separators(tokenizer)))
    nine = separator_ids(PAPER_SEPARATORS, tokenizer)
    rules = LayerRules.of(AttentionConfig(window=4, separators="default", separator_ids=(extra, nine[0])), 2, tokenizer)
    assert rules.separators.separator_ids == (*nine, extra)


def test_the_verb_measures_and_warns(tokenizer_path: Path, tmp_path: Path) -> None:
    """Density, coverage and gap of a text; a text whose marks hide in other tokens is warned about."""
    text = tmp_path / "text.txt"
    text.write_text('"Go," said one. "Stay." They went.' * 20)
    plain = describe_separators(tokenizer_path, text, merged=False, more=())
    merged = describe_separators(tokenizer_path, text, merged=True, more=())
    assert "coverage 100.0%" in merged
    assert "coverage 100.0%" not in plain
    assert "separator_ids: [" in merged
    text.write_text("alphabetagammadelta" * 200)
    assert "warning: fewer than 3% of the tokens" in describe_separators(tokenizer_path, text, merged=False, more=())
    with pytest.raises(SeparatorError, match="cannot be read"):
        describe_separators(tokenizer_path, tmp_path / "none.txt", merged=False, more=())


@pytest.mark.skipif(TOKENIZER not in os.environ, reason=f"{TOKENIZER} names no tokenizer.json of GPT-NeoX")
def test_gpt_neox_has_the_papers_ids() -> None:
    """The nine are [15, 13, 32, 2, 28, 27, 209, 186, 187]; the merged ones hold ` .` and ` ,`."""
    tokenizer = load_tokenizer(Path(os.environ[TOKENIZER]))
    assert separator_ids(PAPER_SEPARATORS, tokenizer) == (15, 13, 32, 2, 28, 27, 209, 186, 187)
    merged = merged_separators(tokenizer)
    assert (merged[964], merged[1157]) == (" .", " ,")
    with pytest.raises(SeparatorError, match="endoftext"):
        check_separators((0,), tokenizer)
    with pytest.raises(SeparatorError, match="padding"):
        check_separators((1,), tokenizer)
