"""Near duplicates, exact duplicates and contamination, against sets that are compared the slow way."""

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from megatron_sep.prepare.decontaminate import TestRuns
from megatron_sep.prepare.dedup import exact_duplicates, near_duplicates, signatures, text_digest
from megatron_sep.prepare.shingles import plain_words, runs
from megatron_sep.prepare.text import Limits, TextError

THRESHOLD = 0.87


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


@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_are_those_of_datasketch(seed: int) -> None:
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
    original = near_duplicates(signature, np.ones(len(texts), bool), THRESHOLD, 8)
    found = [original[a] >= 0 or original[b] >= 0 for a, b in pairs]
    assert len(pairs) > 60
    assert np.mean(found) >= 0.95
    dropped = [(n, int(o)) for n, o in enumerate(original) if o >= 0]
    assert min(jaccard(texts[n], texts[o]) for n, o in dropped) >= 0.75


def test_a_document_is_dropped_only_for_one_that_is_kept() -> None:
    """Along a chain of small changes the far end stays: what a dropped document resembles is always there."""
    pytest.importorskip("rensa")
    words = [f"w{i}" for i in range(400)]
    chain = [" ".join([f"x{j}" for j in range(6 * i)] + words[6 * i :]) for i in range(12)]
    signature = signatures([runs(text, 3) for text in chain], 512)
    original = near_duplicates(signature, np.ones(12, bool), THRESHOLD, 8)
    assert 0 < (original >= 0).sum() < 11
    assert all(original[o] < 0 for o in original if o >= 0)


def test_what_is_not_alive_takes_no_part() -> None:
    """A dropped document neither drops another nor is dropped again."""
    pytest.importorskip("rensa")
    texts = ["a b c d e f", "a b c d e f", "a b c d e f"]
    signature = signatures([runs(text, 3) for text in texts], 64)
    alive = np.array([False, True, True])
    assert near_duplicates(signature, alive, THRESHOLD, 8).tolist() == [-1, -1, 1]
    digests = np.array([text_digest(text) for text in texts], "V16")
    assert exact_duplicates(digests, alive).tolist() == [-1, -1, 1]


def test_texts_that_share_nothing_are_all_kept() -> None:
    """No band in common anywhere, a single document, and none at all."""
    pytest.importorskip("rensa")
    texts = ["a b c d e f", "g h i j k l", "m n o p q r"]
    for count in (3, 1, 0):
        signature = signatures([runs(text, 3) for text in texts[:count]], 64)
        assert near_duplicates(signature, np.ones(count, bool), THRESHOLD, 8).tolist() == [-1] * count


def test_exact_duplicates_point_to_the_first() -> None:
    """The same text, and nothing but the same text."""
    digests = np.array([text_digest(text) for text in ("a", "b", "a", "a ", "b", "a")], "V16")
    assert exact_duplicates(digests, np.ones(6, bool)).tolist() == [-1, -1, 0, -1, 1, 0]


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
