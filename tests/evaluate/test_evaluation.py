"""`eval` as a user calls it: output, what is kept of a killed one, and mistakes before weights are read."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_sep.cli import app
from megatron_sep.evaluate import evaluation, perplexities
from megatron_sep.evaluate.evaluation import Asked, Under, evaluate
from megatron_sep.evaluate.needle import Haystack
from megatron_sep.evaluate.texts import EvaluationError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The cat sat, as cats do; the dog barked! Is this it? Yes: it is.\n" * 20)
    return file


def test_the_verb_prints_and_writes(model_dir: Path, text: Path, pattern_file: Path, tmp_path: Path) -> None:
    """Tables on the console; versions, dtype, pattern, loss and retention in the JSON; a second call reads it."""
    out = tmp_path / "out.json"
    words = ["eval", str(model_dir), "--text", str(text), "--length", "32", "--needle", str(text), "--out", str(out)]
    words += ["--needle-lengths", "90,120", "--needle-depths", "0,1", "--needle-samples", "1"]
    words += ["--attention", str(pattern_file)]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert "layers 0 to 1: AttentionPattern(window=4, sinks=1" in first.output
    for title in ("texts", "needle, choice", "needle, exact"):
        assert title in first.output
    found = json.loads(out.read_text())
    assert found["dtype"] == "float32"
    assert {"megatron_sep", "torch", "transformers"} <= set(found["versions"])
    assert 0 < found["texts"][str(text)]["retention"] < 0.7
    assert len(found["needle"]) == 4
    assert not out.with_name("out.json.parts").exists()
    second = CliRunner().invoke(app, words)
    assert second.stdout == first.stdout
    assert not out.with_name("out.json.parts").exists()
    other = CliRunner().invoke(app, [*words, "--stride", "8"])
    assert other.exit_code == 2
    assert "out.json: was asked with stride None; name another file" in other.output


def test_a_stream_is_recorded_on_its_way(model_dir: Path, text: Path, pattern_file: Path) -> None:
    """Loss every so many tokens, the same total as of the tokens one by one."""
    asked = [Asked((text,), tokens=200, chunk=chunk, every=50) for chunk in (1, 25)]
    one, other = (evaluate(model_dir, each, Under(pattern_file))["texts"][str(text)] for each in asked)
    assert [each["tokens"] for each in one["recorded"]] == [51, 101, 151, 200]
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert one["retention"] == pytest.approx(other["retention"])


def test_a_killed_evaluation_goes_on(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are done are not measured again, the result is that of one that was not killed; others are refused."""
    monkeypatch.setattr(perplexities, "_PASSES", 2)
    out, asked = tmp_path / "out.json", Asked((text,), length=32, needle=text, haystack=Haystack((90,), (0.0, 1.0)))
    whole = evaluate(model_dir, asked, Under())
    real, measured = perplexities._slid, []

    def dies(*given: Any) -> Any:
        measured.append(given[4])
        if len(measured) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(perplexities, "_slid", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_dir, asked, Under(), out)
    assert not out.exists()
    with pytest.raises(EvaluationError, match=r"was asked with .*length 32"):
        evaluate(model_dir, Asked((text,), length=16), Under(), out)
    assert evaluate(model_dir, asked, Under(), out) == whole
    assert measured == [0, 2, 4, 6, *range(6, measured[-1] + 1, 2)]
    assert json.loads(out.read_text())["texts"] == whole["texts"]


def test_mistakes_cost_no_weights(model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asked, a text too short, strides and chunks that do not go, hay that is too short, a foreign output."""
    monkeypatch.setattr(evaluation, "open_session", None)  # calling it would be a TypeError
    foreign = tmp_path / "foreign.json"
    foreign.write_text("[1]")
    wrong = [
        (Asked(), None, "pass --text FILE, --tasks NAME or --needle FILE"),
        (Asked((text,), tokens=10**6), None, "1,000,000 are asked for"),
        (Asked((text,), length=8, stride=8), None, "--stride 8: must be from 1 to 7"),
        (Asked((text,), chunk=3, every=10), None, "--every 10: must be a multiple of --chunk 3"),
        (Asked(needle=text, haystack=Haystack((50000,), (0.0,))), None, "length 50000: needs"),
        (Asked((text,)), foreign, "is no result of `eval`"),
    ]
    for asked, out, message in wrong:
        with pytest.raises(EvaluationError, match=message):
            evaluate(model_dir, asked, Under(), out)
