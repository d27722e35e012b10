"""Which tokens are separators is found in any tokenizer, and what begins or ends texts is never one."""

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import pytest
import yaml

from megatron_sep.attention.cut import measure
from megatron_sep.attention.rules import LayerRules
from megatron_sep.attention.separator_lists import LISTS
from megatron_sep.attention.separators import (
    PAPER_SEPARATORS,
    SeparatorError,
    check_separators,
    chosen_separators,
    merged_separators,
    num_separators,
    separator_ids,
)
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.config.separators import ListName, SeparatorsConfig
from megatron_sep.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer, train_tokenizer
from megatron_sep.errors import UserError
from megatron_sep.report.separators import attention_of, describe_separators

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
    cut = measure([[word, comma, word, word, merged, word, dot, word]], (comma, dot), tokenizer)
    assert (cut.tokens, cut.density, cut.largest_gap) == (8, 2 / 8, 5)
    assert cut.coverage == pytest.approx(2 / 3)
    assert cut.missed == (merged,)
    bare = measure([[word] * 5, [comma] * 3], (comma,), tokenizer)
    assert (bare.largest_gap, bare.coverage, bare.missed) == (6, 1.0, ())


@pytest.mark.parametrize(
    ("text", "number"), [("", 0), ("word", 0), (" word", 0), (" ", 1), ("    ", 1), (" .", 1), (".\n\n", 3), ("\n ", 1)]
)
def test_a_space_counts_where_a_token_is_blank(text: str, number: int) -> None:
    """Of other tokens the characters that separate are counted one by one."""
    assert num_separators(text) == number


def test_merged_tokens_join_the_texts_of_a_configuration(tokenizer: Tokenizer) -> None:
    """With `merged` all that the verb finds; of fewer texts, those alone that hold one of them."""
    everything = AttentionConfig(window=4, separators=SeparatorsConfig(texts="default", merged=True))
    ids = chosen_separators(everything, tokenizer)
    assert set(ids) == {*separator_ids(PAPER_SEPARATORS, tokenizer), *merged_separators(tokenizer)}
    assert LayerRules.of(everything, 2, tokenizer).separators.separator_ids == ids
    dots = AttentionConfig(window=4, separators=SeparatorsConfig(texts=(".",), merged=True))
    found = [tokenizer.decode([number]) for number in chosen_separators(dots, tokenizer)]
    assert {'."', "."} <= set(found)
    assert all("." in text for text in found)
    plain = AttentionConfig(window=4, separators=SeparatorsConfig(texts="default"))
    assert chosen_separators(plain, tokenizer) == separator_ids(PAPER_SEPARATORS, tokenizer)


class Spelled:
    """A tokenizer whose vocabulary is known at some places alone."""

    vocab_size, eod_id, special_ids = 128_001, 128_000, frozenset((128_000,))

    def __init__(self, texts: Mapping[int, str]) -> None:
        self._texts = texts

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._texts.get(number, "word") for number in ids)

    def token_ids(self, text: str) -> list[int]:
        return [number for number, known in self._texts.items() if known == text] or [1, 2]


def test_lists_are_those_of_the_authors() -> None:
    """Nine, seventeen and twenty ids; those of Llama-3 differ in what it merges and in the one that begins texts."""
    free, streaming, neox = (set(LISTS[name].texts) for name in get_args(ListName))
    assert (len(free), len(streaming), len(neox)) == (9, 17, 20)
    assert free - streaming == {128_000}
    assert {662, 1174, 720} <= streaming - free
    for name in LISTS:
        tokenizer = Spelled(LISTS[name].texts)
        assert chosen_separators(AttentionConfig(window=4, separators=name), tokenizer) == tuple(LISTS[name].texts)


def test_a_list_is_refused_by_another_tokenizer(tokenizer: Tokenizer) -> None:
    """An id that is another text there, or beyond the vocabulary, is named with both texts and the way out."""
    message = r"llama-3-streaming: is a list for Llama-3's tokenizer, whose token 13 is '\.'; in this one it is '.*Set "
    with pytest.raises(SeparatorError, match=message):
        LayerRules.of(AttentionConfig(window=4, separators="llama-3-streaming"), 2, tokenizer)
    moved = {**LISTS["llama-3-streaming"].texts, 262: "    "}
    with pytest.raises(SeparatorError, match="whose token 262 is '   '; in this one it is '    '"):
        chosen_separators(AttentionConfig(window=4, separators="llama-3-streaming"), Spelled(moved))
    small = Spelled(LISTS["llama-3-training-free"].texts)
    small.vocab_size = 128_000
    with pytest.raises(SeparatorError, match=r"token 128000 is '<\|begin_of_text\|>'; in this one it is no token"):
        chosen_separators(AttentionConfig(window=4, separators="llama-3-training-free"), small)


def test_what_ends_texts_is_refused_beside_a_list() -> None:
    """A list may hold it, ids that are added may not."""
    tokenizer = Spelled(LISTS["llama-3-streaming"].texts)
    with pytest.raises(SeparatorError, match="128000 is 'word', which begins, ends or fills up texts"):
        chosen_separators(
            AttentionConfig(window=4, separators="llama-3-streaming", separator_ids=(128_000,)), tokenizer
        )


def test_what_ends_texts_is_refused(tokenizer: Tokenizer, tokenizer_path: Path) -> None:
    """In the configuration and in the verb; so is an id that the vocabulary does not have."""
    with pytest.raises(SeparatorError, match=r"0 is '<\|endoftext\|>', which begins, ends or fills up texts"):
        LayerRules.of(AttentionConfig(window=4, separator_ids=(0,)), 2, tokenizer)
    with pytest.raises(SeparatorError, match="endoftext"):
        describe_separators(tokenizer_path, None, attention_of(False, None, (0,)))
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
    nine, merged = attention_of(False, None, ()), attention_of(True, None, ())
    assert "coverage 100.0%" in describe_separators(tokenizer_path, text, merged)
    assert "coverage 100.0%" not in describe_separators(tokenizer_path, text, nine)
    text.write_text("alphabetagammadelta" * 200)
    assert "warning: fewer than 3% of the tokens" in describe_separators(tokenizer_path, text, nine)
    with pytest.raises(SeparatorError, match="cannot be read"):
        describe_separators(tokenizer_path, tmp_path / "none.txt", nine)


@pytest.mark.parametrize("attention", [attention_of(False, None, ()), attention_of(True, None, (270, 271))])
def test_the_line_of_the_verb_is_a_configuration(tokenizer_path: Path, attention: AttentionConfig) -> None:
    """What stands behind `attention:` reads back as the choice that was described."""
    (line,) = [x for x in describe_separators(tokenizer_path, None, attention).splitlines() if x.startswith("attent")]
    assert AttentionConfig.model_validate(yaml.safe_load(line)["attention"]) == attention


def test_options_of_the_verb_that_contradict(tokenizer_path: Path) -> None:
    """An unknown list is answered with those there are; a list and `--merged` do not go together."""
    with pytest.raises(SeparatorError, match="--list llama: no such list; there are llama-3-training-free, llama-3-st"):
        attention_of(False, "llama", ())
    with pytest.raises(SeparatorError, match="leave out --list llama-3-streaming, or --merged"):
        attention_of(True, "llama-3-streaming", ())
    with pytest.raises(TokenizerError, match=r"tokenizer\.eod='</doc>': no such token"):
        describe_separators(tokenizer_path, None, AttentionConfig(), "</doc>")


@pytest.mark.skipif(TOKENIZER not in os.environ, reason=f"{TOKENIZER} names no tokenizer.json of GPT-NeoX")
def test_gpt_neox_has_the_papers_ids() -> None:
    """The nine are [15, 13, 32, 2, 28, 27, 209, 186, 187]; the merged ones hold ` .` and ` ,`."""
    tokenizer = load_tokenizer(Path(os.environ[TOKENIZER]))
    assert separator_ids(PAPER_SEPARATORS, tokenizer) == (15, 13, 32, 2, 28, 27, 209, 186, 187)
    merged = merged_separators(tokenizer)
    assert (merged[964], merged[1157]) == (" .", " ,")
    streaming = chosen_separators(AttentionConfig(window=4, separators="gpt-neox-streaming"), tokenizer)
    assert streaming[:9] == (15, 13, 32, 2, 28, 27, 209, 186, 187)
    assert set(streaming[9:]) <= set(merged)
    with pytest.raises(SeparatorError, match="endoftext"):
        check_separators((0,), tokenizer)
    with pytest.raises(SeparatorError, match="padding"):
        check_separators((1,), tokenizer)
