"""Two trainings on one dir: the second is refused before it has touched anything."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import forked

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.parallel.groups import topology
from megatron_sep.train.run_lock import DirInUseError, run_lock

pytestmark = pytest.mark.usefixtures("single_process")

HOLD = """
import sys, time
from pathlib import Path
from megatron_sep.train import run_lock
held = run_lock._take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[forked.Process]:
    """Another process that trains in tmp_path / run."""
    said = tmp_path / "said"
    process = forked.start("-c", HOLD, tmp_path / "run", out=said)
    while said.read_text() != "held\n":
        assert process.poll() is None, said.read_text()
        time.sleep(0.01)
    yield process
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_the_second_is_refused_and_the_first_goes_on(
    holder: forked.Process, tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """`train` on a dir that is in use names the process and the host and writes nothing; exit code 2."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny()))
    refused = forked.run("-m", "megatron_sep", "train", path, folder=tmp_path)
    assert refused.returncode == 2
    assert f"process {holder.pid} of {os.uname().nodename} trains there already" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]


def test_what_a_killed_process_left_is_taken_over_and_said(
    holder: forked.Process, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system has let go of the lock; the next training says whose it was."""
    with pytest.raises(DirInUseError), run_lock(tmp_path / "run", topology()):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    time.sleep(0.05)
    with run_lock(tmp_path / "run", topology()):
        assert (
            f"process {holder.pid} of {os.uname().nodename} ended without letting go of it" in capsys.readouterr().out
        )
    with run_lock(tmp_path / "run", topology()):
        assert capsys.readouterr().out == ""


def test_a_dir_that_cannot_be_written_to_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    """A file in the way, found at the start and not at the first checkpoint."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DirInUseError, match=r"cannot be written to .*; set another dir"),
        run_lock(tmp_path / "file" / "run", topology()),
    ):
        pass
