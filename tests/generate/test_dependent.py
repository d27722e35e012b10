"""Kernels that start while the one before them still ends: who has them, and that no bit of a text depends on it."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate import decode, slots
from megatron_sep.generate.attach import attach
from megatron_sep.generate.decode import Decoder, compile_layers
from megatron_sep.kernels import why_not
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.operation import BackendError
from megatron_sep.kernels.why_not import dependent_launches

SEPARATORS = tuple(range(8))
POLICIES = {
    "full": AttentionPattern(),
    "sep": AttentionPattern(window=40, sinks=3, separator_ids=SEPARATORS),
    "stream": StreamingPattern(3, 16, 30, 90, SEPARATORS),
}
WAIT, LAUNCH, STORE = "gdc_wait()", "gdc_launch_dependents()", "tl.store("


def llama(layers: int = 4, size: int = 512) -> LlamaForCausalLM:
    """Random weights, large enough that the likeliest token is not the same always."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def prompt(device: str) -> Tensor:
    return torch.randint(0, 64, (1, 100), generator=torch.Generator().manual_seed(1)).to(device)


def greedy(decoder: Decoder, logits_BV: Tensor, steps: int) -> Tensor:
    """Logits [steps, V] of a text that goes on with the likeliest token."""
    found = []
    for _ in range(steps):
        logits_BV = decoder.step(logits_BV.argmax(-1, keepdim=True)).clone()
        found.append(logits_BV[0])
    return torch.stack(found)


@pytest.fixture
def fixed_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor cuts a reduction the same way each time it compiles it, not as it happened to be fastest."""
    monkeypatch.setitem(decode.OPTIONS, "deterministic", True)
    torch.compiler.reset()


@pytest.fixture
def overlapping() -> None:
    """Of tests that need such a GPU."""
    if reason := dependent_launches(Call.on(torch.device("cuda"), torch.bfloat16)):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.usefixtures("fixed_cuts", "overlapping")
@pytest.mark.parametrize("name", POLICIES)
def test_logits_are_the_same_bits_with_dependent_launches_and_without(name: str) -> None:
    """240 greedy steps, compiled and replayed as a CUDA graph, through evictions and growing stores."""
    runs = []
    for dependent in (False, True):
        torch.compiler.reset()
        model = llama().to("cuda", torch.bfloat16)
        decoder = Decoder(model, attach(model, POLICIES[name]).new_cache(), dependent=dependent)
        logits_BV = decoder.read(prompt("cuda"))
        compile_layers(model, dependent=dependent)
        runs.append(greedy(decoder, logits_BV, 240))
    apart = [step for step, (off, on) in enumerate(zip(*runs, strict=True)) if not torch.equal(off, on)]
    assert len(runs[0].argmax(-1).unique()) > 16
    assert not apart, (apart[0], len(apart), (runs[0] - runs[1])[apart[0]].abs().max().item())


@pytest.mark.gpu
@pytest.mark.usefixtures("fixed_cuts", "overlapping")
@pytest.mark.parametrize("name", POLICIES)
def test_logits_are_the_same_bits_twenty_times(name: str) -> None:
    """64 steps of one compiled model, each time in a cache and a CUDA graph of their own: a race would flicker."""
    torch.compiler.reset()
    model = llama().to("cuda", torch.bfloat16)
    attached = attach(model, POLICIES[name])
    caches = [attached.new_cache() for _ in range(20)]
    decoders = [Decoder(model, cache, dependent=True) for cache in caches]
    read = [decoder.read(prompt("cuda")) for decoder in decoders]
    compile_layers(model, dependent=True)
    first, *others = [greedy(decoder, logits_BV, 64) for decoder, logits_BV in zip(decoders, read, strict=True)]
    assert [number for number, other in enumerate(others, 1) if not torch.equal(first, other)] == []


def waits_first(kernel: str) -> bool:
    """Does it wait before it stores anything, and before it lets the next kernel start?"""
    body = [line.strip() for line in kernel.splitlines()]
    first = {name: next((n for n, line in enumerate(body) if name in line), None) for name in (WAIT, LAUNCH, STORE)}
    wait = first[WAIT]
    return wait is not None and all(at is None or wait < at for at in (first[LAUNCH], first[STORE]))


def test_a_kernel_that_does_not_wait_first_is_found() -> None:
    """No wait, one behind a store, one behind the launch of the next kernel."""
    load, store, wait, launch = "x = tl.load(a)", f"{STORE}b, x)", f"tl.extra.cuda.{WAIT}", f"tl.extra.cuda.{LAUNCH}"
    assert waits_first("\n".join([load, wait, launch, store]))
    assert waits_first("\n".join([wait, "for i in range(4):", load, store, launch]))
    for lines in ([load, store], [load, store, wait, launch], [load, launch, wait, store]):
        assert not waits_first("\n".join(lines))


@pytest.mark.gpu
@pytest.mark.usefixtures("fixed_cuts", "overlapping")
def test_the_kernels_of_compiled_layers_wait_first() -> None:
    """As the attention's does: so whoever has waited sees the writes of all kernels before it."""
    model = llama().to("cuda", torch.bfloat16)
    decoder = Decoder(model, attach(model, POLICIES["stream"]).new_cache(), dependent=True)
    token = decoder.read(prompt("cuda")).argmax(-1, keepdim=True)
    compile_layers(model, dependent=True)
    with fresh_cache():
        _, sources = run_and_get_code(lambda: decoder.step(token).clone())
    kernels = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", "\n".join(sources), re.DOTALL)
    assert len(kernels) >= 5
    assert [kernel for kernel in kernels if not waits_first(kernel)] == []


def test_who_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device, its capability, Triton or torch: by name, and with what would do."""
    why_not._no_dependent_code.cache_clear()
    assert "tensors are on cpu" in str(dependent_launches(Call("cpu", torch.bfloat16)))
    assert "capability 8.0, dependent launches need 9.0" in str(
        dependent_launches(Call("cuda", torch.bfloat16, (8, 0)))
    )
    newer = Call("cuda", torch.bfloat16, (9, 0))
    assert dependent_launches(newer) is None
    assert dependent_launches(Call("cuda", torch.bfloat16, (12, 0))) is None
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["triton.cudagraphs"])
    why_not._no_dependent_code.cache_clear()
    assert re.search(r"torch .* has no torch\._inductor\.config\.triton\.enable_pdl", str(dependent_launches(newer)))
    monkeypatch.delattr("triton.language.extra.cuda.gdc_wait")
    why_not._no_dependent_code.cache_clear()
    assert re.search(r"Triton 3\..* has no .*gdc_wait", str(dependent_launches(newer)))
    why_not._no_dependent_code.cache_clear()


def test_what_cannot_be_is_refused_where_it_is_asked_for() -> None:
    """On the CPU, and of what Inductor does not compile; who asks for nothing gets steps as they were."""
    model = llama(1, 64)
    cache = attach(model, POLICIES["sep"]).new_cache()
    with pytest.raises(BackendError, match=r"dependent=True: .*on cpu; pass None"):
        Decoder(model, cache, dependent=True)
    with pytest.raises(BackendError, match=r"dependent=True: .*on cpu; pass None"):
        compile_layers(model, dependent=True)
    with pytest.raises(BackendError, match=r"backend='eager': is of Inductor's"):
        compile_layers(model, "eager", dependent=True)


@pytest.mark.parametrize("dependent", [None, False, True])
def test_the_choice_of_a_decoder_reaches_the_kernel(dependent: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its steps alone, not in what reads the prompt; without a CUDA graph only where it is asked for."""
    told: list[Any] = []
    attend = slots.decode_attention

    def noted(*args: Any, **options: Any) -> Tensor:
        told.append(options.pop("dependent"))
        return attend(*args, **options)

    monkeypatch.setattr(slots, "decode_attention", noted)
    monkeypatch.setattr(decode, "chosen", lambda _device, wanted: True if wanted is None else wanted)
    model = llama(2, 64)
    decoder = Decoder(model, attach(model, POLICIES["sep"]).new_cache(), graph=False, dependent=dependent)
    decoder.read(prompt("cpu"), chunk=99)
    greedy(decoder, torch.zeros(1, 64), 3)
    assert told == [False] * 2 + [bool(dependent)] * 6


@pytest.mark.parametrize(("wanted", "expected"), [(None, True), (False, False), (True, True)])
def test_the_choice_reaches_inductor(wanted: bool | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``chosen`` says; the other options stay."""
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(decode, "chosen", lambda _device, wanted: True if wanted is None else wanted)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _self, **options: given.append(options["options"]))
    compile_layers(llama(2, 64), dependent=wanted)
    assert len(given) == 4
    assert all(options == decode.OPTIONS | ({"triton.enable_pdl": True} if expected else {}) for options in given)
