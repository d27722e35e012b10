"""Machines without a shared disk: work lies in an object store, and the shard is that of one process."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import ValidationError
from support.bucket import served_bucket
from support.prepared import all_stages, corpus_of_all_kinds, same_files, source

from megatron_sep.config.prepare import DeduplicateConfig, PrepareConfig, WorkConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.errors import RunFailure
from megatron_sep.files import remove
from megatron_sep.prepare import worker
from megatron_sep.prepare.at_work import whole_work
from megatron_sep.prepare.jobs import merge, work_on
from megatron_sep.prepare.objects import Objects
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.pieces import PieceLedger, committed
from megatron_sep.prepare.pool import map_here
from megatron_sep.prepare.prepare import Wish, prepare
from megatron_sep.prepare.receipt import PrepareError
from megatron_sep.prepare.remote_work import RemoteWork
from megatron_sep.prepare.work import Work

pytest.importorskip("upath", reason="needs the extra remote; pip install megatron_sep[remote]")
fsspec = pytest.importorskip("fsspec")

SETTINGS = {"seed": 1}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, served_bucket(patch) as address:
        yield address


@pytest.fixture
def here(bucket: str, tmp_path: Path) -> str:
    """An address of this test alone."""
    return f"{bucket}/{tmp_path.name}"


def config_of(folder: Path, here: str, machine: int = 0, **settings: Any) -> PrepareConfig:
    """Of a machine with a disk of its own."""
    work = WorkConfig(address=f"{here}/work", scratch=folder / f"disk{machine}" / "scratch")
    return PrepareConfig(output=folder / f"disk{machine}" / "out", work=work, **settings)


class ThisProcess:
    """A ``Pool`` of nobody else."""

    size = machines = 1

    def __init__(self, job: Job) -> None:
        worker.work_on(job)

    def __enter__(self) -> "ThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map_here)


def test_machines_that_share_no_disk_make_the_bytes_of_one_process(
    here: str, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts on any machine, each merge on another; in the end the upload says to all that it is done."""
    pytest.importorskip("rensa")
    for room in ("jobs", "prepare"):
        monkeypatch.setattr(f"megatron_sep.prepare.{room}.ProcessPool", ThisProcess)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as a worker sets it
    sources = corpus_of_all_kinds(tmp_path / "text")
    settings: dict[str, Any] = {"tokenizer": TokenizerConfig(path=tokenizer_path), "workers": 1}
    settings |= {**all_stages(tmp_path, sources), "upload": f"{here}/shards"}
    fsspec.filesystem("s3").put(f"{tmp_path}/text/", f"{here}/text/", recursive=True)
    settings["deduplicate"] = DeduplicateConfig(exact=True, near=True, permutations=32)
    settings["sources"] = [
        one.model_copy(update={"paths": tuple(f"{here}/text/{Path(path).name}" for path in one.paths)})
        for one in sources
    ]
    configs = [config_of(tmp_path, here, machine, **settings) for machine in range(2)]
    for part in range(2):
        assert "scanned" in work_on(configs[part], part, 2)
    with pytest.raises(PrepareError, match=r"holds work of other settings or text \(parts\)"):
        work_on(configs[0], 0, 3)
    assert "decided" in merge(configs[1])
    for part in range(2):
        assert "encoded" in work_on(configs[1 - part], part, 2)
    assert "documents" in merge(configs[0])
    for verb in (merge, lambda config: work_on(config, 0, 2)):
        assert f"on another machine, and at {here}/shards" in verb(configs[1])
    assert not Objects(f"{here}/work").has("out.work")
    prepare(PrepareConfig(output=tmp_path / "whole" / "out", **settings))
    same_files(tmp_path / "whole" / "out", tmp_path / "disk0" / "out")
    _goes_on_elsewhere([config_of(tmp_path, here, machine, **settings) for machine in (2, 3)], monkeypatch)
    same_files(tmp_path / "whole" / "out", tmp_path / "disk3" / "out")


def _goes_on_elsewhere(configs: list[PrepareConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine scans and is gone with its disk, another one scans nothing again and ends it."""
    first, second = (one.model_copy(update={"upload": None}) for one in configs)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_sep.prepare.prepare.decide", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(first)
    remove(first.output.parent)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_sep.prepare.worker.scan", Mock(side_effect=AssertionError))
        prepare(second)


def test_what_cannot_be_a_place_of_work_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    """By name, with the way out; so is text that other machines do not see."""
    for address, message in (
        ("work", "is no address such as s3://bucket/work; on a disk that all see leave work out"),
        ("memory://work", "memory:// is the memory of one process, which no other sees"),
        ("file:///work", "file:// is a disk; one that all machines see needs no setting, leave work out"),
        ("sftp://host/work", "sftp:// is not known to show a file when it is whole and not before; .* of s3, s3a, gs"),
    ):
        with pytest.raises(ValidationError, match=message):
            WorkConfig(address=address)
    settings: dict[str, Any] = {"output": tmp_path / "out", "tokenizer": TokenizerConfig(path=tokenizer_path)}
    settings["work"] = WorkConfig(address="s3://bucket/work")
    for path in ("text/books", "memory://text"):
        with pytest.raises(ValidationError, match=rf"sources\[0\].paths: {path} is not seen by all machines"):
            PrepareConfig(sources=(source(Path("x")).model_copy(update={"paths": (path,)}),), **settings)
    (tmp_path / "a.txt").write_text("a")
    config = PrepareConfig(sources=(source(Path("x")).model_copy(update={"paths": (f"file://{tmp_path}/a.txt",)}),),
                           **settings)  # fmt: skip
    with pytest.raises(PrepareError, match="give upload, where its receipt says so"):
        work_on(config, 0, 2)


@pytest.fixture
def config(here: str, tmp_path: Path) -> PrepareConfig:
    """Of work of which only its place matters."""
    return config_of(tmp_path, here, tokenizer=TokenizerConfig(path=tmp_path), sources=[
        source(Path("x")).model_copy(update={"paths": ("s3://bucket/x.txt",)})])  # fmt: skip


def test_two_drivers_are_kept_apart(config: PrepareConfig, here: str, tmp_path: Path) -> None:
    """The second is told who is at work; where that one is gone, or was not seen for long, it goes on with the work."""
    place = Objects(f"{here}/work/out.work")
    other = config.model_copy(update={"output": tmp_path / "elsewhere" / "out"})
    with whole_work(config, SETTINGS, 3) as (_, work, parts):
        assert (parts, place.read_json("lock.json")["process"]) == (3, os.getpid())  # type: ignore[index]
        second = whole_work(other, SETTINGS, 5)
        with pytest.raises(PrepareError, match=rf"process {os.getpid()} of {os.uname().nodename} is at work.*seen 0 s"):
            second.__enter__()
    assert not place.has("lock.json")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    elsewhere = {"token": "a", "host": "elsewhere", "process": 1}
    place.write_json("lock.json", {**elsewhere, "seen": time.time() - 60})
    with pytest.raises(PrepareError, match=r"process 1 of elsewhere is at work there, seen 60 s ago; .* for 120 s"):
        whole_work(other, SETTINGS, 5).__enter__()
    for lock in (
        {**elsewhere, "seen": time.time() - 121},
        {**elsewhere, "host": os.uname().nodename, "process": gone.pid, "seen": time.time()},
    ):
        place.write_json("lock.json", lock)
        with whole_work(other, SETTINGS, 5) as (_, again, begun):
            assert (again, begun) == (work, 3)
    with pytest.raises(PrepareError, match=r"holds work of other settings or text \(seed\); remove it to start anew"):
        whole_work(other, {"seed": 2}, 3).__enter__()
    assert not place.has("lock.json")


def test_a_lock_is_held_as_long_as_the_work_and_never_taken_back(
    config: PrepareConfig, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is renewed; of one that another driver has taken it is neither renewed nor removed."""
    monkeypatch.setattr("megatron_sep.prepare.at_work._BEAT_SECONDS", 0.05)
    place = Objects(f"{here}/work/out.work")
    with whole_work(config, SETTINGS, 3):
        first = place.read_json("lock.json")
        while place.read_json("lock.json") == first:
            time.sleep(0.05)
        taken = {"token": "a", "host": "elsewhere", "process": 1, "seen": 0}
        while any(thread.name == "lock" for thread in threading.enumerate()):
            if place.read_json("lock.json") != taken:  # also after a beat that was on its way
                place.write_json("lock.json", taken)
            time.sleep(0.05)
    assert place.read_json("lock.json") == taken


def test_another_tokenizer_does_not_go_on_with_the_work(
    config: PrepareConfig, tmp_path: Path, tokenizer_path: Path
) -> None:
    """The first one's is what all machines use, whatever lies at the path on another."""
    path = tmp_path / "tokenizer.json"
    for end in ("", "\n"):
        path.write_text(tokenizer_path.read_text() + end)
        section = TokenizerConfig(path=path)
        wish = Wish(config.model_copy(update={"tokenizer": section}), load_tokenizer(path), [], {}, None)
        with whole_work(config, SETTINGS, 1) as (folder, work, _):
            if not end:
                assert wish.job(folder, 1, work).tokenizer_path.read_bytes() == path.read_bytes()
                continue
            with pytest.raises(PrepareError, match=r"tokenizer\.json: is not the file that this work was begun with"):
                wish.job(folder, 1, work)


@pytest.fixture
def machines(here: str, tmp_path: Path) -> list[Work]:
    """The same work, seen from two machines."""
    return [RemoteWork(Objects(here), "id", tmp_path / f"scratch{number}") for number in range(2)]


def test_what_one_machine_has_made_another_fetches_once(machines: list[Work], here: str) -> None:
    """With what lies beside it; a step of the search leaves nothing of the one before on a machine."""
    one, other = machines
    for step in ("one", "two"):
        with one.made(f"near/a/{step}/keys") as path:
            path.write_text(step)
            path.with_name("keys.npy").write_text(f"beside {step}")
    first = other.get_all(["near/a/one/keys", "near/a/one/keys.npy"])
    assert [path.read_text() for path in first] == ["one", "beside one"]
    Objects(here).remove("near/a/one")
    assert other.get("near/a/one/keys").read_text() == "one"
    assert other.get("near/a/two/keys").read_text() == "two"
    assert not first[0].exists()
    with pytest.raises(RunFailure, match="near/a/one/keys: is gone; somebody removed it, or another run"):
        other.get("near/a/one/keys")


def test_a_file_that_was_not_finished_is_not_there(machines: list[Work]) -> None:
    """Nor is anything of it on the machine that made it."""
    one, other = machines

    def fails() -> None:
        with one.made("drops") as path:
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert not other.has("drops")
    with pytest.raises(RunFailure, match="drops: is gone"):
        one.get("drops")


def test_a_ledger_goes_on_where_it_was_committed(machines: list[Work], here: str) -> None:
    """On another machine; of two at the same part either is right, and that it is done is never taken back."""
    one, other = machines
    with one.ledger(0, "scan", ("a", "b"), {"n": 0}) as ledger:
        ledger.append("a", b"12")
        ledger.value["n"] = 2
        ledger.commit()
        ledger.append("a", b"lost")
    with other.ledger(0, "scan", ("a", "b"), {"n": 0}) as second, one.ledger(0, "scan", ("a", "b"), {"n": 0}) as first:
        assert (second.value, second.done) == ({"n": 2}, False)
        first.append("a", b"3")
        first.append("b", b"x")
        first.value["n"] = 3
        first.commit()
        second.append("a", b"34")
        second.append("b", b"xy")
        second.value["n"] = 4
        second.commit(done=True)
        first.append("a", b"4")
        first.commit()
    state = committed(Objects(here), "part-00000/scan")
    assert state is not None
    assert (state["value"], state["done"]) == ({"n": 4}, True)
    for machine in machines:
        assert machine.get("part-00000/scan.a").read_bytes() == b"1234"
        assert b"".join(machine.pieces("part-00000/scan.b")) == b"xy"


def test_much_that_is_appended_is_committed_at_once(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait in memory until its time comes."""
    monkeypatch.setattr("megatron_sep.prepare.pieces._BYTES", 3)
    with PieceLedger(Objects(here), "part-00000/scan", ("a",), {}) as ledger:
        ledger.append("a", b"123")
        ledger.commit_sometimes()
        assert committed(Objects(here), "part-00000/scan") is None
        ledger.append("a", b"4")
        ledger.commit_sometimes()
        assert len(committed(Objects(here), "part-00000/scan")["pieces"]["a"]) == 1  # type: ignore[index]
