"""GPTNeoX and Llama of transformers with settings beyond the published ones: the same logits here, and back again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config.schema import ModelConfig
from megatron_sep.convert.as_transformers import fill
from megatron_sep.model.build import build_model
from megatron_sep.model.load_weights import load_weights
from megatron_sep.parallel.groups import topology
from megatron_sep.weights.hugging_face import HuggingFaceError, make_config, read_config
from megatron_sep.weights.open_source import SourceError, open_source

pytestmark = pytest.mark.usefixtures("single_process")

SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 80}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
AWKWARD: dict[str, Any] = {
    "neox, gelu_fast (the published 20B)": GPTNeoXConfig(**SHAPE, hidden_act="gelu_fast", rotary_pct=0.25),
    "neox, gelu_new": GPTNeoXConfig(**SHAPE, hidden_act="gelu_new"),
    "neox, relu": GPTNeoXConfig(**SHAPE, hidden_act="relu", use_parallel_residual=False),
    "neox, no biases in attention": GPTNeoXConfig(**SHAPE, attention_bias=False),
    "neox, linear": GPTNeoXConfig(**SHAPE, rope_parameters=LINEAR | {"partial_rotary_factor": 0.5}),
    "neox, yarn": GPTNeoXConfig(**SHAPE, rope_parameters=YARN | {"partial_rotary_factor": 0.5}),
    "llama, biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, num_key_value_heads=2),
    "llama, biases in attention": LlamaConfig(**SHAPE, attention_bias=True),
    "llama, heads of their own size": LlamaConfig(**SHAPE, head_dim=24, num_key_value_heads=1),
    "llama, linear": LlamaConfig(**SHAPE, rope_parameters=LINEAR),
    "llama, yarn": LlamaConfig(**SHAPE, rope_parameters=YARN | {"beta_fast": 4, "truncate": False}),
    "llama, yarn, its own growth": LlamaConfig(**SHAPE, head_dim=24, rope_parameters=YARN | {"attention_factor": 1.3}),
    "llama, yarn, two growths": LlamaConfig(**SHAPE, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}),
}


@pytest.mark.parametrize("name", AWKWARD)
@torch.no_grad()
def test_logits_are_those_of_transformers_both_ways(name: str, tmp_path: Path) -> None:
    """From its directory into our model, and from our settings into its class again: 1e-5 in fp32."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AWKWARD[name], attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits

    source = open_source(tmp_path)
    ours = build_model(source.config, topology(), vocab_size=64, precision="fp32", seed=0).eval()
    load_weights(ours, source, source.config, topology())
    plans = (AttentionPattern().plan(ids),) * 2
    torch.testing.assert_close(ours(ids, torch.arange(40)[None], plans), expected, atol=1e-5, rtol=1e-5)

    sep = {"window": None, "sinks": 0, "separator_ids": [], "stride": None, "full_layers": [], "document_end": None}
    settings = make_config(source.config, 64, sep, "float32", None)
    again = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{k: v for k, v in settings.items() if k != "auto_map"}), attn_implementation="eager"
    )
    fill(again, source)
    torch.testing.assert_close(again.eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_config(tmp_path)[0].model_dump(exclude={"rotary_scaling"}) == source.config.model_dump(
        exclude={"rotary_scaling"}
    )


def test_what_a_configuration_leaves_to_others_agrees_with_what_weights_spell_out(tmp_path: Path) -> None:
    """A head size or biases of the MLP that are said by one and follow for the other are no difference."""
    AutoModelForCausalLM.from_config(GPTNeoXConfig(**SHAPE)).save_pretrained(tmp_path)
    asked = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=80, vocab_size=64)
    spelled = asked.model_copy(update={"head_dim": 16, "mlp_biases": True, "num_key_value_heads": 4})
    for config in (asked, spelled):
        assert open_source(tmp_path, config).config.spelled_out() == asked.spelled_out()
    with pytest.raises(SourceError, match="mlp_biases is True there and False here"):
        open_source(tmp_path, asked.model_copy(update={"mlp_biases": False}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act='mish': known are gelu, gelu_new"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type='dynamic': known are"),
    ],
)
def test_what_the_engine_does_not_have_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """By name, before a weight is read."""
    (tmp_path / "config.json").write_text(json.dumps(GPTNeoXConfig(**SHAPE).to_dict() | settings))
    with pytest.raises(HuggingFaceError, match=message):
        read_config(tmp_path)
