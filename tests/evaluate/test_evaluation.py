"""`eval` as a user calls it: output, what is kept of a killed one, and mistakes before weights are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_sep.cli import app
from megatron_sep.config import RunConfig
from megatron_sep.evaluate import evaluation, perplexities
from megatron_sep.evaluate.evaluation import Asked, Under, evaluate
from megatron_sep.evaluate.needle import Haystack
from megatron_sep.evaluate.texts import EvaluationError
from megatron_sep.files import read_json, write_json
from megatron_sep.parallel.groups import topology


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


def other_weights(model_dir: Path) -> None:
    """The same model with a weight that is not the same: no name, no shape and no size changes."""
    from safetensors.torch import load_file, save_file

    file = model_dir / "model.safetensors"
    weights = load_file(file)
    weights["embed_out.weight"].neg_()
    size = file.stat().st_size
    save_file(weights, file, {"format": "pt"})
    assert file.stat().st_size == size


def test_a_result_of_other_weights_is_no_answer(model_dir: Path, text: Path, tmp_path: Path) -> None:
    """Weights that changed in place are named with the way out, and measured once the old result is gone."""
    model, out, asked = tmp_path / "model", tmp_path / "out.json", Asked((text,), length=32)
    shutil.copytree(model_dir, model)
    before = evaluate(model, asked, Under(), out)
    other_weights(model)
    with pytest.raises(
        EvaluationError, match=rf"with other weights, \w{{12}}, than now lie in {model}.* remove {out} "
    ):
        evaluate(model, asked, Under(), out)
    with pytest.raises(EvaluationError, match=r"was asked with length 32; name another file"):
        evaluate(model, Asked((text,), length=16), Under(), out)
    out.unlink()
    assert evaluate(model, asked, Under(), out)["texts"][str(text)]["loss"] != before["texts"][str(text)]["loss"]


def test_parts_of_other_weights_are_not_gone_on_from(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that was killed before the weights changed: nothing of it comes into the new one."""
    model, out = tmp_path / "model", tmp_path / "out.json"
    asked = Asked((text,), length=32, needle=text, haystack=Haystack((90,), (0.0,), samples=1))
    shutil.copytree(model_dir, model)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "cell", None)  # calling it is a TypeError, when the windows are done
        with pytest.raises(TypeError):
            evaluate(model, asked, Under(), out)
    other_weights(model)
    with pytest.raises(EvaluationError, match=rf"other weights.* remove {out}.parts to measure anew"):
        evaluate(model, asked, Under(), out)
    shutil.rmtree(f"{out}.parts")
    found = evaluate(model, asked, Under(), out)
    assert found == evaluate(model, asked, Under())


def test_a_result_that_names_no_weights_is_no_answer(model_dir: Path, text: Path, tmp_path: Path) -> None:
    """What an older version kept, complete or in parts, may be of other weights: it says so, and nothing is lost."""
    out, asked = tmp_path / "out.json", Asked((text,), length=32)
    evaluate(model_dir, asked, Under(), out)
    kept = read_json(out)
    del kept["question"]["weights"]
    for file, way_out in ((out, out), (tmp_path / "out.json.parts" / "question.json", f"{out}.parts")):
        write_json(file, kept)
        with pytest.raises(EvaluationError, match=rf"does not say which weights .*{model_dir}.* remove {way_out} to"):
            evaluate(model_dir, asked, Under(), out)
        assert read_json(file) == kept
        file.unlink()


@pytest.mark.usefixtures("single_process")
def test_a_run_that_was_trained_anew_is_measured_anew(
    tiny: Callable[..., RunConfig], text: Path, tmp_path: Path
) -> None:
    """The same dir and the same step, other weights: the result of the first is refused for the second."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    out, asked = tmp_path / "out.json", Asked((text,), tokens=100, length=32)
    for seed in (1, 2):
        config = tiny(train={"steps": 1, "eval_every": 0, "seed": seed}, optimizer={"warmup": 0})
        train(build_run(config, topology()))
        if seed == 1:
            found = evaluate(config.dir, asked, Under(), out)
            assert evaluate(config.dir, asked, Under(), out)["texts"] == found["texts"]
            shutil.rmtree(config.dir)
    with pytest.raises(EvaluationError, match=r"with other weights, \w{12}, than now lie in .*run/checkpoints/step-0"):
        evaluate(config.dir, asked, Under(), out)


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
