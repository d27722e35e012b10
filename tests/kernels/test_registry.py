"""The table of implementations: what it says is true, and it alone decides."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.kernels import registry, why_not
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.operation import BackendError, Implementation, Operation, always, never
from megatron_sep.kernels.sep_attention import sep_attention
from megatron_sep.model.operations import operations_table

ROOT = Path(__file__).parents[2]
TABLE = operations_table()
ROWS = [(operation, row) for operation in TABLE.values() for row in operation.implementations]
HOPPER = (9, 0)
ATTENTIONS = ("sep_attention", "sep_decode", "sep_compact")
PASSES = ("layernorm", "rmsnorm", "open_residual", "split_rotated", "bias_gelu")
OUTSIDE = ("apex", "transformer_engine")

by_row = pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{table.name}-{row.name}" for table, row in ROWS])
calls = st.builds(
    Call,
    device=st.sampled_from(["cpu", "cuda", "mps"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    capability=st.sampled_from([(0, 0), (7, 5), (8, 0), HOPPER]),
    head_size=st.sampled_from([0, 8, 12, 16, 64, 80, 256, 264, 300]),
    dropout=st.booleans(),
    positive_scale=st.booleans(),
    whole=st.booleans(),
    biased=st.booleans(),
    adjusting=st.booleans(),
    even=st.booleans(),
    training=st.booleans(),
    tensor_parallel=st.sampled_from([1, 2]),
)


@random_cases(2000)
@given(call=calls, name=st.sampled_from(sorted(TABLE)))
def test_auto_takes_the_first_row_that_it_may_and_that_says_nothing_against_the_call(call: Call, name: str) -> None:
    """Random calls: never one that says why not, never one that is for names alone, and always one there is."""
    chosen = TABLE[name].choose(call)
    assert chosen.why_not(call) is None
    assert chosen.automatic(call)
    for row in TABLE[name].implementations[: TABLE[name].implementations.index(chosen)]:
        assert not row.automatic(call) or row.why_not(call) is not None


@random_cases(500)
@given(call=calls, entry=st.sampled_from(ROWS))
def test_a_name_is_taken_or_refused_with_the_rows_own_reason(
    call: Call, entry: tuple[Operation, Implementation]
) -> None:
    """Random calls: never another row than the one that was asked for."""
    table, row = entry
    reason = row.why_not(call)
    if reason is None:
        assert table.choose(call, row.name) is row
    else:
        with pytest.raises(BackendError) as refusal:
            table.choose(call, row.name)
        auto = table.choose(call).name
        assert str(refusal.value) == (
            f"{table.name}: backend {row.name!r} cannot run here: {reason}; or choose auto, which takes {auto!r}"
        )


@pytest.mark.parametrize(
    ("name", "call", "row"),
    [
        *((name, Call("cpu", torch.float32, head_size=64), "reference") for name in ATTENTIONS),
        *((name, Call("cuda", torch.bfloat16, HOPPER, head_size=64), "triton") for name in ATTENTIONS),
        *((name, Call("cuda", torch.float64, HOPPER, head_size=64), "reference") for name in ATTENTIONS),
        *((name, Call("cuda", torch.float16, (7, 5), head_size=64), "reference") for name in ATTENTIONS),
        *((name, Call("cuda", torch.bfloat16, HOPPER, head_size=260), "reference") for name in ATTENTIONS),
        ("sep_attention", Call("cuda", torch.bfloat16, HOPPER, head_size=64, dropout=True), "reference"),
        ("sep_attention", Call("cuda", torch.bfloat16, HOPPER, head_size=64, whole=False), "triton"),
        ("sep_attention", Call("cuda", torch.bfloat16, HOPPER, head_size=64, even=False), "reference"),
        ("full_attention", Call("cuda", torch.bfloat16, HOPPER, head_size=64, dropout=True), "torch"),
        ("full_attention", Call("cuda", torch.bfloat16, HOPPER, head_size=64, whole=False), "reference"),
        ("sep_attention", Call("cuda", torch.bfloat16, HOPPER, head_size=64, biased=True), "triton"),
        ("sep_attention", Call("cuda", torch.bfloat16, HOPPER, head_size=64, adjusting=True), "reference"),
        ("full_attention", Call("cuda", torch.bfloat16, HOPPER, head_size=64, biased=True), "triton"),
        ("full_attention", Call("cuda", torch.bfloat16, HOPPER, head_size=64, adjusting=True), "reference"),
        ("full_attention", Call("cpu", torch.float32, head_size=64, biased=True), "reference"),
        ("cross_entropy", Call("cuda", torch.bfloat16, HOPPER), "triton"),
        ("cross_entropy", Call("cuda", torch.bfloat16, HOPPER, tensor_parallel=2), "triton_split"),
        ("cross_entropy", Call("cuda", torch.float32, HOPPER, tensor_parallel=2), "triton_split"),
        ("cross_entropy", Call("cuda", torch.bfloat16, (7, 5), tensor_parallel=2), "megatron_fused"),
        ("cross_entropy", Call("cuda", torch.float32, (7, 5), tensor_parallel=2), "megatron"),
        ("cross_entropy", Call("cpu", torch.float32), "torch"),
        ("cross_entropy", Call("cpu", torch.float32, tensor_parallel=2), "megatron"),
        ("adamw", Call("cuda", torch.bfloat16, HOPPER), "torch"),
        *((name, Call("cuda", torch.bfloat16, HOPPER), "triton") for name in PASSES),
        *((name, Call("cuda", torch.float64, HOPPER), "torch") for name in ("layernorm", "rmsnorm", "bias_gelu")),
        *((name, Call("cpu", torch.float32), "reference") for name in ("open_residual", "split_rotated")),
    ],
    ids=str,
)
def test_auto_takes(name: str, call: Call, row: str) -> None:
    """The kernels on a GPU that can run them, else the reference; torch's own for the rest."""
    assert TABLE[name].choose(call).name == row


FUSED = {"device": "cuda", "dtype": torch.bfloat16, "capability": HOPPER, "head_size": 64}
IMPOSSIBLE = [
    ("sep_attention", "triton", {"device": "mps"}, "on mps, Triton needs CUDA"),
    ("sep_attention", "triton", {"capability": (7, 5)}, "compute capability 7.5, Triton needs 8.0"),
    ("sep_attention", "triton", {"dtype": torch.float64}, "bf16, fp16 or fp32, not torch.float64"),
    ("sep_attention", "triton", {"head_size": 257}, "head sizes to 256, not 257"),
    ("sep_attention", "triton", {"dropout": True}, "no dropout; set the dropout to 0"),
    ("sep_attention", "triton", {"positive_scale": False}, "positive scale"),
    ("sep_attention", "triton", {"adjusting": True}, "no self-adjusting softmax"),
    ("sep_attention", "flex", {"adjusting": True}, "no self-adjusting softmax"),
    ("full_attention", "torch", {"biased": True}, "no bias of distance"),
    ("full_attention", "torch", {"adjusting": True}, "no self-adjusting softmax"),
    ("sep_attention", "triton", {"even": False}, "one window for all keys"),
    ("sep_attention", "flex", {"dropout": True}, "no dropout"),
    ("sep_attention", "flex", {"head_size": 8}, "head sizes from 16 on CUDA, not 8"),
    ("sep_attention", "flex", {"device": "cpu", "training": True}, "no backward pass on the CPU"),
    ("full_attention", "torch", {"whole": False}, "a span of them"),
    ("sep_decode", "triton", {"head_size": 12}, "from 16 to 256 in steps of 8, not 12"),
    ("sep_compact", "triton", {"dtype": torch.float64}, "not torch.float64"),
    ("layernorm", "triton", {"device": "cpu", "dtype": torch.float64}, "not torch.float64"),
    ("rmsnorm", "triton", {"capability": (7, 0)}, "compute capability 7.0, Triton needs 8.0"),
    ("open_residual", "triton", {"device": "mps"}, "on mps, Triton needs CUDA"),
    ("split_rotated", "triton", {"dtype": torch.float64}, "not torch.float64"),
    ("bias_gelu", "triton", {"dtype": torch.float64}, "not torch.float64"),
    ("cross_entropy", "triton", {"tensor_parallel": 2}, "split over 2 ranks"),
    ("cross_entropy", "triton", {"dtype": torch.float64}, "not torch.float64"),
    ("cross_entropy", "triton_split", {"dtype": torch.float64}, "not torch.float64"),
    ("cross_entropy", "torch", {"tensor_parallel": 2}, "split over 2 ranks; set parallel.tensor=1"),
    ("cross_entropy", "reference", {"tensor_parallel": 4}, "split over 4 ranks"),
    ("cross_entropy", "megatron_fused", {"dtype": torch.float32}, "to bf16, the logits are torch.float32"),
    ("cross_entropy", "megatron_fused", {"device": "cpu"}, "for CUDA, the tensors are on cpu"),
    *((name, row, {"device": "cpu"}, "needs CUDA") for name in ("layernorm", "rmsnorm", "adamw") for row in OUTSIDE),
]


@pytest.mark.parametrize(("name", "row", "change", "reason"), IMPOSSIBLE)
def test_what_cannot_run_says_why(name: str, row: str, change: dict[str, object], reason: str) -> None:
    """The value that stands in the way is in the message, and it alone does: without it the row takes the call."""
    call = Call(**FUSED)
    found = {row.name: row for row in TABLE[name].implementations}[row]
    assert reason in (found.why_not(Call(**FUSED | change)) or "")
    assert row in OUTSIDE or found.why_not(call) is None


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "adamw"])
@pytest.mark.parametrize("row", OUTSIDE)
def test_a_package_that_is_missing_is_the_reason(name: str, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at run time, never needed: the error names the module and what to do."""
    for module in [name for name in sys.modules if name.split(".")[0] == row]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, row, None)
    with pytest.raises(
        BackendError, match=rf"{row}\.\S+ cannot be imported .*; install it; or choose auto.*'(torch|triton)'"
    ):
        TABLE[name].resolve(Call(**FUSED), row)


def test_a_name_that_no_row_has_is_an_error_with_those_there_are() -> None:
    """No silent fallback."""
    with pytest.raises(BackendError, match="sep_attention: backend 'fast' is unknown; choose auto, triton, flex, ref"):
        TABLE["sep_attention"].choose(Call("cpu", torch.float32), "fast")


def test_where_no_row_can_run_the_error_gives_every_reason() -> None:
    """An operation of the kernels alone has no loss for a split vocabulary: megatron-core's rows come from above."""
    call = Call("cpu", torch.float32, tensor_parallel=2)
    with pytest.raises(BackendError, match=r"nothing takes .*torch: the vocabulary is split.*reference: the vocab"):
        registry.OPERATIONS["cross_entropy"].choose(call)
    assert TABLE["cross_entropy"].choose(call).name == "megatron"


@by_row
def test_every_row_has_a_reference_tests_and_a_benchmark(table: Operation, row: Implementation) -> None:
    """The reference is a row that is held to nothing but itself; the test names the row; the benchmark exists."""
    reference = table.choose(Call("cpu", torch.float32), row.reference)
    assert reference.reference == reference.name
    assert f'"{row.name}"' in (ROOT / row.tests).read_text()
    assert (ROOT / row.benchmark).is_file()


@by_row
def test_every_row_that_can_run_here_loads(table: Operation, row: Implementation) -> None:
    """Its target exists; that of a row that cannot run here is at least a module of this project."""
    module, attribute = row.target.split(":")
    assert importlib.util.find_spec(module) is not None
    if row.why_not(Call("cpu", torch.float32, head_size=64)) is None:
        assert table.resolve(Call("cpu", torch.float32, head_size=64), row.name) is getattr(
            importlib.import_module(module), attribute
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [8, 12, 16, 256, 257, 264])
def test_the_fused_kernels_refuse_exactly_what_their_rows_say(size: int, dtype: torch.dtype) -> None:
    """Called past the registry, a kernel raises ValueError for what its row says why not for, and for nothing else."""
    from megatron_sep.kernels.sep_attention.triton import triton_attention
    from megatron_sep.kernels.sep_decode.triton import triton_compact

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = AttentionPattern(2).plan(torch.zeros(1, 3, dtype=torch.long, device=device))
    q, cache = torch.zeros(1, 1, 3, size, dtype=dtype, device=device), torch.zeros(1, 1, 1, 3, size, dtype=dtype)
    cache = cache.to(device)
    rows = torch.zeros(1, dtype=torch.int32, device=device)
    call = Call.on(q.device, dtype, head_size=size)
    for reason, run in (
        (why_not.fused_attention(call), lambda: triton_attention(q, q, q, plan, 0.5)),
        (why_not.fused_decode(call), lambda: triton_compact(cache, cache, rows[:, None].expand(1, 3), rows, rows > 0)),
    ):
        if reason is None:
            run()
        else:
            with pytest.raises(ValueError, match="the fused kernel takes"):
                run()


def doubled(q: Tensor, _k: Tensor, _v: Tensor, _plan: MaskPlan, _scale: float) -> Tensor:
    """A toy attention."""
    return 2 * q


def toy(automatic: bool) -> Implementation:
    """Its row."""
    can = always if automatic else never
    return Implementation("toy", f"{__name__}:doubled", why_not.nothing, can, "tests/kernels/test_registry.py", "")


@pytest.mark.usefixtures("nothing_chosen", "no_compilations")
def test_one_row_is_all_that_a_new_kernel_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, by auto once it may, and compiled; and no other row is touched."""
    plan = AttentionPattern(4).plan(torch.zeros(1, 16, dtype=torch.long))
    q = torch.randn(1, 2, 16, 8)
    table = registry.OPERATIONS["sep_attention"]
    monkeypatch.setitem(registry.OPERATIONS, "sep_attention", table.with_rows(toy(automatic=False)))
    for run in (sep_attention, torch.compile(sep_attention, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(run(q, q, q, plan, backend="toy"), 2 * q)
        torch.testing.assert_close(run(q, q, q, plan), sep_attention(q, q, q, plan, backend="reference"))
    first = Operation("sep_attention", (toy(automatic=True), *table.implementations))
    monkeypatch.setitem(registry.OPERATIONS, "sep_attention", first)
    registry._load.cache_clear()
    torch.testing.assert_close(sep_attention(q, q, q, plan), 2 * q)


@pytest.mark.usefixtures("nothing_chosen")
def test_auto_says_its_choice_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line an operation and choice on the first process, none on the others, none for a name."""
    call = Call("cpu", torch.float32)
    for _ in range(2):
        TABLE["layernorm"].choose(call)
        TABLE["rmsnorm"].choose(call, "reference")
    monkeypatch.setenv("RANK", "1")
    TABLE["adamw"].choose(call)
    assert capsys.readouterr().err == "layernorm: torch on cpu\n"
