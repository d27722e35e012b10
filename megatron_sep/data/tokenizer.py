"""Text to token ids: a tokenizer.json, GPT-2's vocabulary and merges or a sentencepiece model behind one interface."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_sep.config.tokenizer_files import merge_files
from megatron_sep.data.extras import needs_extra
from megatron_sep.data.word_table import WordTable
from megatron_sep.errors import UserError
from megatron_sep.files import read_json, written_aside

DEFAULT_EOD = ("<|endoftext|>", "</s>")
MOST_IDS = 2**24
"""Sixty times the largest vocabulary in use; the library takes memory for whatever id a file claims, and aborts."""
PIECE_CHARS = 5_000
"""A longer document is cut before encoding, at a place where nothing changes."""


_LINE_END = re.compile(r"\S\n(?=\S)")


class TokenizerError(UserError):
    """A tokenizer that cannot be used as asked."""


class Tokenizer(Protocol):
    """What the pipeline and the trainer need of a tokenizer."""

    path: Path
    """The file that it was read from."""
    vocab_size: int
    """One more than the largest token id."""
    eod_id: int
    """End-of-document token."""
    special_ids: frozenset[int]
    """Tokens that begin, end or fill up texts, and stand for nothing in them."""
    special_texts: Mapping[str, int]
    """The special tokens that ``encode`` reads out of a text that has them written out."""

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; no special token is added, those that are written out are read as tokens."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """The ids of ``text`` with special tokens that are written out as text like any other."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores where the library can."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        ...

    def token_ids(self, text: str) -> list[int]:
        """The ids of ``text`` alone, with no special tokens and no space put before it."""
        ...


def load_tokenizer(path: Path, eod: str | None = None) -> Tokenizer:
    """Open a tokenizer.json, a sentencepiece .model, or a vocab.json with its merges.txt beside it.

    ``eod`` is the text of the end-of-document token; None: <|endoftext|>, else </s>. Raises TokenizerError.
    """
    if not path.is_file():
        raise TokenizerError(f"tokenizer.path={path}: no such file")
    kind = SentencePieceTokenizer if path.suffix == ".model" else JsonTokenizer
    return kind(path, eod)


def same_tokenizer(first: Path, second: Path) -> bool:
    """Whether two tokenizer files give the same ids to the same text, as far as their vocabularies tell."""
    if first.suffix != second.suffix or first.suffix != ".json":
        return first.read_bytes() == second.read_bytes()
    return _vocabulary(first) == _vocabulary(second)


def _vocabulary(path: Path) -> tuple[Any, Any]:
    settings = read_json(path)
    if "model" not in settings:  # a vocabulary alone
        return settings, {}
    added = {token["content"]: token["id"] for token in settings.get("added_tokens", [])}
    return settings["model"].get("vocab"), added


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer as one file: a vocabulary and its merges become a tokenizer.json."""
    if source.suffix == ".json" and _is_vocabulary(source):
        _of_merges(source).save(str(target))
    else:
        shutil.copy(source, target)


class JsonTokenizer:
    """A Hugging Face tokenizer.json, or the vocabulary and merges of GPT-2's kind."""

    def __init__(self, path: Path, eod: str | None) -> None:
        self.path = path
        self._library = _open_library(path)
        vocab = self._library.get_vocab(with_added_tokens=True)
        settings = json.loads(self._library.to_str())
        self._byte_level = _is_byte_level(settings)
        self._words = WordTable(self._whole, settings["added_tokens"]) if _splits_as_gpt2(settings) else None
        self.vocab_size = max(vocab.values()) + 1
        self.eod_id = _eod_id(path, eod, vocab.get)
        special = [token for token in settings.get("added_tokens", []) if token["special"]]
        self.special_texts: Mapping[str, int] = {token["content"]: int(token["id"]) for token in special}
        self.special_ids = frozenset((self.eod_id, *self.special_texts.values()))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_plain(self, text: str) -> list[int]:
        if not any(special in text for special in self.special_texts):
            return self.encode(text)
        self._library.encode_special_tokens = True
        try:
            return self._whole(text)
        finally:
            self._library.encode_special_tokens = False

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = [self._pieces(text) for text in texts]
        known = [[self._words.encode(piece) if self._words else None for piece in cut] for cut in pieces]
        left = [
            piece
            for cut, ids in zip(pieces, known, strict=True)
            for piece, i in zip(cut, ids, strict=True)
            if i is None
        ]
        encoded = iter(self._library.encode_batch_fast(left, add_special_tokens=False))
        return [_concatenate([next(encoded).ids if i is None else i for i in ids]) for ids in known]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=False))

    def token_ids(self, text: str) -> list[int]:
        if self._byte_level:
            return self._whole(text)
        return _piece_ids(text, self._library.token_to_id) or self.encode(text)

    def _pieces(self, text: str) -> list[str]:
        return list(cut_after_newlines(text, PIECE_CHARS)) if self._words else [text]

    def _whole(self, text: str) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=False).ids)


class SentencePieceTokenizer:
    """A sentencepiece .model file."""

    def __init__(self, path: Path, eod: str | None) -> None:
        with needs_extra("sentencepiece", "sentencepiece"):
            from sentencepiece import SentencePieceProcessor
        self.path = path
        try:
            self._library = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"tokenizer.path={path}: is no sentencepiece model: {error}") from error
        self.vocab_size = int(self._library.get_piece_size())
        self.eod_id = _eod_id(path, eod, self._piece_id)
        self.special_ids = frozenset(i for i in range(self.vocab_size) if self._library.is_control(i)) | {self.eod_id}
        self.special_texts: Mapping[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text))

    def encode_plain(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._library.encode(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids)))

    def token_ids(self, text: str) -> list[int]:
        return _piece_ids(text, self._piece_id) or self.encode(text)

    def _piece_id(self, piece: str) -> int | None:
        found = int(self._library.piece_to_id(piece))
        return None if self._library.is_unknown(found) else found


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train a byte-level BPE on ``texts`` and save it to ``path``.

    ``<|endoftext|>`` is id 0; every byte is a token, so each ASCII separator alone is exactly one. Words split as in
    GPT-NeoX's tokenizer. Raises TokenizerError where ``vocab_size`` leaves no room for the 256 bytes.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise TokenizerError(f"vocab_size={vocab_size}: the 256 bytes and {DEFAULT_EOD[0]} need at least 257")
    library: Any = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DEFAULT_EOD[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    with written_aside(path) as aside:
        library.save(str(aside))
    return load_tokenizer(path)


def cut_after_newlines(text: str, limit: int) -> Iterable[str]:
    """Cut ``text`` into pieces of about ``limit`` characters that encode to the ids of the whole.

    A cut is after a newline that stands between two characters that are no white space: there every byte-level
    pre-tokenizer starts a new word whatever stands on the other side. A text without such a place stays whole.
    """
    start = 0
    while len(text) - start > limit:
        place = _LINE_END.search(text, start + limit - 2)
        if place is None:
            break
        yield text[start : place.end()]
        start = place.end()
    yield text[start:]


def _open_library(path: Path) -> Any:
    """The tokenizers library's own object. Raises TokenizerError."""
    from tokenizers import Tokenizer as Library

    _check_ids(path)
    try:
        return Library.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        if _is_vocabulary(path):
            return _of_merges(path)
        raise TokenizerError(f"tokenizer.path={path}: is no Hugging Face tokenizer file: {error}") from error


def _check_ids(path: Path) -> None:
    """Raise TokenizerError where a file maps a text to an id beyond all bounds; other faults are the library's."""
    try:
        settings = read_json(path)
    except (OSError, ValueError):
        return
    model = settings.get("model", settings) if isinstance(settings, dict) else {}
    vocabulary = model.get("vocab", model) if isinstance(model, dict) else {}
    for text, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if isinstance(number, int) and not 0 <= number < MOST_IDS:
            raise TokenizerError(f"tokenizer.path={path}: {text!r} has the id {number}; ids are 0 to {MOST_IDS - 1:,}")


def _is_vocabulary(path: Path) -> bool:
    """Whether a file maps texts to ids and has nothing else in it."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and bool(found) and all(isinstance(number, int) for number in found.values())


def _of_merges(vocab: Path) -> Any:
    """A byte-level BPE as GPT-2's, which reads no special token out of a text. Raises TokenizerError."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    merges = next((file for file in merge_files(vocab) if file.is_file()), None)
    if merges is None:
        places = " or ".join(map(str, merge_files(vocab)))
        raise TokenizerError(
            f"tokenizer.path={vocab}: is a vocabulary, whose merges are looked for in {places}; lay them there"
        )
    try:
        library: Any = Library(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{merges}: holds no merges of tokenizer.path={vocab}: {error}") from error
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def _is_byte_level(settings: dict[str, Any]) -> bool:
    return "ByteLevel" in {step.get("type") for step in _steps(settings)}


def _steps(settings: dict[str, Any]) -> list[dict[str, Any]]:
    top = settings.get("pre_tokenizer") or {}
    return list(top.get("pretokenizers", [top]))


def _splits_as_gpt2(settings: dict[str, Any]) -> bool:
    """True for GPT-2's way of splitting words with nothing put before the text: it may be cut, and go word by word."""
    normalizer = settings.get("normalizer") or {}
    steps = _steps(settings)
    gpt2 = len(steps) == 1 and steps[0].get("type") == "ByteLevel" and steps[0].get("use_regex", True)
    flags = ("lstrip", "rstrip", "single_word")
    stripping = [token for token in settings.get("added_tokens", []) if any(token[flag] for flag in flags)]
    plain = normalizer.get("type") in (None, "NFC") and not stripping
    bpe = (settings.get("model") or {}).get("type") == "BPE"
    return bool(gpt2 and plain and bpe and not steps[0].get("add_prefix_space"))


def _eod_id(path: Path, eod: str | None, lookup: Any) -> int:
    for text in DEFAULT_EOD if eod is None else (eod,):
        found = lookup(text)
        if found is not None:
            return int(found)
    asked = f"tokenizer.eod={eod!r}: no such token in" if eod else f"none of {', '.join(DEFAULT_EOD)} is a token of"
    raise TokenizerError(f"{asked} {path}; set tokenizer.eod to the text of its end-of-document token")


def _piece_ids(text: str, lookup: Any) -> list[int]:
    """The vocabulary's own entry for ``text``, as sentencepiece spells it; empty where there is none."""
    spellings = [text.replace(" ", "▁"), text]
    if len(text.encode()) == 1:
        spellings.append(f"<0x{ord(text):02X}>")
    found = (lookup(spelling) for spelling in spellings)
    return next(([int(i)] for i in found if i is not None), [])


def _concatenate(parts: list[list[int]]) -> list[int]:
    return parts[0] if len(parts) == 1 else [i for part in parts for i in part]
