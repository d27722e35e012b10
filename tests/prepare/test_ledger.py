"""A ledger forgets what was not committed, and nothing else."""

from pathlib import Path

import pytest

from megatron_sep.prepare.ledger import Ledger


def test_what_follows_the_last_commit_is_cut_off(tmp_path: Path) -> None:
    """Data and value go back together to the last commit."""
    with Ledger(tmp_path, "stage", ("a", "b"), {"n": 0}) as ledger:
        ledger.append("a", b"one")
        ledger.value["n"] = 1
        ledger.commit()
        ledger.append("a", b"two")
        ledger.append("b", b"two")
        ledger.value["n"] = 2
    assert ledger.path("a").read_bytes() == b"onetwo"
    with Ledger(tmp_path, "stage", ("a", "b"), {"n": 0}) as ledger:
        assert (ledger.value, ledger.done) == ({"n": 1}, False)
        ledger.append("a", b"2")
        ledger.commit(done=True)
    assert (ledger.path("a").read_bytes(), ledger.path("b").read_bytes()) == (b"one2", b"")
    with Ledger(tmp_path, "stage", ("a", "b"), {"n": 0}) as ledger:
        assert ledger.done


def test_an_error_inside_leaves_the_last_commit(tmp_path: Path) -> None:
    """An exception does not commit."""

    def fail() -> None:
        with Ledger(tmp_path, "stage", ("a",), {"n": 0}) as ledger:
            ledger.append("a", b"x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with Ledger(tmp_path, "stage", ("a",), {"n": 0}) as ledger:
        assert ledger.path("a").stat().st_size == 0
