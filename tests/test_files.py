"""Files are complete or not there, whatever happens while they are written."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sep.files import flush_tree, remove, sha256, write_json, written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftover(path: Path, process: int, host: str | None = None) -> Path:
    """What a process that was killed while it wrote ``path`` leaves."""
    return path.with_name(f".{path.name}.{host or os.uname().nodename}-{process}.partial")


@pytest.fixture
def dead() -> int:
    """The number of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["old", None])
def test_an_error_inside_leaves_what_was_there(tmp_path: Path, error: type[BaseException], before: str | None) -> None:
    """The old file is whole, or there is none; nothing else is left."""
    path = tmp_path / "file"
    if before:
        path.write_text(before)

    def write() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == (["file"] if before else [])
    assert not before or path.read_text() == before


def test_an_error_inside_a_directory_leaves_nothing(tmp_path: Path) -> None:
    """Files and folders that were made in it go too."""

    def write() -> None:
        with written_aside(tmp_path / "made") as aside:
            (aside / "deep").mkdir(parents=True)
            (aside / "deep" / "file").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert names(tmp_path) == []


def test_a_file_or_a_directory_gets_its_name_with_its_folders(tmp_path: Path) -> None:
    """The folders above are made, and nothing stands under the name before the block has ended."""
    file, made = tmp_path / "a" / "b" / "file", tmp_path / "c" / "made"
    with written_aside(file) as aside:
        aside.write_text("x")
        assert not file.exists()
    with written_aside(made) as aside:
        aside.mkdir()
        (aside / "y").write_text("y")
        assert not made.exists()
    assert (names(file.parent), file.read_text(), names(made)) == (["file"], "x", ["y"])


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files and folders are flushed, then comes the rename, then the list of names above it is flushed."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append("/".join(part for part in place.relative_to(tmp_path).parts if not part.startswith(".")) or ".")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    with written_aside(tmp_path / "made") as aside:
        (aside / "deep").mkdir(parents=True)
        (aside / "deep" / "file").write_text("x")
    inside, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert sorted(inside) == [".", "deep", "deep/file"]
    assert after == ["."]


def test_a_directory_replaces_nothing(tmp_path: Path) -> None:
    """Full or empty, a directory that is there is refused before the block; one that appears meanwhile after it."""
    made = tmp_path / "made"
    made.mkdir()
    with pytest.raises(FileExistsError, match=r"is there already and is no file: '.*/made'"), written_aside(made):
        pytest.fail("the block was entered")
    made.rmdir()

    def write(meanwhile: Callable[[], object]) -> None:
        with written_aside(made) as aside:
            aside.mkdir()
            meanwhile()

    with pytest.raises(FileExistsError, match="is there already and is no file"):
        write(made.mkdir)
    made.rmdir()
    with pytest.raises(FileExistsError, match="is there already: "):
        write(lambda: made.write_text("other"))
    assert (names(tmp_path), made.read_text()) == (["made"], "other")


def test_a_device_is_not_replaced() -> None:
    """What is written to /dev/null must not take its place."""
    with pytest.raises(FileExistsError, match="is no file: '/dev/null'"), written_aside(Path("/dev/null")):
        pytest.fail("the block was entered")
    assert Path("/dev/null").is_char_device()


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    """Written through, as by open()."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    link = tmp_path / "link"
    link.symlink_to("real/file")
    write_json(link, {"new": 1})
    assert link.readlink() == Path("real/file")
    assert "new" in (tmp_path / "real" / "file").read_text()
    assert names(tmp_path / "real") == ["file"]


def test_of_two_writers_the_last_to_end_wins(tmp_path: Path) -> None:
    """A second process begins and ends while the first one writes; both files were whole."""
    path = tmp_path / "file"
    program = (
        "import sys; from pathlib import Path; from megatron_sep.files import write_json;"
        "write_json(Path(sys.argv[1]), {'who': 'child'})"
    )
    with written_aside(path) as aside:
        aside.write_text("parent")
        subprocess.run([sys.executable, "-c", program, str(path)], check=True)
        assert "child" in path.read_text()
    assert path.read_text() == "parent"
    assert names(tmp_path) == ["file"]


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_sep.files import written_aside

with written_aside(Path(sys.argv[1])) as aside:
    aside.write_text("new, but only ha")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """And what it leaves beside it goes when the file is written next."""
    path = tmp_path / "file"
    path.write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2
    write_json(path, {})
    assert names(tmp_path) == ["file"]


def test_only_leftovers_of_dead_processes_of_this_machine_go(tmp_path: Path, dead: int) -> None:
    """What a live process, another machine or another file has there is left alone."""
    path = tmp_path / "file"
    gone = [leftover(path, dead), leftover(path, os.getpid())]
    kept = [
        leftover(path, os.getppid()),
        leftover(path, dead, host="elsewhere"),
        leftover(tmp_path / "file2", dead),
        leftover(path, dead).with_suffix(".notes"),
    ]
    gone[0].mkdir()
    (gone[0] / "inside").write_text("x")
    for other in [gone[1], *kept]:
        other.write_text("x")
    write_json(path, {})
    assert names(tmp_path) == sorted(["file", *(other.name for other in kept)])


def test_errors_name_the_path_that_was_asked_for(tmp_path: Path) -> None:
    """Not the name it has while it is written, whether it or something in it cannot be opened."""
    (tmp_path / "in_the_way").write_text("x")
    with pytest.raises(FileExistsError, match=r"File exists: '.*/in_the_way'"):
        write_json(tmp_path / "in_the_way" / "file", {})

    def open_inside(path: Path) -> None:
        with written_aside(path) as aside:
            aside.mkdir()
            (aside / "missing" / "file").write_text("x")

    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/made/missing/file'"):
        open_inside(tmp_path / "made")

    def fill(path: Path) -> None:
        with written_aside(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/full'"):
        fill(tmp_path / "full")


def test_removing_is_done_when_nothing_is_there(tmp_path: Path) -> None:
    """A file, a tree, a link without what it points to, and nothing, even below a file; a link's target stays."""
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    remove(tmp_path / "file" / "below")
    remove(tmp_path / "nothing")
    remove(tmp_path / "link")
    assert (tmp_path / "tree" / "deep").is_dir()
    for name in ("broken", "tree", "file"):
        remove(tmp_path / name)
    assert names(tmp_path) == []


def test_json_is_readable_and_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    """Text is not escaped, paths are text, and the last line ends."""
    write_json(tmp_path / "a.json", {"ü": Path("x")})
    assert (tmp_path / "a.json").read_text() == '{\n  "ü": "x"\n}\n'
    (tmp_path / "b").write_bytes(b"abc")
    assert sha256(tmp_path / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    flush_tree(tmp_path)
