"""Our configuration as GPT-NeoX's keys: read again, it is the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases

from megatron_sep.config import RunConfig, load_config, sketch_config
from megatron_sep.config.load import neox_yaml
from megatron_sep.config.neox import is_neox, translate
from megatron_sep.config.neox_rules import NeoxError
from megatron_sep.config.neox_write import as_neox, spelled_out

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path for path in (CONFIGS / "runs").glob("*.yaml") if "quickstart" not in path.name)
RUNS = [path for path in SHIPPED if "posttrain" not in path.name]
BASE: dict[str, Any] = {
    "dir": "runs/some",
    "tokenizer": {"path": "data/tokenizer.json"},
    "data": {"path": "data/text", "order": "neox"},
}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_comes_back(path: Path, tmp_path: Path) -> None:
    """Written to a file, told as GPT-NeoX's, and loaded: the same, but for what has no key and is said."""
    sketch = sketch_config(path)
    text = neox_yaml(sketch)
    (tmp_path / "back.yml").write_text(text)
    assert is_neox(yaml.safe_load(text), set(RunConfig.model_fields))
    back, unsaid = load_config(tmp_path / "back.yml"), as_neox(sketch.config, {})[1]
    assert unsaid == ["model.vocab_size: 50304"]
    before, after = (spelled_out(config) for config in (sketch.config, back))
    assert after["model"].pop("vocab_size") is None
    del before["model"]["vocab_size"]
    assert after == before


positions = st.sampled_from(
    [
        {},
        {"kind": "alibi"},
        {"kind": "bipe", "length": 64},
        {"kind": "bipe", "segments": "alibi", "separators": (), "separator_ids": (5, 9), "length": 128},
    ]
)
softmaxes = st.sampled_from([None, {}, {"denominator": False}, {"numerator_bias": 0.5, "denominator_bias": 0.25}])
attentions = st.sampled_from(
    [
        {},
        {"window": 8},
        {"window": 8, "full_layers": (0, 3)},
        {"window": 8, "sinks": 4},
        {"window": 8, "sinks": 3, "separators": "default", "full_layers": (0,)},
        {"window": 8, "separators": "llama-3-training-free", "document_boundaries": True},
        {"window": 8, "sinks": 1, "separator_ids": (7, 3)},
        {"window": 8, "sinks": 1, "stride": 5, "full_layers": (3,)},
    ]
)
models = st.fixed_dictionaries(
    {
        "num_layers": st.just(4),
        "hidden_size": st.just(64),
        "num_attention_heads": st.just(4),
        "sequence_length": st.sampled_from([64, 128]),
        "num_key_value_heads": st.sampled_from([None, 2]),
        "ffn_hidden_size": st.sampled_from([None, 96, 172]),
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "activation": st.sampled_from(["gelu", "relu", "swiglu"]),
        "biases": st.booleans(),
        "parallel_residual": st.booleans(),
        "tie_embeddings": st.booleans(),
        "rotary_fraction": st.sampled_from([0.25, 1.0]),
        "init": st.sampled_from(["small_init", "normal"]),
        "position": positions,
        "self_adjusting_softmax": softmaxes,
    }
)
trains = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 10**6),
        "global_batch_size": st.sampled_from([16, 1024]),
        "precision": st.sampled_from(["fp32", "fp16", "bf16"]),
        "seed": st.sampled_from([1234, 7]),
        "recompute": st.booleans(),
        "eval_every": st.sampled_from([0, 100]),
    }
)


@random_cases(2000)
@given(
    model=models, attention=attentions, train=trains, decay=st.sampled_from(["cosine", "linear_to_zero", "constant"])
)
def test_any_run_comes_back(model: Any, attention: Any, train: Any, decay: str) -> None:
    """What is not refused reads as it was, field by field."""
    more = {"model": model, "attention": attention, "train": train, "optimizer": {"decay": decay, "decay_steps": 9}}
    config = RunConfig.model_validate(BASE | more | {"data": BASE["data"] | {"seed": train["seed"]}})
    keys, unsaid = as_neox(config, {})
    assert unsaid == []
    assert spelled_out(RunConfig.model_validate(translate(keys, "some"))) == spelled_out(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": BASE["data"] | {"epoch_margin": 1.5}}, "data.epoch_margin=1.5"),
        ({"data": {"path": "data/text"}}, "data.order='samples'"),
        ({"checkpoint": {"init_from": "start", "init_step": 9}}, "checkpoint.init_step=9"),
        ({"model": {"activation": "gelu_tanh"}}, "activation='gelu_tanh'"),
        ({"model": {"rotary_scaling": {}}}, "model.rotary_scaling.factor=8.0: GPT-NeoX and SepLLM have no key"),
        ({"attention": {"window": 8, "separators": (".", ",")}}, "GPT-NeoX's files have token ids"),
        ({"attention": {"sinks": 3}}, "attention.sinks=3: GPT-NeoX and SepLLM have no key"),
        ({"optimizer": {"decay": "linear"}}, "optimizer.decay=linear"),
        ({"data": BASE["data"] | {"seed": 7}}, "data.seed=7: GPT-NeoX and SepLLM have no key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_key_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """Nothing that is learnt differently goes unsaid."""
    with pytest.raises(NeoxError) as refused:
        as_neox(RunConfig.model_validate(BASE | changes), {})
    assert message in str(refused.value)


def test_a_set_to_train_on_alone_comes_back() -> None:
    """GPT-NeoX's train_data_paths, with its margin of half a percent."""
    alone = {"split": (1.0, 0.0, 0.0), "epoch_margin": 1.005}
    config = RunConfig.model_validate(BASE | {"data": BASE["data"] | alone, "train": {"eval_every": 0}})
    assert spelled_out(RunConfig.model_validate(translate(as_neox(config, {})[0], "some"))) == spelled_out(config)


def test_settings_that_nothing_learnt_depends_on_are_said() -> None:
    """In comments above the keys."""
    config = RunConfig.model_validate(BASE | {"train": {"compile": "off"}, "attention": {"backend": "reference"}})
    assert as_neox(config, {})[1] == ["attention.backend: reference", "train.compile: off"]


def test_tensorboard_comes_back() -> None:
    """As the place of its files, which is the run's dir in any case."""
    config = RunConfig.model_validate(BASE | {"metrics": {"tensorboard": True}})
    keys, unsaid = as_neox(config, {})
    assert RunConfig.model_validate(translate(keys, "some")).metrics.tensorboard
    assert unsaid == []


def test_what_a_model_alone_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    """Neither a batch nor a kind of tokenizer: a setup that lies beside it has its own."""
    (tmp_path / "model.yml").write_text(
        "{num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 64, pos_emb: rotary}"
    )
    keys = yaml.safe_load(neox_yaml(sketch_config(tmp_path / "model.yml")))
    assert keys["num_layers"] == 2
    assert not keys.keys() & {"train_batch_size", "train_micro_batch_size_per_gpu", "vocab_file", "tokenizer_type"}
