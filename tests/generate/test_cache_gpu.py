"""On a GPU: fused prefill and decode equal the plain ones, and a CUDA graph equals the steps it replays."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.attach import attach
from megatron_sep.generate.decode import Decoder, compile_layers
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.sep_decode import triton as kernel
from megatron_sep.kernels.why_not import dependent_launches

pytestmark = pytest.mark.gpu

SEPARATORS = tuple(range(8))
POLICIES = {
    "full": AttentionPattern(),
    "sep": AttentionPattern(window=40, sinks=3, separator_ids=SEPARATORS),
    "hybrid": [AttentionPattern(), AttentionPattern(window=40, sinks=3, separator_ids=SEPARATORS)],
    "cache": StreamingPattern(3, 16, 30, 90, SEPARATORS),
    "text": StreamingPattern(3, 16, 30, 90, SEPARATORS, "text"),
    "frozen": StreamingPattern(3, 16, 30, 90, SEPARATORS, "frozen"),
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            intermediate_size=256,
            rope_parameters=rope,
        )
    ).eval()


def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=64, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256)
    ).eval()


@pytest.mark.parametrize("make", [llama, neox])
@pytest.mark.parametrize("name", POLICIES)
def test_gpu_equals_cpu(make, name: str) -> None:
    """A ragged batch in chunks and steps, float32 on the GPU against float64 on the CPU."""
    torch.set_num_threads(1)  # other tests run beside this one
    ids = torch.randint(0, 64, (3, 400), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :57], mask[2, :130] = 0, 0
    found = {}
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = make().to(device, dtype)
        attached = attach(model, POLICIES[name])
        cache = attached.new_cache()
        logits = []
        with torch.no_grad():
            for begin, end in [(0, 150), (150, 300), *((t, t + 1) for t in range(300, 400))]:
                part = model(
                    ids[:, begin:end].to(device),
                    attention_mask=mask[:, :end].to(device) if begin < 300 else None,
                    past_key_values=cache,
                ).logits
                logits.append(part.double().cpu())
        found[device] = torch.cat(logits, 1)[mask.bool()], cache.retention().live
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=0, atol=2e-4)
    assert found["cuda"][1] == pytest.approx(found["cpu"][1], rel=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_graph_equals_steps(name: str) -> None:
    """600 steps through evictions and growing stores: the tokens, lengths and logits of steps without a graph."""
    model = llama().to("cuda", torch.bfloat16)
    attached = attach(model, POLICIES[name])
    decoders = [Decoder(model, attached.new_cache(), graph) for graph in (False, True)]
    ids = torch.randint(0, 64, (4, 700), generator=torch.Generator().manual_seed(1)).cuda()
    for decoder in decoders:
        decoder.read(ids[:, :100])
    for t in range(100, 700):
        eager, replayed = (decoder.step(ids[:, t : t + 1]).clone() for decoder in decoders)
        assert torch.equal(eager, replayed), t
    eager, replayed = (decoder.cache for decoder in decoders)
    assert eager.retention() == replayed.retention()
    assert eager.columns == replayed.columns == 700


@pytest.mark.parametrize("name", ["sep", "cache"])
@pytest.mark.parametrize("dependent", [False, True])
def test_a_graph_whose_last_shares_combine_equals_steps(
    name: str, dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed 200 times: the logits of steps without a graph, bit for bit; also where kernels overlap."""
    if dependent and (reason := dependent_launches(Call.on(torch.device("cuda"), torch.bfloat16))):
        pytest.skip(reason)
    model = llama().to("cuda", torch.bfloat16)
    attached = attach(model, POLICIES[name])
    ids = torch.randint(0, 64, (2, 400), generator=torch.Generator().manual_seed(1)).cuda()
    launch = kernel.Launch(16, 5, last_combines=True)
    monkeypatch.setattr(kernel, "choose_launch", lambda *_: launch)
    runs = []
    for graph in (False, True):
        decoder = Decoder(model, attached.new_cache(), graph, dependent)
        decoder.read(ids[:, :200])
        runs.append(torch.stack([decoder.step(ids[:, t : t + 1]).clone() for t in range(200, 400)]))
    assert torch.equal(*runs)


def test_compiled_layers_change_nothing_but_rounding() -> None:
    """The fused parts between the attentions, bf16."""
    model = llama().to("cuda", torch.bfloat16)
    attached = attach(model, POLICIES["cache"])
    ids = torch.randint(0, 64, (4, 200), generator=torch.Generator().manual_seed(1)).cuda()
    runs = []
    for compiled in (False, True):
        if compiled:
            compile_layers(model)
        decoder = Decoder(model, attached.new_cache())
        decoder.read(ids[:, :100])
        runs.append(torch.stack([decoder.step(ids[:, t : t + 1]).float() for t in range(100, 200)]))
    torch.testing.assert_close(*runs, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefill_is_the_mask(dtype: torch.dtype) -> None:
    """A long prompt through the fused kernel against transformers' own attention under the dense mask."""
    pattern = POLICIES["sep"]
    assert isinstance(pattern, AttentionPattern)
    model = llama().to("cuda", dtype)
    ids = torch.randint(0, 64, (2, 2048), generator=torch.Generator().manual_seed(1)).cuda()
    seen = pattern.plan(ids).dense()[:, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)).logits
        attach(model, pattern)
        found = model(ids).logits
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.05)
