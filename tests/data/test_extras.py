"""A library of an extra that is missing is named with the command that installs it."""

import sys
from pathlib import Path

import pytest

from megatron_sep.data.extras import MissingLibraryError, needs_extra
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.prepare.dedup import signatures
from megatron_sep.prepare.shingles import runs
from megatron_sep.prepare.text import open_text


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zstandard and rensa come with `data`, sentencepiece with its own."""
    for name in ("zstandard", "rensa", "sentencepiece"):
        monkeypatch.setitem(sys.modules, name, None)
    for suffix in (".zst", ".model"):
        (tmp_path / f"a{suffix}").write_bytes(b"x")
    for library, extra, use in (
        ("zstandard", "data", lambda: open_text(tmp_path / "a.zst")),
        ("rensa", "data", lambda: signatures([runs("a b c", 2)], 16)),
        ("sentencepiece", "sentencepiece", lambda: load_tokenizer(tmp_path / "a.model")),
    ):
        with pytest.raises(
            MissingLibraryError, match=rf"{library} is not installed; pip install megatron_sep\[{extra}\]"
        ):
            use()


@pytest.mark.parametrize("error", [ImportError("cannot import name 'x'"), ModuleNotFoundError("y", name="rensa_y")])
def test_another_failed_import_is_not_blamed_on_the_library(error: ImportError) -> None:
    """A fault inside a library that is there, or of another module, stays what it is."""
    with pytest.raises(ImportError) as raised, needs_extra("rensa", "data"):
        raise error
    assert raised.value is error
