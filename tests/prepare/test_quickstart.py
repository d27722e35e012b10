"""The quickstart's corpus is there wherever transformers is, and its absence is told."""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_sep.data.extras import MissingLibraryError
from megatron_sep.prepare import quickstart


def test_documents_are_configurations_without_their_licence() -> None:
    """Hundreds of modules, enough for a training of some minutes, each with a class that is described in words."""
    texts = list(quickstart.documents())
    assert len(texts) > 300
    assert sum(map(len, texts)) > 1_500_000
    assert not any(text.startswith(("#", "\n")) for text in texts)
    assert sum("defaults to" in text for text in texts) > 0.8 * len(texts)


def test_a_second_call_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the files hold what the documents hold."""
    monkeypatch.setattr(quickstart, "documents", lambda: iter([f"class C{i}:\n    x = {i}\n" * 40 for i in range(20)]))
    monkeypatch.setattr(quickstart, "VOCAB_SIZE", 300)
    quickstart.make_corpus(tmp_path)
    assert "20 documents" in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    quickstart.make_corpus(tmp_path)
    assert "is there already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["text"] for line in lines) == sorted(quickstart.documents())


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written then."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingLibraryError, match=r"pip install megatron_sep\[hf\]"):
        quickstart.make_corpus(tmp_path / "out")
    assert not (tmp_path / "out").exists()
