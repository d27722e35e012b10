"""Tokenizers: ids, separators, cutting, and what is refused."""

import json
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import random_cases
from tokenizers import Tokenizer

from megatron_sep.attention.separators import PAPER_SEPARATORS, separator_ids
from megatron_sep.data import tokenizer as module
from megatron_sep.data.tokenizer import (
    JsonTokenizer,
    TokenizerError,
    copy_tokenizer,
    cut_after_newlines,
    load_tokenizer,
    train_tokenizer,
)


def test_a_trained_tokenizer_names_each_separator_with_one_token(tokenizer_path: Path) -> None:
    """The nine characters are nine ids, and <|endoftext|> is id 0."""
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenizer.eod_id == 0
    assert len(set(separator_ids(PAPER_SEPARATORS, tokenizer))) == 9


def test_decoding_gives_the_text_back(tokenizer_path: Path) -> None:
    """Byte-level: every text survives, also one the tokenizer was not trained on."""
    tokenizer = load_tokenizer(tokenizer_path)
    text = "Ωmega, \t\n tabs; 日本語!"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab \n\t.,'é1<", max_size=200), st.integers(1, 20))
def test_cutting_does_not_change_the_ids(text: str, limit: int) -> None:
    """The ids of the pieces are the ids of the whole."""
    library = _library()
    whole = library.encode(text, add_special_tokens=False).ids
    pieces = list(cut_after_newlines(text, limit))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in library.encode(piece, add_special_tokens=False).ids] == whole


def test_cutting_cuts() -> None:
    """A long text of short lines becomes pieces near the limit."""
    pieces = list(cut_after_newlines("one line\n" * 1000 + "end", 100))
    assert max(map(len, pieces)) < 120
    assert len(pieces) > 80


def test_a_batch_equals_single_texts(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting and batching keep each text's ids apart."""
    monkeypatch.setattr(module, "PIECE_CHARS", 10)
    tokenizer = load_tokenizer(tokenizer_path)
    texts = ["a line\nb line\nc line\n" * 5, "", "x", "one\ntwo\nthree\nfour"]
    whole = [_library(tokenizer_path).encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode_batch(texts) == whole


ODD = "aZ éÿɏ0²¼ \t\n\r\x0b\x0c\x1c\x85\xa0.,'-_<|>!“—…€日Å\u0301\u2028\u212b"


@random_cases(1500)
@given(st.lists(st.one_of(st.text(ODD, max_size=6), st.sampled_from(["'s", "'ll", "  ", "   ", "<|end|>", " n't"]))))
def test_word_by_word_is_the_library(parts: list[str]) -> None:
    """Any mixture of odd characters, contractions, runs of blanks and added tokens has the library's own ids."""
    text = "".join(parts)
    tokenizer = load_tokenizer(_with_added_tokens(), "<|end|>")
    wanted = _library(_with_added_tokens()).encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == wanted


def test_most_text_goes_word_by_word() -> None:
    """Plain text is in the table; a character outside it sends the piece to the library."""
    tokenizer = load_tokenizer(_with_added_tokens(), "<|end|>")
    assert isinstance(tokenizer, JsonTokenizer)
    assert tokenizer._words is not None
    assert tokenizer._words.encode("Plain “text”, naïve — and  so on.\n") is not None
    assert tokenizer._words.encode("日") is None


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("pre_tokenizer", {"add_prefix_space": True}),
        ("pre_tokenizer", {"use_regex": False}),
        ("normalizer", {"type": "NFKC"}),
        ("normalizer", {"type": "Lowercase"}),
    ],
)
def test_other_ways_of_splitting_are_the_library_s(tmp_path: Path, section: str, change: dict[str, object]) -> None:
    """A tokenizer that changes or splits text in another way is left to the library, and has its ids."""
    settings = json.loads(_with_added_tokens().read_text())
    settings[section] = {**settings[section], **change}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(settings))
    tokenizer, text = load_tokenizer(path, "<|end|>"), "Ab ab's  BA\nab" * 900
    assert isinstance(tokenizer, JsonTokenizer)
    assert tokenizer._words is None
    assert tokenizer.encode(text) == Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids


def test_an_unknown_end_of_document_token_is_refused(tokenizer_path: Path) -> None:
    """The message names the token and the setting."""
    with pytest.raises(TokenizerError, match=r"tokenizer.eod='<eod>'.*no such token"):
        load_tokenizer(tokenizer_path, "<eod>")


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    """The message names the path."""
    with pytest.raises(TokenizerError, match=r"nothing\.json: no such file"):
        load_tokenizer(tmp_path / "nothing.json")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.model").write_text("{}")
    for name in ("a.json", "a.model"):
        with pytest.raises(TokenizerError, match=name):
            load_tokenizer(tmp_path / name)


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path) -> None:
    """256 bytes and one special token are the least."""
    with pytest.raises(TokenizerError, match="at least 257"):
        train_tokenizer(["a"], 256, tmp_path / "t.json")


def test_sentencepiece_separators_stand_alone(tmp_path: Path) -> None:
    """No space is put before a separator that is looked up, and the space itself is one token."""
    spm = pytest.importorskip("sentencepiece")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["The cat sat, as cats do; the dog barked! Is it? Yes: it is."] * 50),
        model_prefix=str(tmp_path / "m"), vocab_size=285, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "m.model")
    assert len(set(separator_ids(PAPER_SEPARATORS, tokenizer))) == 9
    assert tokenizer.decode(tokenizer.encode("The cat sat.")) == "The cat sat."
    assert tokenizer.eod_id == tokenizer.token_ids("</s>")[0]


@lru_cache
def _with_added_tokens() -> Path:
    """A byte-level BPE in NFC with a special token and runs of blanks, as GPT-NeoX's."""
    from tokenizers import AddedToken, normalizers

    library = Tokenizer.from_str(_library().to_str())
    library.normalizer = normalizers.NFC()
    library.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    library.add_tokens([AddedToken(" " * n, normalized=True) for n in (2, 3, 5)])
    path = Path(tempfile.mkdtemp()) / "added.json"
    library.save(str(path))
    return path


_LIBRARIES: dict[Path | None, object] = {}


def _library(path: Path | None = None):  # type: ignore[no-untyped-def]
    """The bare library: of ``path``, or a byte-level BPE trained here once."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if path not in _LIBRARIES and path is None:
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        library.train_from_iterator(["ab ba.\n\nab \n\t ba, a\n b' 11.. \n" * 3] * 20, trainer)
        _LIBRARIES[path] = library
    elif path not in _LIBRARIES:
        _LIBRARIES[path] = Tokenizer.from_file(str(path))
    return _LIBRARIES[path]


@pytest.fixture
def vocabulary(tokenizer_path: Path, tmp_path: Path) -> Path:
    """The vocabulary of the trained tokenizer as gpt2-vocab.json, with its merges beside it."""
    model = json.loads(tokenizer_path.read_text())["model"]
    (tmp_path / "gpt2-vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "gpt2-merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    return tmp_path / "gpt2-vocab.json"


@pytest.mark.parametrize("name", ["gpt2-merges.txt", "merges.txt"])
def test_a_vocabulary_and_merges_are_the_tokenizer_they_are_from(
    name: str, vocabulary: Path, tokenizer_path: Path
) -> None:
    """The same ids for every text, both ways; only the special token, which GPT-2 has none of, is text there."""
    (vocabulary.parent / "gpt2-merges.txt").rename(vocabulary.parent / name)
    ours, whole = load_tokenizer(vocabulary), load_tokenizer(tokenizer_path)
    text = "The cat sat, as cats do; Ünïcödé\n\tis text!"
    assert ours.encode(text) == whole.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert (ours.vocab_size, ours.eod_id, ours.special_ids) == (whole.vocab_size, whole.eod_id, {whole.eod_id})
    assert separator_ids(PAPER_SEPARATORS, ours) == separator_ids(PAPER_SEPARATORS, whole)
    assert ours.encode("<|endoftext|>") == whole.encode_plain("<|endoftext|>") != [0]


def test_a_copy_of_a_vocabulary_is_one_file(vocabulary: Path, tmp_path: Path) -> None:
    """Merges and all: it encodes alone as the two did."""
    (tmp_path / "alone").mkdir()
    copy_tokenizer(vocabulary, tmp_path / "alone" / "tokenizer.json")
    copy = load_tokenizer(tmp_path / "alone" / "tokenizer.json")
    assert copy.encode("The cats sat.") == load_tokenizer(vocabulary).encode("The cats sat.")
    assert module.same_tokenizer(vocabulary, tmp_path / "alone" / "tokenizer.json")


def test_merges_that_are_missing_or_broken_are_named(vocabulary: Path) -> None:
    """With the places that they are looked for in."""
    merges = vocabulary.parent / "gpt2-merges.txt"
    merges.write_text("#version: 0.2\nno-such token\n")
    with pytest.raises(TokenizerError, match=r"gpt2-merges.txt: holds no merges of tokenizer.path=.*gpt2-vocab.json"):
        load_tokenizer(vocabulary)
    merges.unlink()
    with pytest.raises(TokenizerError, match=r"looked for in .*gpt2-merges.txt or .*merges.txt; lay them there"):
        load_tokenizer(vocabulary)
