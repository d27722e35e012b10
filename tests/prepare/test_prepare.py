"""From text files to a shard and its receipt, whatever happens on the way."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.prepared import all_stages, corpus_of_all_kinds, same_files, sentence, source, write_jsonl

from megatron_sep.config.prepare import DecontaminateConfig, DeduplicateConfig, PrepareConfig, TextSourceConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.data.shards import Shard
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.prepare.prepare import prepare, tokenize_files
from megatron_sep.prepare.readings import expand
from megatron_sep.prepare.receipt import PrepareError, summary
from megatron_sep.prepare.text import TextError

Make = Callable[..., PrepareConfig]


def documents(output: Path, tokenizer_path: Path) -> list[str]:
    shard, tokenizer = Shard.open(output), load_tokenizer(tokenizer_path)
    rows = [shard.document(i) for i in range(shard.num_documents)]
    assert {int(row[-1]) for row in rows} == {tokenizer.eod_id}
    return [tokenizer.decode(row[:-1].tolist()) for row in rows]


@pytest.fixture
def make(tmp_path: Path, tokenizer_path: Path) -> Make:
    def config(*sources: TextSourceConfig, **settings: Any) -> PrepareConfig:
        section = TokenizerConfig(path=tokenizer_path)
        return PrepareConfig(
            **{"output": tmp_path / "out", "tokenizer": section, "sources": sources, "workers": 1, **settings}
        )

    return config


def test_files_become_documents_closed_by_the_end_token(tmp_path: Path, tokenizer_path: Path) -> None:
    """Each document decodes to its text and ends with the end-of-document token; the manifest counts them."""
    (tmp_path / "a.txt").write_text("The cat sat.\n")
    (tmp_path / "b.jsonl").write_text('{"text": "Is it?"}\n{"text": " "}\n{"text": "It is."}\n')
    manifest = tokenize_files([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer_path, tmp_path / "out", workers=1)
    assert documents(tmp_path / "out", tokenizer_path) == ["The cat sat.\n", "Is it?", "It is."]
    assert manifest["documents"] == {"read": 4, "written": 3, "repeated": 0, "dropped": {"blank": 1}}
    assert json.loads((tmp_path / "out.manifest.json").read_text()) == manifest
    assert manifest["tokens"] == Shard.open(tmp_path / "out").num_tokens
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == [
        "out.bin", "out.idx", "out.manifest.json",
    ]  # fmt: skip


def test_separators_are_counted(tmp_path: Path, make: Make) -> None:
    """Density and the largest gap, by hand: 'a.bc' and 'abcd' are 1 separator in 10 tokens, at most 5 apart."""
    manifest = prepare(make(source(write_jsonl(tmp_path / "a.jsonl", ["q.zx", "qzxv"]))))
    assert manifest["tokens"] == 10
    assert manifest["separator_density"] == pytest.approx(0.1)
    assert manifest["largest_gap"] == 5


def test_all_ways_to_drop_are_counted(tmp_path: Path, make: Make, tokenizer_path: Path) -> None:
    """Exact and near duplicates, contaminated and bad records leave; the rest stays in order, and the counts add up."""
    generator = random.Random(0)
    long = sentence(generator, 400)
    near = long.replace("cat", "cow", 1)
    held_out = "one two three four five six seven eight nine ten eleven twelve thirteen"
    texts = ["first", long, "first", near, f"x {held_out.upper()}! y", " ", "last"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_bytes(path.read_bytes() + b"{broken\n")
    tests = write_jsonl(tmp_path / "test.jsonl", ["short", f"so {held_out} fourteen"])
    config = make(
        source(path), on_bad="skip",
        deduplicate=DeduplicateConfig(exact=True, near=True), decontaminate=DecontaminateConfig(paths=(str(tests),)),
    )  # fmt: skip
    manifest = prepare(config)
    assert documents(config.output, tokenizer_path) == ["first", long, "last"]
    assert manifest["documents"] == {
        "read": 8, "written": 3, "repeated": 0,
        "dropped": {"blank": 1, "broken JSON": 1, "contaminated": 1, "exact duplicate": 1, "near duplicate": 1},
    }  # fmt: skip
    report = [json.loads(line) for line in (tmp_path / "out.contamination.jsonl").read_text().splitlines()]
    assert report == [{"document": f"{path}:5", "matches": 1, "words": held_out, "test": f"{tests}:2"}]


def test_weights_repeat_and_sample(tmp_path: Path, make: Make, tokenizer_path: Path) -> None:
    """Weight 2.5 writes each document twice and about half a third time; weight 0.5 writes about half."""
    one = write_jsonl(tmp_path / "one.jsonl", [f"one {i}" for i in range(200)])
    two = write_jsonl(tmp_path / "two.jsonl", [f"two {i}" for i in range(200)])
    config = make(source(one, weight=2.5), source(two, weight=0.5))
    manifest = prepare(config)
    found = documents(config.output, tokenizer_path)
    times = [found.count(f"one {i}") for i in range(200)]
    assert set(times) == {2, 3}
    assert 70 < times.count(3) < 130
    assert 70 < len([text for text in found if text.startswith("two")]) < 130
    assert manifest["documents"]["dropped"] == {"sampled out by weight": 600 + times.count(3) - len(found)}
    assert manifest["documents"]["repeated"] == 200 + times.count(3)
    assert f"{one}: {200 * 2 + times.count(3)} documents" in summary(config.output, manifest)


def test_shuffled_documents_are_the_same_documents(tmp_path: Path, make: Make, tokenizer_path: Path) -> None:
    """shuffle: true changes the order and nothing else."""
    texts = [f"document {i}" for i in range(50)]
    config = make(source(write_jsonl(tmp_path / "a.jsonl", texts)), shuffle=True)
    prepare(config)
    found = documents(config.output, tokenizer_path)
    assert found != texts
    assert sorted(found) == sorted(texts)


def test_normalisation_is_off_until_asked_for(tmp_path: Path, make: Make, tokenizer_path: Path) -> None:
    """A decomposed letter stays decomposed under `none` and is composed under `nfc`."""
    path = write_jsonl(tmp_path / "a.jsonl", ["e\u0301"])
    for form, text in (("none", "e\u0301"), ("nfc", "\u00e9")):
        config = make(source(path), normalize=form, output=tmp_path / form)
        prepare(config)
        assert documents(config.output, tokenizer_path) == [text]


def test_a_bad_record_stops_a_run_that_a_setting_lets_go_on(tmp_path: Path, make: Make) -> None:
    """The message of the worker comes through with file and line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(TextError, match=r"a\.jsonl, line 2: bad UTF-8"):
        prepare(make(source(path)))


def test_done_is_done_and_other_settings_are_refused(tmp_path: Path, make: Make) -> None:
    """A second run returns the manifest; with other settings or other text it says what differs."""
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    manifest = prepare(make(source(path)))
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    assert prepare(make(source(path), workers=2)) == manifest
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before
    with pytest.raises(PrepareError, match="other settings or text \\(normalize\\)"):
        prepare(make(source(path), normalize="nfc"))
    write_jsonl(path, ["a", "c"])
    with pytest.raises(PrepareError, match=r"a\.jsonl"):
        prepare(make(source(path)))


def test_settings_that_came_to_nothing_are_in_nobody_s_way(tmp_path: Path, make: Make) -> None:
    """After a run that failed at its first record the mistake is corrected and the same output is made."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"words": "a"}\n')
    with pytest.raises(TextError, match="missing field"):
        prepare(make(source(path)))
    assert prepare(make(source(path, field="words")))["documents"]["written"] == 1


def test_work_that_was_done_is_not_mixed_with_other_settings(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stopped behind its first block is only gone on with as it was."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"words": "c"}\n')
    monkeypatch.setattr("megatron_sep.prepare.readings.BLOCK_RECORDS", 1)
    monkeypatch.setattr("megatron_sep.prepare.ledger._SECONDS", 0)
    with pytest.raises(TextError, match="line 3: missing field"):
        prepare(make(source(path)))
    with pytest.raises(PrepareError, match=r"holds work of other settings or text \(on_bad\)"):
        prepare(make(source(path), on_bad="skip"))


def test_a_receipt_that_is_none_is_named(tmp_path: Path, make: Make) -> None:
    """Something else under the receipt's name is not written over."""
    (tmp_path / "out.manifest.json").write_text("notes")
    with pytest.raises(PrepareError, match=r"out\.manifest\.json: is no receipt.* remove it"):
        prepare(make(source(write_jsonl(tmp_path / "a.jsonl", ["a"]))))


def test_nothing_left_is_an_error(tmp_path: Path, make: Make) -> None:
    """An empty shard is not written."""
    with pytest.raises(PrepareError, match="no document is left"):
        prepare(make(source(write_jsonl(tmp_path / "a.jsonl", [" "]))))
    assert not (tmp_path / "out.bin").exists()


def test_bands_that_no_signature_holds_are_refused() -> None:
    """Or no near duplicate would ever be found, and nobody told."""
    with pytest.raises(ValueError, match="rows=100 is above permutations=64"):
        DeduplicateConfig(near=True, rows=100, permutations=64)


def test_folders_and_globs_name_files_once(tmp_path: Path) -> None:
    """Sorted, deep, without files of other kinds; what names nothing is an error."""
    for name in ("b/x.txt", "a.jsonl.zst", "c.csv", "b/y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    wanted = [tmp_path / "a.jsonl.zst", tmp_path / "b/x.txt", tmp_path / "b/y.jsonl"]
    assert expand([str(tmp_path)], "key") == wanted
    assert expand([str(tmp_path / "b/*"), str(tmp_path / "b/x.txt")], "key") == wanted[1:]
    with pytest.raises(TextError, match=r"key: .*none\*: no file"):
        expand([str(tmp_path / "none*")], "key")


@pytest.mark.parametrize("shuffle", [False, True])
def test_parts_make_the_bytes_of_the_whole(tmp_path: Path, make: Make, shuffle: bool) -> None:
    """One part, some and more than there are files; little memory, and much."""
    sources = corpus_of_all_kinds(tmp_path)
    settings = all_stages(tmp_path, sources) | {"shuffle": shuffle}
    manifest = prepare(make(*sources, output=tmp_path / "whole", **settings))
    assert len(manifest["documents"]["dropped"]) == 6
    for parts in (3, 9):
        prepare(make(*sources, output=tmp_path / f"in{parts}", memory=1, **settings), parts)
        same_files(tmp_path / "whole", tmp_path / f"in{parts}")


CHILD = """
import os, shutil, signal, sys
from pathlib import Path
from megatron_sep.config.load import load
from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.prepare import ledger, prepare, readings

def fatal(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

if __name__ == "__main__":
    left = int(sys.argv[2])
    readings.BLOCK_RECORDS, ledger._SECONDS = 20, 0.0
    ledger.Ledger.append = fatal(ledger.Ledger.append)
    Path.replace, os.link, shutil.rmtree = fatal(Path.replace), fatal(os.link), fatal(shutil.rmtree)
    prepare.prepare(load(PrepareConfig, Path(sys.argv[1]), sys.argv[4:]), int(sys.argv[3]))
    print(left)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, tokenizer_path: Path) -> None:
    """kill -9 from the first write to the last rename, with other numbers of workers: every file is the same."""
    generator = random.Random(1)
    texts = [sentence(generator, generator.randrange(1, 60)) for _ in range(300)]
    write_jsonl(tmp_path / "a.jsonl", texts[:200] + texts[:20])
    write_jsonl(tmp_path / "b.jsonl", texts[200:] + texts[:20])
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "config.yaml").write_text(
        f"output: out\ntokenizer: {{path: {tokenizer_path}}}\ndeduplicate: {{exact: true, near: true}}\nshuffle: true\n"
        f"sources: [{{paths: [{tmp_path}/a.jsonl], weight: 1.5}}, {{paths: [{tmp_path}/b.jsonl]}}]\n"
    )

    def run(output: str, kill_at: int, workers: int, parts: int = 1) -> tuple[int, int]:
        overrides = [f"output={tmp_path / output}", f"workers={workers}"]
        command = [sys.executable, str(tmp_path / "child.py"), str(tmp_path / "config.yaml"), str(kill_at), str(parts)]
        done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode, 0 if done.returncode else int(done.stdout)

    assert run("whole", 1_000_000, 2)[0] == 0
    code, left = run("parted", 1_000_000, 2, parts=2)
    assert code == 0
    steps = 1_000_000 - left
    kills = 0
    for kill_at in np.linspace(1, steps, 7).astype(int).tolist():
        kills += run("killed", kill_at, 1 + kills % 2, parts=2)[0] != 0
    assert kills >= 3
    assert run("killed", 0, 1)[0] == 0
    for suffix in (".bin", ".idx", ".manifest.json"):
        assert (tmp_path / f"whole{suffix}").read_text("latin-1").replace("whole", "killed") == (
            tmp_path / f"killed{suffix}"
        ).read_text("latin-1")
    assert not list(tmp_path.glob("killed.work*"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["out.bin", "out.idx"])
def test_a_file_that_prepare_did_not_make_is_not_overwritten(tokenizer_path: Path, tmp_path: Path, name: str) -> None:
    """A shard without a receipt, of GPT-NeoX's own tool for example: refused before any work, and left as it is."""
    (tmp_path / "a.txt").write_text("One two.")
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(PrepareError, match=rf"{name}: is there already and has no receipt of `prepare`; choose"):
        tokenize_files([tmp_path / "a.txt"], tokenizer_path, tmp_path / "out", workers=1)
    assert (tmp_path / name).read_bytes() == b"somebody's"
    assert not (tmp_path / "out.manifest.json").exists()
    (tmp_path / name).unlink()
    tokenize_files([tmp_path / "a.txt"], tokenizer_path, tmp_path / "out", workers=1)
