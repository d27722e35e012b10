"""`verify` passes what is right in every way of computing it, and names what is not."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import full_run

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config import RunConfig
from megatron_sep.convert.convert import convert
from megatron_sep.evaluate import ways
from megatron_sep.parallel.groups import topology
from megatron_sep.report import verify as verifying
from megatron_sep.report.verify import VerifyError, verify
from megatron_sep.weights.sealed import finished_checkpoints

pytestmark = pytest.mark.usefixtures("single_process")


def trained(config: RunConfig) -> Path:
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    train(build_run(config, topology()))
    return config.dir


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of all tests here lies."""
    return tmp_path_factory.mktemp("run") / "run"


@pytest.fixture
def run(tiny: Callable[..., RunConfig], once: Path, tmp_path: Path) -> Path:
    """A copy of a trained SepLLM run, H with documents kept apart."""
    if not once.exists():
        trained(tiny(dir=once, attention={"document_boundaries": True}, train={"steps": 2, "eval_every": 0}))
    shutil.copytree(once, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leaves out the ways that a test does not look at."""

    def leave(*names: str) -> None:
        others = ways.Ways.others
        monkeypatch.setattr(ways.Ways, "others", lambda self: {name: others(self)[name] for name in names})

    return leave


def found(path: Path, text: Path | None = None) -> list[str]:
    return list(verify(path, text, topology()))


def wrong(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("!")]


def test_a_run_and_its_export_are_verified(run: Path, tmp_path: Path) -> None:
    """Every way is there, under the rule of SepLLM, on the run's own text, with the fused kernel in its interpreter."""
    lines = found(run)
    assert wrong(lines) == []
    said = "\n".join(lines)
    for way in ("fused training", "prefill", "decoded", "export", "export decoded"):
        assert f"  {way}: " in said
    assert "left out" not in said
    for text in ("of the run's training data", "each with the SHA-256", "those that wrote it", "the one of training"):
        assert text in said
    convert(run, tmp_path / "export")
    lines = found(tmp_path / "export")
    assert wrong(lines) == []
    assert any("no sums to hold its files against" in line for line in lines)
    assert any("the run's data are not here" in line for line in lines)


def test_other_positions_are_not_exported_and_that_is_said(tiny: Callable[..., RunConfig]) -> None:
    """ALiBi: training, prefill and decoding agree, the export is left out with its reason."""
    lines = found(trained(tiny(model={"position": {"kind": "alibi"}}, train={"steps": 1, "eval_every": 0})))
    assert wrong(lines) == []
    assert any(line.startswith("  export, export decoded: left out: ") and "alibi" in line for line in lines)


def test_a_text_of_the_user_is_computed(run: Path, tmp_path: Path, only: Callable[..., None]) -> None:
    """Its tokens are counted; one that is too short, or is no text, is refused."""
    only("fused training")
    (tmp_path / "text").write_text("alpha is more than beta, one two three. " * 9)
    assert any(f"tokens of {tmp_path / 'text'}, " in line for line in found(run, tmp_path / "text"))
    (tmp_path / "short").write_text("one")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, why in (("short", "tokens; 8 at least"), ("bytes", "cannot be read"), ("gone", "cannot be read")):
        with pytest.raises(VerifyError, match=why):
            found(run, tmp_path / name)


def test_a_byte_that_changed_is_found(run: Path) -> None:
    """In the newest checkpoint, which is not passed over for an older one."""
    newest = finished_checkpoints(run / "checkpoints")[-1]
    shutil.copytree(newest, newest.with_name("step-00000001"))
    file = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (line,) = found(run)
    assert line.startswith("! files: ")
    assert str(file) in line


def test_another_tokenizer_is_found(run: Path, corpus: Path, tmp_path: Path, only: Callable[..., None]) -> None:
    """One of as many tokens, with two of them exchanged."""
    only()
    tree = json.loads((corpus / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    newest = finished_checkpoints(run / "checkpoints")[-1]
    moved = tmp_path / "moved" / "checkpoints" / newest.name
    shutil.copytree(newest, moved)
    assert wrong(found(moved)) == []
    (moved / "tokenizer.json").write_text(json.dumps(tree))
    assert wrong(found(moved)) == ["! tokenizer: its content is not that of training; bring that one back"]


def test_a_cache_that_keeps_one_key_less_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    """A window that is shorter by one in decoding than in training, and only there."""
    only("prefill, decoded")
    attach = ways.attach

    def shorter(model: Any, patterns: list[AttentionPattern], **options: Any) -> Any:
        less = [replace(p, window=p.window - 1) if p.window else p for p in patterns]
        return attach(model, less, **options)

    monkeypatch.setattr(ways, "attach", shorter)
    assert [line.split(":")[0] for line in wrong(found(run))] == ["! prefill", "! decoded"]


def test_an_export_that_sees_something_else_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    """Its settings lack the separators: the masks differ, and the logits."""
    only("export, export decoded")
    rules = ways.export_rules

    def fewer(source: Any) -> dict[str, Any]:
        return rules(source) | {"separator_ids": []}

    monkeypatch.setattr(verifying, "export_rules", fewer)
    monkeypatch.setattr(ways, "export_rules", fewer)
    assert [line.split(":")[0] for line in wrong(found(run))] == ["! masks", "! export", "! export decoded"]


def test_weights_that_are_no_numbers_are_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences of NaN are no agreement."""
    monkeypatch.setattr(ways, "own_logits", lambda *_: [torch.full((1, 4, 4), torch.nan)])
    lines = found(run)
    assert wrong(lines) == ["! the training mask: a logit is no number; the weights are broken"]


@pytest.mark.skipif(not full_run(), reason="two processes; run with --full")
def test_the_verb_passes_or_fails(run: Path) -> None:
    """The last line says which, and so does the exit code."""

    def called() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "megatron_sep", "verify", str(run)]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)

    right = called()
    assert (right.returncode, right.stdout.splitlines()[-1]) == (0, "verified")
    (finished_checkpoints(run / "checkpoints")[-1] / "manifest.sha256").write_text("0" * 64)
    damaged = called()
    assert (damaged.returncode, damaged.stdout.splitlines()[-1]) == (1, "differs")
