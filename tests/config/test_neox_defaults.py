"""What a GPT-NeoX or SepLLM file leaves out has its own program's default, never this project's."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sep.config import ConfigError, RunConfig, load_config, sketch_config
from megatron_sep.config.load import neox_notes
from megatron_sep.config.neox_attention import NAMED_SEPARATORS
from megatron_sep.config.neox_rules import NEEDED
from megatron_sep.config.neox_table import GPT_NEOX, SEPLLM

BARE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 128,
    "pos_emb": "rotary",
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 50,
    "data_path": "corpus",
    "vocab_file": "tokenizer.json",
    "fp16": {"enabled": True},
}
"""What GPT-NeoX has no default for, positions that this project has, and half precision."""


def write(folder: Path, values: dict[str, Any], name: str = "bare.yml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(values))
    return path


def load(folder: Path, values: dict[str, Any]) -> RunConfig:
    return load_config(write(folder, values))


def test_a_key_that_is_left_out_means_what_gpt_neox_means(tmp_path: Path) -> None:
    """The defaults of GPT-NeoX's arguments, of its Adam and of DeepSpeed's loss scale; ours are Pythia-160m's."""
    config = load(tmp_path, BARE)
    model, optimizer, train = config.model, config.optimizer, config.train
    assert (model.rotary_fraction, model.rotary_base, model.parallel_residual) == (1.0, 10_000, False)
    assert (model.tie_embeddings, model.norm, model.activation, model.norm_eps) == (True, "layernorm", "gelu", 1e-5)
    assert (model.init, model.output_init, model.init_std) == ("normal", "scaled_normal", 0.02)
    assert (model.hidden_dropout, model.attention_dropout, model.vocab_multiple) == (0, 0, 128)
    assert (optimizer.lr, optimizer.min_lr, optimizer.betas, optimizer.eps) == (1e-3, 0, (0.9, 0.999), 1e-8)
    assert (optimizer.decay, optimizer.warmup) == ("linear_to_zero", 0.01)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1)
    assert (train.loss_scale.initial, train.loss_scale.growth_interval, train.loss_scale.hysteresis) == (2**16, 1000, 2)
    assert (train.eval_every, train.eval_batches, train.seed, train.recompute) == (1000, 100, 1234, False)
    assert config.data.split == (0.969, 0.03, 0.001)
    assert config.metrics.every == 100


def test_writing_the_defaults_down_changes_nothing(tmp_path: Path) -> None:
    """A file with every default of the table in it is the same run as the one that leaves them all out."""
    defaults = {k: rule.default for k, rule in GPT_NEOX.items() if rule.default not in (None, NEEDED)}
    assert len(defaults) > 30
    assert load(tmp_path, defaults | BARE) == load(tmp_path, BARE)


def test_half_an_optimizer_is_filled_up(tmp_path: Path) -> None:
    """A rate alone leaves Adam's own betas and epsilon, not Pythia's."""
    optimizer = load(tmp_path, BARE | {"optimizer": {"type": "Adam", "params": {"lr": 6e-4}}}).optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (6e-4, (0.9, 0.999), 1e-8)


def test_positions_that_are_left_out_are_learned_ones_and_refused(tmp_path: Path) -> None:
    """The message says that the key is left out, what that means, and what is taken."""
    without = {key: value for key, value in BARE.items() if key != "pos_emb"}
    with pytest.raises(
        ConfigError, match=r"pos_emb is left out, which means 'learned': .* pos_emb='rotary' or 'alibi' is taken"
    ):
        load(tmp_path, without)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("num_layers", "model.num_layers"),
        ("hidden_size", "model.hidden_size"),
        ("num_attention_heads", "model.num_attention_heads"),
        ("seq_length", "model.sequence_length"),
        ("train_iters", "train.steps"),
        ("train_micro_batch_size_per_gpu", "train.micro_batch_size"),
    ],
)
def test_what_gpt_neox_has_no_default_for_is_asked_for(key: str, place: str, tmp_path: Path) -> None:
    """Nothing of this project's takes its place, unless a setting or a file of this project says it."""
    path = write(tmp_path, {name: value for name, value in BARE.items() if name != key})
    with pytest.raises(ConfigError, match=f"{place}: is needed, and {key} is left out; GPT-NeoX has no default"):
        load_config(path)
    load_config(path, [f"{place}={BARE[key]}"])
    assert place in sketch_config(path).missing


def test_a_setup_without_a_model_alone_is_no_pythia(tmp_path: Path) -> None:
    """Data and tokenizer alone are asked for their model; below a file of ours they leave its defaults alone."""
    setup = write(tmp_path, {"data_path": "corpus", "vocab_file": "tokenizer.json"}, "local.yml")
    with pytest.raises(ConfigError, match=r"model.hidden_size: is needed"):
        load_config(setup)
    ours = write(tmp_path, {"model": {"num_layers": 2}}, "ours.yaml")
    config = load_config(setup, [str(ours)])
    assert (config.model.num_layers, config.model.rotary_fraction, config.optimizer.betas) == (2, 0.25, (0.9, 0.95))
    assert (config.train.precision, config.data.order) == ("bf16", "neox")


def test_a_pattern_beside_a_run_of_ours_changes_the_pattern_alone(tmp_path: Path) -> None:
    """A file of SepLLM's keys and nothing else leaves precision, data and schedule as the run has them; alone it has no
    model to show."""
    run = write(tmp_path, {"dir": "x", "tokenizer": {"path": "t"}, "data": {"path": "d"}}, "run.yaml")
    pattern = write(tmp_path, {"streamingLLM": True, "prefill_local_window_size": 64}, "pattern.yml")
    plain, changed = load_config(run), load_config(run, [str(pattern)])
    assert (changed.attention.window, changed.attention.sinks) == (64, 3)
    assert changed.model_copy(update={"attention": plain.attention}) == plain
    assert not sketch_config(run, [str(pattern)]).missing
    assert {"model.hidden_size", "train.steps", "data.path"} <= sketch_config(pattern).missing.keys()


def test_show_lists_what_was_left_out(tmp_path: Path) -> None:
    """A line for each default that was filled in, with its value and where it goes; none for keys that are there."""
    notes = neox_notes(write(tmp_path, BARE | {"optimizer": {"params": {"lr": 6e-4}}}))
    assert "rotary_pct: left out, which means 1.0; becomes model.rotary_fraction" in notes
    assert "optimizer.params.betas: left out, which means [0.9, 0.999]; goes into optimizer" in notes
    assert "fp16.initial_scale_power: left out, which means 16; goes into precision" in notes
    given = {note.split(":")[0] for note in notes if "left out" not in note}
    left_out = {note.split(":")[0] for note in notes if "left out" in note}
    assert given == {*BARE, "optimizer"}
    assert not given & left_out
    assert not any(key in SEPLLM for key in left_out)


@pytest.mark.parametrize(("values", "expected"), [({"gas": 4}, (2, 8)), ({"train_batch_size": 12}, (2, 12))])
def test_two_of_three_batch_sizes_are_enough(
    values: dict[str, int], expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch with or without accumulation, and a global batch beside it."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    train = load(tmp_path, BARE | values).train
    assert (train.micro_batch_size, train.global_batch_size) == expected


def test_a_global_batch_alone_makes_the_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 sequences over 2 ranks in 3 accumulations are 4 a time, as GPT-NeoX counts."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    values = {key: value for key, value in BARE.items() if key != "train_micro_batch_size_per_gpu"}
    train = load(tmp_path, values | {"train_batch_size": 24, "gas": 3}).train
    assert (train.micro_batch_size, train.global_batch_size) == (4, 24)


def test_a_rate_that_gpt_neox_would_not_read_is_refused(tmp_path: Path) -> None:
    """Only that of the optimizer's params counts there: another one beside it would be ignored."""
    with pytest.raises(ConfigError, match=r"lr=0.5: GPT-NeoX takes the rate of optimizer.params.lr alone"):
        load(tmp_path, BARE | {"lr": 0.5})
    params = {"params": {"lr": 0.5}}
    assert load(tmp_path, BARE | {"lr": 0.5, "optimizer": params}).optimizer.lr == 0.5


SINKS, SEPARATORS = 3, (13, 11, 30)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"streamingLLM": True, "prefill_local_window_size": 64}, {"window": 64, "separator_ids": ()}),
        ({"streamingLLM": True}, {"window": 256, "separator_ids": ()}),
        ({"separator_token_ids": [*SEPARATORS]}, {"window": 256, "separator_ids": SEPARATORS}),
        ({"separator_token_ids": [-1], "prefill_local_window_size": 8}, {"window": 8, "separator_ids": ()}),
        ({"USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [5] * 4}, {"window": 256, "stride": 5}),
        ({"prefill_local_window_size": 64, "USE_ORIGINAL_FULL_ATTEN": True}, {"window": None, "sinks": 0}),
    ],
    ids=["streaming", "streaming alone", "separators alone", "no separators", "fixed intervals", "full"],
)
def test_a_pattern_is_filled_up_as_the_official_code_does(
    values: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    """A window of 256, three first tokens, and never full attention in silence."""
    pattern = load(tmp_path, BARE | values).attention
    expected = {"sinks": SINKS, "separators": ()} | expected
    assert {key: getattr(pattern, key) for key in expected} == expected


def test_show_lists_what_a_pattern_leaves_out(tmp_path: Path) -> None:
    """The defaults of the official code, once one of its keys is there."""
    notes = neox_notes(write(tmp_path, BARE | {"streamingLLM": True}))
    assert "prefill_local_window_size: left out, which means 256; goes into attention" in notes
    assert "init_tok_max_idx: left out, which means 2; goes into attention" in notes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"init_tok_max_idx": 3},
            r"separator_token_ids: is needed where SepLLM's attention is asked for; \[-1\] means",
        ),
        ({"USE_FIXED_SEP_INTERVALs": True}, "fixed_sep_intervals_list: is needed where USE_FIXED_SEP_INTERVALs is on"),
        (
            {"streamingLLM": True, "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True},
            "prefill_loc_win_size_list: is needed where USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS is on",
        ),
    ],
)
def test_a_list_that_is_named_and_missing_is_asked_for(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    """By its key, with what asks for it."""
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, BARE | values)


def test_the_authors_list_that_begins_texts_is_taken_with_a_note(tmp_path: Path) -> None:
    """Their Llama-3 files have 128000 where the paper has the tab: a list with a name, and a note of what it does."""
    ids = [13, 11, 30, 0, 26, 25, 198, 220, 128000]
    pattern = load(tmp_path, BARE | {"separator_token_ids": ids}).attention
    assert (pattern.separators, pattern.separator_ids) == ("llama-3-training-free", ())
    notes = "\n".join(neox_notes(tmp_path / "bare.yml"))
    assert "separator_token_ids: 128000 begins a text in Llama-3's tokenizer, where the paper has the tab" in notes


def test_a_list_with_a_name_is_that_list() -> None:
    """The ids that are read as a name are those which the name stands for."""
    from megatron_sep.attention.separator_lists import LISTS

    named = {name: ids for ids, name in NAMED_SEPARATORS.items() if name != "default"}
    assert named == {"llama-3-training-free": frozenset(LISTS["llama-3-training-free"].texts)}


@pytest.mark.parametrize(("name", "layers"), [("6.9b", 32), ("12b", 36)])
def test_the_largest_pythias_start_as_gpt_neox_starts_them(name: str, layers: int, tmp_path: Path) -> None:
    """Their public files leave both initial distributions out: 0.02, and 0.02 / sqrt(2 layers) into the residual."""
    from megatron_sep.model.init import init_std

    run = {"dir": "x", "tokenizer": {"path": "t"}, "data": {"path": "d"}}
    ours = str(Path(__file__).parents[2] / "configs" / "models" / f"pythia-{name}.yaml")
    model = load_config(write(tmp_path, run | {"extends": ours}, "run.yaml")).model
    public = load(tmp_path, BARE | {"num_layers": layers}).model
    assert (model.init, model.output_init) == (public.init, public.output_init)
    assert init_std(model.init, model) == 0.02
    assert init_std(model.output_init, model) == pytest.approx(0.02 / math.sqrt(2 * layers))


def test_bfloat16_is_read_in_each_of_its_spellings(tmp_path: Path) -> None:
    """A section of its own, a type inside fp16, and the name of the precision."""
    for values in ({"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "type": "bfloat16"}}):
        assert load(tmp_path, BARE | values).train.precision == "bf16"
    assert load(tmp_path, BARE | {"precision": "bfloat16", "fp16": {}}).train.precision == "bf16"


def test_a_vocabulary_with_its_merges_is_a_tokenizer(tmp_path: Path) -> None:
    """As GPT-NeoX's local setups name them, its own tokenizer being that of GPT-2; another path lifts it."""
    local = {"vocab_file": "data/gpt2-vocab.json", "merge_file": "data/gpt2-merges.txt"}
    assert str(load(tmp_path, BARE | local).tokenizer.path) == "data/gpt2-vocab.json"
    other = load_config(write(tmp_path, BARE | local), ["tokenizer.path=other.json"])
    assert str(other.tokenizer.path) == "other.json"
