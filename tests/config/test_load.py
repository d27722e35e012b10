"""A configuration is valid and whole, or one error names every mistake."""

from pathlib import Path

import pytest
import yaml

from megatron_sep.config import ConfigError, RunConfig, load_config, to_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
REPRODUCE = sorted(path for path in (CONFIGS / "reproduce").glob("*.yaml") if path.stem not in ("base", "prepare"))
SHIPPED = sorted((CONFIGS / "runs").glob("*.yaml")) + REPRODUCE
PARTS = sorted(path for kind in ("models", "attention", "data") for path in (CONFIGS / kind).glob("*.yaml"))
NEEDED = {"dir": "runs/x", "tokenizer": {"path": "t.json"}, "data": {"path": "corpus"}}


def write(path: Path, tree: object) -> Path:
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_run_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    """to_yaml is a complete configuration: reading it back gives the same one."""
    config = load_config(path)
    assert load_config(write(tmp_path / "again.yaml", to_yaml(config))) == config


@pytest.mark.parametrize("path", PARTS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_part_loads(path: Path, tmp_path: Path) -> None:
    """A model, attention or data file makes a valid run with the keys that every run needs, and changes something."""
    bare = load_config(write(tmp_path / "bare.yaml", NEEDED))
    assert load_config(write(tmp_path / "run.yaml", NEEDED | {"extends": str(path)})) != bare or path.stem == "full"


def test_runs_are_short() -> None:
    """A run adds at most six lines to what it extends."""
    for path in SHIPPED:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "extends"))]
        assert len(lines) <= 6, path


def test_the_fine_tuning_of_table_14_loads() -> None:
    """SepLLM n=256 from published weights for 500 steps."""
    run = load_config(CONFIGS / "reproduce" / "8b" / "longalpaca-n256.yaml")
    assert (run.attention.window, run.attention.sinks, run.attention.separators) == (256, 3, "default")
    assert (run.train.steps, run.checkpoint.init_step) == (500, 0)
    assert run.checkpoint.init_from is not None


def test_the_runs_of_the_reproduction_learn_from_the_same_tokens() -> None:
    """From scratch they differ in attention or seed alone; after post-training they end where the others do."""
    runs = {path.stem: load_config(path) for path in REPRODUCE}
    assert len(runs) == 17
    for name, run in runs.items():
        assert run.dir == Path("runs/reproduce") / name
        assert (run.model, run.data, run.tokenizer) == (runs["vanilla"].model, runs["vanilla"].data, run.tokenizer)
        assert run.optimizer.decay_steps in (None, run.train.steps, runs["vanilla"].train.steps)
        if not name.startswith("posttrain"):
            seed = 2 if name.endswith("seed2") else runs["vanilla"].train.seed
            assert run.train == runs["vanilla"].train.model_copy(update={"seed": seed})
            assert run.optimizer == runs["vanilla"].optimizer
            assert run.train.steps * run.train.global_batch_size * run.model.sequence_length > 120e6
    vanilla, switched = runs["vanilla"], runs["posttrain-n64"].checkpoint
    assert switched.init_step % vanilla.checkpoint.every == 0
    assert switched.init_from == vanilla.dir / "checkpoints" / f"step-{switched.init_step:08d}"
    assert switched.init_step / vanilla.train.steps == pytest.approx(93_000 / 143_000, abs=0.003)
    anew = runs["posttrain-n64-larger-lr"]
    assert anew.train.steps == vanilla.train.steps - switched.init_step


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("14m", (6, 128, 4, 50304)),
        ("70m", (6, 512, 8, 50304)),
        ("160m", (12, 768, 12, 50304)),
        ("410m", (24, 1024, 16, 50304)),
        ("1b", (16, 2048, 8, 50304)),
        ("1.4b", (24, 2048, 16, 50304)),
        ("2.8b", (32, 2560, 32, 50304)),
        ("6.9b", (32, 4096, 32, 50432)),
        ("12b", (36, 5120, 40, 50688)),
    ],
)
def test_pythia_files_have_the_published_shapes(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Layers, width, heads and rows of the embedding of the published checkpoints."""
    run = write(tmp_path / "run.yaml", NEEDED | {"extends": str(CONFIGS / "models" / f"pythia-{name}.yaml")})
    model = load_config(run).model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.vocab_size) == shape


def test_the_papers_runs_have_its_schedule() -> None:
    """160m from scratch: 143,000 steps of 1024 x 2048, 6e-4 to 6e-5; 1.4b goes on at 93,000, or anew for as long."""
    scratch = load_config(CONFIGS / "runs" / "pythia-160m-sep-n64.yaml")
    assert (scratch.train.steps, scratch.train.global_batch_size, scratch.model.sequence_length) == (
        143_000,
        1024,
        2048,
    )
    assert (scratch.optimizer.lr, scratch.optimizer.min_lr, scratch.optimizer.warmup) == (6e-4, 6e-5, 0.01)
    continued = load_config(CONFIGS / "runs" / "pythia-1.4b-posttrain-n64.yaml")
    anew = load_config(CONFIGS / "runs" / "pythia-1.4b-posttrain-n64-larger-lr.yaml")
    assert (continued.checkpoint.init_step, continued.train.steps) == (93_000, 143_000)
    assert (anew.checkpoint.init_step, anew.train.steps) == (0, 50_000)
    assert anew.checkpoint.init_from == continued.checkpoint.init_from


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


@pytest.mark.parametrize("word", ["on", "off"])
def test_on_and_off_are_read_as_the_words_they_are(tmp_path: Path, word: str) -> None:
    """YAML takes them for true and false, in a file and behind its name."""
    run = write(tmp_path / "run.yaml", f"dir: x\ntokenizer: {{path: t}}\ndata: {{path: c}}\ntrain: {{compile: {word}}}")
    config = load_config(run, [f"train.cuda_graphs={word}", "metrics.wandb=off"])
    assert (config.train.compile, config.train.cuda_graphs, config.metrics.wandb) == (word, word, "off")


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
        (
            {"parallel": {"tensor": 2, "sequence_parallel": True}, "train": {"loss_chunk": 64}},
            "train.loss_chunk=64 would gather the sequence anew for each chunk",
        ),
        ({"train": {"operations": {"sep_attention": "flex"}}}, "sep_attention=flex: set attention.backend to it"),
        ({"parallel": {"tensor": 5}}, "does not divide by parallel.tensor=5"),
        ({"parallel": {"pipeline": 2, "virtual_pipeline": 4}}, "pipeline x parallel.virtual_pipeline=8"),
        ({"parallel": {"virtual_pipeline": 2}}, "virtual_pipeline=2 needs pipeline > 1"),
        ({"parallel": {"context": 3}}, "sequence_length=2048 does not divide by 2 x parallel.context=6"),
        ({"model": {"vocab_size": 301}, "parallel": {"tensor": 2}}, "vocab_size=301 does not divide"),
        ({"attention": {"window": 0}}, "attention.window=0"),
        ({"attention": {"window": 8, "anneal": {"start": 4, "steps": 9}}}, "anneal.start=4 must be a window of at lea"),
        ({"attention": {"anneal": {"start": 4, "steps": 9}}}, "anneal.start=4 must be"),
        ({"checkpoint": {"init_step": 3}}, "init_step=3 needs init_from"),
        ({"checkpoint": {"init_from": "x", "init_step": 9}, "train": {"steps": 9}}, "leaves nothing of train.steps=9"),
        ({"model": {"num_key_value_heads": 5}}, "is no multiple of num_key_value_heads=5"),
        ({"model": {"num_key_value_heads": 3}, "parallel": {"tensor": 2}}, "num_key_value_heads=3 does not divide"),
    ],
)
def test_contradictions_are_named(section: dict[str, object], message: str, tmp_path: Path) -> None:
    """A value that contradicts another one stops the run with both names."""
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load_config(write(tmp_path / "c.yaml", NEEDED | section))


@pytest.mark.parametrize(
    "separators",
    ["default", [".", ","], {"texts": "default", "merged": True}, {"texts": [".", "?"]}, "llama-3-streaming"],
)
def test_every_kind_of_separators_survives_a_round_trip(separators: object, tmp_path: Path) -> None:
    """A name, texts, or texts with what is merged; the YAML reads back as it was."""
    config = load_config(write(tmp_path / "run.yaml", NEEDED | {"attention": {"separators": separators}}))
    assert load_config(write(tmp_path / "again.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    ("separators", "message"),
    [
        ("defualt", "attention.separators='defualt': Input should be 'default', 'llama-3-training-free', 'llama-3-"),
        ([5], "attention.separators.0=5: Input should be a valid string"),
        (5, "attention.separators=5: Input should be a valid array"),
        ({"merged": True}, "attention.separators.texts: is needed"),
        ({"texts": "all"}, "attention.separators.texts='all': Input should be 'default'"),
        ({"texts": [], "merge": True}, "attention.separators.merge: no such key; did you mean attention.separators.me"),
    ],
)
def test_a_mistake_of_separators_is_one_line(separators: object, message: str, tmp_path: Path) -> None:
    """It is of the kind of value that was meant, and names no other kind."""
    with pytest.raises(ConfigError, match=rf"1 mistake\(s\)\n  {message}"):
        load_config(write(tmp_path / "run.yaml", NEEDED | {"attention": {"separators": separators}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layers: 2}\nmodel: {num_layers: 3}", "key stands twice: model"),
        ("dir: !!python/object/apply:os.system ['touch canary']", "is no valid YAML"),
        ("- a\n- b", "holds a list"),
        ("model: {num_layers: [", "is no valid YAML"),
        ("extends: me.yaml", "extends itself"),
        ("extends: missing.yaml", "cannot be read"),
        ("extends: 5", "extends=5: is a file, or a list of files"),
        ("extends: [a.yaml, {b: c}]", "is a file, or a list of files"),
        ("dir: &itself [*itself]", "is no configuration: Circular reference"),
        ("2026-01-01: 5", "is no configuration: keys must be str"),
        ("a: !!int b", "holds a value that cannot be"),
        ("a: !!map b", "is no valid YAML"),
        (f"a: 1{':1' * 300_000}", "a number of 600,001 characters; 400 are the most"),
        ("extends: /dev/zero", "a configuration has 1,048,576 at most"),
        ('extends: "a\\0b"', "is a file, or a list of files"),
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
