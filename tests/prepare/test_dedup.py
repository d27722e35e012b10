"""Near duplicates, exact duplicates and contamination, against sets that are compared the slow way."""

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from megatron_sep.prepare.buckets import MEMBER, bucket_count, read_bucket, shared, write_buckets
from megatron_sep.prepare.decontaminate import TestRuns
from megatron_sep.prepare.dedup import (
    COMPARED,
    Signatures,
    band_keys,
    enough_equal,
    repeats,
    resolve,
    signatures,
    text_digest,
)
from megatron_sep.prepare.rows import JoinedRows
from megatron_sep.prepare.shingles import plain_words, runs
from megatron_sep.prepare.text import Limits, TextError

THRESHOLD, ROWS = 0.87, 8


def corpus(seed: int) -> list[str]:
    """80 originals of 300 words, each followed somewhere by copies with 0 to 40 words changed."""
    generator = random.Random(seed)
    texts = []
    for number in range(80):
        words = [f"w{generator.randrange(2000)}" for _ in range(300)]
        texts.append(" ".join(words))
        for changes in generator.sample([0, 1, 3, 5, 8, 12, 20, 40], 2):
            copy = list(words)
            for place in generator.sample(range(300), changes):
                copy[place] = f"new{number}-{place}"
            texts.append(" ".join(copy))
    generator.shuffle(texts)
    return texts


def jaccard(a: str, b: str, words: int = 3) -> float:
    one, two = ({tuple(t.split()[i : i + words]) for i in range(len(t.split()) - words + 1)} for t in (a, b))
    return len(one & two) / len(one | two)


def near_duplicates(folder: Path, signature: Signatures, buckets: int = 1, memory: int = 1 << 30) -> list[int]:
    """For each document the kept one before it that it repeats, or -1, through files as `prepare` has them."""
    middle = len(signature) // 3
    parts = [signature[:middle], signature[middle:]]
    keys = [folder / f"keys{number}" for number in range(len(parts))]
    for number, (part, path) in enumerate(zip(parts, keys, strict=True)):
        part.tofile(folder / f"part{number}")
        documents = np.arange(len(part), dtype=np.uint32) + number * middle
        steps = [(band_keys(part[at : at + 50], ROWS), documents[at : at + 50]) for at in range(0, len(part), 50)]
        write_buckets(path, steps, buckets)
    for band in range(signature.shape[1] // ROWS):
        for bucket in range(buckets):
            shared(*read_bucket(keys, band, bucket)).tofile(folder / f"shared-{band:03d}-{bucket}")
    files = sorted(folder.glob("shared-*"))
    joined = JoinedRows([folder / "part0", folder / "part1"], np.uint8, signature.shape[1])
    found = dict(resolve(files, joined, THRESHOLD, memory))
    return [found.get(number, -1) for number in range(len(signature))]


def slowly(signature: Signatures) -> list[int]:
    """The same by comparing each document with the first that are kept before it of each of its bands."""
    bands = band_keys(signature, ROWS).tolist()
    kept: list[dict[int, list[int]]] = [{} for _ in bands]
    found = []
    for document, values in enumerate(signature):
        groups = [of_band.setdefault(keys[document], []) for of_band, keys in zip(kept, bands, strict=True)]
        near = sorted({k for group in groups for k in group})
        equal = [int((signature[k] == values).sum()) for k in near]
        if equal and max(equal) >= enough_equal(THRESHOLD, signature.shape[1]):
            found.append(near[equal.index(max(equal))])
            continue
        found.append(-1)
        for group in groups:
            group += [document] if len(group) < COMPARED else []
    return found


@pytest.mark.parametrize(("buckets", "memory"), [(1, 1 << 30), (3, 1 << 12)])
def test_near_duplicates_are_those_of_comparing_all(tmp_path: Path, buckets: int, memory: int) -> None:
    """Whatever fits in memory at once."""
    pytest.importorskip("rensa")
    signature = signatures([runs(text, 3) for text in corpus(3)], 256)
    found = near_duplicates(tmp_path, signature, buckets, memory)
    assert found == slowly(signature)
    assert sum(original >= 0 for original in found) > 40


def test_of_a_band_that_many_share_the_first_are_compared(tmp_path: Path) -> None:
    """A notice above three hundred texts costs no comparison of all with all, and hides no near duplicate."""
    generator = np.random.default_rng(0)
    signature = generator.integers(0, 256, (300, 128), np.uint8)
    signature[:, :ROWS] = 7
    signature[100::3] = signature[99:299:3]
    signature[100::3, -ROWS:] ^= 1
    found = near_duplicates(tmp_path, signature, buckets=2, memory=1 << 12)
    assert found == slowly(signature)
    assert [n for n, original in enumerate(found) if original >= 0] == list(range(100, 300, 3))


def test_who_shares_a_band() -> None:
    """Documents of a key that is there twice or more, in order, grouped by it; of no documents none."""
    keys = np.array([7, 3, 7, 5, 3, 7], np.uint64)
    found = shared(keys, np.arange(10, 16, dtype=np.uint32))
    assert found["document"].tolist() == [10, 11, 12, 14, 15]
    assert found["group"].tolist() == [2, 0, 2, 0, 2]
    assert len(shared(keys[:0], np.empty(0, np.uint32))) == 0
    assert found.dtype == MEMBER


def test_a_bucket_has_all_of_its_keys_and_fits_in_memory(tmp_path: Path) -> None:
    """Every row once, equal keys together, in order; as many buckets as memory asks for, also of no documents."""
    generator = np.random.default_rng(0)
    buckets = bucket_count(20_000, 1 << 20, together=2)
    assert (buckets, bucket_count(0, 1 << 20, 2)) == (3, 1)
    keys = generator.integers(0, 2**64, (2, 20_000), np.uint64)
    keys[:, 10_000:] = keys[:, :10_000]
    numbers = np.arange(20_000, dtype=np.uint32)
    write_buckets(tmp_path / "some", [(keys[:, :0], numbers[:0]), (keys[:, :9_999], numbers[:9_999])], buckets)
    write_buckets(tmp_path / "rest", [(keys[:, 9_999:], numbers[9_999:])], buckets)
    write_buckets(tmp_path / "none", [], buckets)
    for column in range(2):
        read = [read_bucket([tmp_path / n for n in ("some", "none", "rest")], column, b) for b in range(buckets)]
        assert np.array_equal(np.sort(np.concatenate([documents for _, documents in read])), numbers)
        for key, documents in read:
            assert np.array_equal(key, keys[column, documents])
            assert (np.diff(documents.astype(int)) > 0).all()
            assert len(key) < 1.1 * 20_000 / buckets
            assert len(shared(key, documents)) == len(key)


@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_are_those_of_datasketch(seed: int, tmp_path: Path) -> None:
    """At least 0.95 of its pairs above the threshold lose one of them; nothing is dropped below 0.75 Jaccard."""
    datasketch = pytest.importorskip("datasketch")
    pytest.importorskip("rensa")
    texts = corpus(seed)
    index, hashes = datasketch.MinHashLSH(threshold=THRESHOLD, num_perm=256), []
    for number, text in enumerate(texts):
        made = datasketch.MinHash(num_perm=256, seed=seed + 1)
        words = text.split()
        made.update_batch([" ".join(words[i : i + 3]).encode() for i in range(len(words) - 2)])
        hashes.append(made)
        index.insert(number, made)
    pairs = [
        (a, b)
        for a, made in enumerate(hashes)
        for b in index.query(made)
        if a < b and jaccard(texts[a], texts[b]) >= THRESHOLD
    ]
    signature = signatures([runs(text, 3) for text in texts], 512)
    original = near_duplicates(tmp_path, signature)
    found = [original[a] >= 0 or original[b] >= 0 for a, b in pairs]
    assert len(pairs) > 60
    assert np.mean(found) >= 0.95
    dropped = [(n, int(o)) for n, o in enumerate(original) if o >= 0]
    assert min(jaccard(texts[n], texts[o]) for n, o in dropped) >= 0.75


def test_a_document_is_dropped_only_for_one_that_is_kept(tmp_path: Path) -> None:
    """Along a chain of small changes the far end stays: what a dropped document resembles is always there."""
    pytest.importorskip("rensa")
    words = [f"w{i}" for i in range(400)]
    chain = [" ".join([f"x{j}" for j in range(6 * i)] + words[6 * i :]) for i in range(12)]
    signature = signatures([runs(text, 3) for text in chain], 512)
    original = near_duplicates(tmp_path, signature)
    assert 0 < sum(o >= 0 for o in original) < 11
    assert all(original[o] < 0 for o in original if o >= 0)


def test_texts_that_share_nothing_are_all_kept(tmp_path: Path) -> None:
    """No band in common anywhere, a single document, and none at all."""
    pytest.importorskip("rensa")
    texts = ["a b c d e f", "g h i j k l", "m n o p q r"]
    for count in (3, 1, 0):
        signature = signatures([runs(text, 3) for text in texts[:count]], 64)
        (tmp_path / str(count)).mkdir()
        assert near_duplicates(tmp_path / str(count), signature) == [-1] * count


def test_exact_duplicates_repeat_one_before_them() -> None:
    """The same text, and nothing but the same text."""
    digests = b"".join(text_digest(text) for text in ("a", "b", "a", "a ", "b", "a"))
    found = repeats(np.frombuffer(digests, np.uint64).reshape(-1, 2))
    assert found.tolist() == [False, False, True, False, True, True]


def test_runs_are_equal_where_the_words_are() -> None:
    """Hashes of runs of words agree exactly where the words do, wherever they stand and however they are spaced."""
    generator = random.Random(0)
    texts = [" ".join(generator.choice("abc") for _ in range(40)), "\n ".join(["cab", "a", "bca", "b"] * 4), "a", ""]
    for words in (1, 2, 5):
        listed = [
            (text.split()[i : i + words], value) for text in texts for i, value in enumerate(runs(text, words).tolist())
        ]
        for (one, a), (two, b) in combinations(listed, 2):
            assert (one == two) == (a == b)


def test_contamination_is_a_shared_run_of_words(tmp_path: Path) -> None:
    """Case and punctuation do not hide it, one word less does; the report names words and place."""
    (tmp_path / "test.jsonl").write_text('{"q": "One, two; three four", "a": "five six seven eight nine"}\n')
    tests = TestRuns.build([tmp_path / "test.jsonl"], ("q", "a"), 4, Limits())
    tests.save(tmp_path)
    for found in (tests, TestRuns.load(tmp_path)):
        assert found.find("zero one two three five six seven") is None
        hit = found.find("x ONE two-three (four) five")
        assert hit is not None
        assert (hit.matches, hit.words, hit.test) == (1, "one two three four", f"{tmp_path / 'test.jsonl'}:1")
        assert found.find("five six seven eight nine").matches == 2  # type: ignore[union-attr]


def test_a_test_set_without_text_is_an_error(tmp_path: Path) -> None:
    """Nothing is compared with a set that was not read."""
    (tmp_path / "test.jsonl").write_text('{"question": "One"}\n')
    with pytest.raises(TextError, match=r"test\.jsonl, line 1: missing field.*decontaminate\.fields"):
        TestRuns.build([tmp_path / "test.jsonl"], ("text",), 4, Limits())


def test_plain_words_drop_what_is_no_letter_or_digit() -> None:
    """Lower case, one blank between words."""
    assert plain_words("It's 3_4, NAÏVE!").split() == ["it", "s", "3", "4", "naïve"]
