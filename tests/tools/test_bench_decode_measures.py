"""What the measures of a decode step do to a model: nothing that its logits or its memory would tell."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sep.generate.attach import attach
from megatron_sep.generate.decode import OPTIONS, Decoder, compile_layers
from megatron_sep.kernels.sep_decode import triton as kernel

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program, its measures taken back afterwards."""
    monkeypatch.syspath_prepend(TOOLS)
    import bench_decode_measures

    yield bench_decode_measures
    bench_decode_measures.without_measures(torch.nn.Module())
    sys.modules.pop("bench_decode_measures")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["SEP", "STREAM"])
def test_the_measures_leave_the_logits_and_the_weights(tool: Any, name: str) -> None:
    """Merged products, apart, and merged again, as the tool compiles them."""
    model, ids = llama(), torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    attached, apply = attach(model, getattr(tool, name)), tool.measures(None)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    runs, merged = [], []
    for row in ("as-is", "apart", "as-is"):
        tool.without_measures(model)
        decoder = Decoder(model, attached.new_cache(), graph=False)
        decoder.read(ids)
        apply[row]()
        torch.compiler.reset()
        compile_layers(model, "eager", **tool.ASKED)
        merged.append(type(model.model.layers[0].self_attn.k_proj) is not torch.nn.Linear)
        runs.append(torch.stack([decoder.step(ids[:, t : t + 1]) for t in range(3)]))
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-5, atol=1e-5)
    assert merged == [True, False, True]
    assert all(torch.equal(model.state_dict()[key], weight) for key, weight in before.items())


def test_measures_of_the_launch_add_up_and_are_taken_back(tool: Any) -> None:
    """Each changes what it names in the launch that the shapes choose, or in what Inductor is told."""
    shape = (8, 4, 4096, 128, 2, False, 132)
    chosen, options = kernel.choose_launch(*shape), dict(OPTIONS)
    apply = tool.measures([32, 12, 4, 2])
    for name in ("combined", "launch", "independent", "apart", "combo"):
        apply[name]()
    assert kernel.choose_launch(*shape) == kernel.Launch(32, 12, 4, 2, last_combines=True)
    assert tool.ASKED == {"dependent": False, "merged": False}
    assert options | {"combo_kernels": True} == OPTIONS
    assert "combo_kernels" in torch._inductor.list_options()
    tool.without_measures(torch.nn.Module())
    assert kernel.choose_launch(*shape) == chosen
    assert tool.ASKED == {"dependent": None, "merged": True}
    assert options == OPTIONS
