"""`tools/census.py` holds architectures against their own attention, and the table in the docs is what it found."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.cases import full_run

from megatron_sep.attention.pattern import AttentionPattern

ROOT = Path(__file__).parents[2]
SOME = {
    "doge": "refused",
    "falcon": "exact",
    "gemma4": "exact",
    "gpt2": "exact",
    "mistral": "exact",
    "musicgen": "not verified",
    "qwen3_next": "refused",
}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import census

    yield census
    for name in ("census", "tiny_models"):
        sys.modules.pop(name)


def rows_in_docs() -> list[str]:
    lines = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8").splitlines()
    begin, end = lines.index("<!-- table of tools/census.py -->"), lines.index("<!-- end of the table -->")
    return lines[begin + 1 : end]


def test_the_table_in_the_docs_is_what_it_finds(tool: Any) -> None:
    """Of all architectures under ``--full``, of some in the gate; none is wrong and none crashes."""
    found = tool.census(None if full_run() else list(SOME))
    verdicts = Counter(finding.verdict for finding in found)
    assert not {tool.WRONG, tool.CRASHES} & set(verdicts)
    written = rows_in_docs()
    assert written[0].startswith(f"transformers {transformers.__version__}, ")
    assert {finding.row() for finding in found} <= set(written)
    if full_run():
        assert written == tool.table(found).splitlines()
        assert verdicts[tool.EXACT] >= 85
    else:
        assert {finding.architecture: finding.verdict for finding in found} == SOME


def test_another_mask_is_found_to_be_wrong(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window one token wider, every way through the cache differs from the model's own attention."""
    attach, wider = tool.attach, AttentionPattern(6, 2, tool.SEP.separator_ids)
    monkeypatch.setattr(tool, "attach", lambda model, _: attach(model, wider))
    (found,) = tool.census(["llama"])
    assert (found.verdict, found.why) == (tool.WRONG, "whole, chunks, token by token, padded, generate")
