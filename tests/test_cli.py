"""The verbs as a user calls them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sep.config import RunConfig, load_config, to_yaml


def call(*words: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_sep", *words], capture_output=True, text=True, timeout=120, **more
    )


def test_importing_the_package_is_light() -> None:
    """`import megatron_sep` and its configuration load no torch; the package itself takes under 0.3 s."""
    program = (
        "import sys, time; start = time.perf_counter(); import megatron_sep; took = time.perf_counter() - start;"
        "import megatron_sep.config, megatron_sep.cli; print(took, 'torch' in sys.modules)"
    )
    took, torch = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert float(took) < 0.3
    assert torch == "False"


def test_show_prints_config_parameters_and_patterns(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The YAML that `show` prints is the resolved configuration; below it the size and what each layer sees."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny()))
    shown = call("show", str(path), "attention.window=5")
    assert shown.returncode == 0, shown.stderr
    assert "parameters" in shown.stdout
    assert "# layer 0: every earlier token" in shown.stdout
    assert "# layer 1: the last 5 tokens, the first 2, every separator (ids " in shown.stdout
    again = tmp_path / "again.yaml"
    again.write_text(shown.stdout)
    assert load_config(again) == load_config(path, ["attention.window=5"])


def test_a_users_mistake_is_a_message_and_not_a_traceback(tmp_path: Path) -> None:
    """Exit code 2, the mistake and the way out, within two seconds and without loading torch."""
    path = tmp_path / "run.yaml"
    path.write_text("dir: x\ntokenizer: {path: t}\ndata: {path: d}\nmodel: {num_layer: 2}\n")
    failed = call("train", str(path))
    assert failed.returncode == 2
    assert "did you mean model.num_layers?" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_train_generate_and_plot(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A run from the command line leaves a checkpoint that generates the same text twice, and a picture."""
    path = tmp_path / "run.yaml"
    config = tiny()
    path.write_text(to_yaml(config))
    trained = call("train", str(path))
    assert trained.returncode == 0, trained.stderr
    assert "step 8/8  validation loss" in trained.stdout
    texts = [call("generate", str(config.dir), "--prompt", "alpha is", "--max-tokens", "6") for _ in range(2)]
    assert texts[0].returncode == 0, texts[0].stderr
    assert texts[0].stdout.startswith("alpha is")
    assert len(texts[0].stdout) > len("alpha is\n")
    assert texts[0].stdout == texts[1].stdout
    picture = tmp_path / "loss.png"
    assert call("plot", str(config.dir), "--out", str(picture)).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert call("mask", str(path), "--out", str(picture.with_name("mask.png"))).returncode == 0
    assert picture.with_name("mask.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "verb", ["train", "show", "prepare", "batch", "pile", "convert", "separators", "generate", "plot", "mask"]
)
def test_every_verb_explains_itself(verb: str) -> None:
    """--help works for each verb and says what it does."""
    shown = call(verb, "--help")
    assert shown.returncode == 0
    assert "Usage" in shown.stdout
