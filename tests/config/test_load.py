"""A configuration is valid and whole, or one error names every mistake."""

from pathlib import Path

import pytest
import yaml

from megatron_sep.config import ConfigError, RunConfig, load_config, to_yaml

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "runs").glob("*.yaml"))
NEEDED = {"dir": "runs/x", "tokenizer": {"path": "t.json"}, "data": {"path": "corpus"}}


def write(path: Path, tree: object) -> Path:
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_run_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    """to_yaml is a complete configuration: reading it back gives the same one."""
    config = load_config(path)
    assert load_config(write(tmp_path / "again.yaml", to_yaml(config))) == config


def test_extends_is_below_the_file_and_overrides_are_above(tmp_path: Path) -> None:
    """The last of base, second base, file and override wins, key by key; relative paths start at the file."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.yaml", NEEDED | {"model": {"num_layers": 2, "hidden_size": 64}})
    write(tmp_path / "b.yaml", {"model": {"num_layers": 3}, "attention": {"separators": [".", ","]}})
    run = write(
        tmp_path / "run.yaml",
        {"extends": ["sub/a.yaml", "b.yaml"], "model": {"num_attention_heads": 4}, "attention": {"separators": ["!"]}},
    )
    config = load_config(run, ["model.num_layers=5", "optimizer.lr=1e-4", "optimizer.min_lr=0"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (5, 64, 4)
    assert config.attention.separators == ("!",)
    assert config.optimizer.lr == 1e-4


def test_all_mistakes_come_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    """Unknown, ill-typed, out of bounds and missing keys, and a malformed override, in one error."""
    bad = {
        "dir": "x",
        "tokenizer": {},
        "data": {"path": "corpus"},
        "model": {"num_layer": 4, "hidden_size": "64", "rotary_fraction": 2},
        "train": {"steps": True},
    }
    with pytest.raises(ConfigError) as raised:
        load_config(write(tmp_path / "bad.yaml", bad), ["optimizer.weightdecay=0.1", "nonsense"])
    message = str(raised.value)
    for expected in (
        "7 mistake(s)",
        "model.num_layer: no such key; did you mean model.num_layers?",
        "model.hidden_size='64'",
        "model.rotary_fraction=2",
        "train.steps=True",
        "tokenizer.path: is needed",
        "optimizer.weightdecay: no such key; did you mean optimizer.weight_decay?",
        "'nonsense': an override is written section.key=value",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": {"hidden_size": 100, "num_attention_heads": 3}}, "hidden_size=100 does not divide"),
        ({"model": {"num_layers": 2}, "attention": {"full_layers": [0, 2]}}, "no such layer in a model with 2"),
        ({"train": {"global_batch_size": 10, "micro_batch_size": 4}}, "is no multiple of train.micro_batch_size=4"),
        ({"optimizer": {"lr": 1e-5, "min_lr": 1e-4}}, "min_lr=0.0001 is above lr"),
        ({"data": {"path": "x", "split": [0.5, 0.2, 0.2]}}, "adds up to 0.9"),
        ({"parallel": {"sequence_parallel": True}}, "sequence_parallel=true needs tensor > 1"),
        ({"parallel": {"tensor": 5}}, "does not divide by parallel.tensor=5"),
        ({"attention": {"window": 0}}, "attention.window=0"),
    ],
)
def test_contradictions_are_named(section: dict[str, object], message: str, tmp_path: Path) -> None:
    """A value that contradicts another one stops the run with both names."""
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load_config(write(tmp_path / "c.yaml", NEEDED | section))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layers: 2}\nmodel: {num_layers: 3}", "key stands twice: model"),
        ("dir: !!python/object/apply:os.system ['touch canary']", "is no valid YAML"),
        ("- a\n- b", "holds a list"),
        ("model: {num_layers: [", "is no valid YAML"),
        ("extends: me.yaml", "extends itself"),
        ("extends: missing.yaml", "cannot be read"),
    ],
)
def test_broken_files_are_refused_and_run_no_code(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken YAML, YAML that asks for code, and circles of `extends` are errors that name the file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "me.yaml", text))
    assert not (tmp_path / "canary").exists()


def test_validation_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a configuration creates no file and needs none of the paths it names."""
    path = write(tmp_path / "c.yaml", NEEDED)
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_config(path), RunConfig)
    assert list(tmp_path.iterdir()) == [path]
