"""One decode step and the compaction of a cache: the reference by definition, the kernel against the reference.

The kernel runs in Triton's interpreter on CPU, compiled on a GPU. The interpreter lacks a bf16 matrix product.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from support.cases import full_run
from torch import Tensor

from megatron_sep.kernels.call import Call
from megatron_sep.kernels.operation import BackendError
from megatron_sep.kernels.sep_decode import compact, decode_attention
from megatron_sep.kernels.sep_decode.triton import Launch, choose_launch
from megatron_sep.kernels.why_not import dependent_launches

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = ["triton", "reference"]
LAYOUTS = {"bkcd": (0, 1, 2, 3), "bckd": (0, 2, 1, 3), "cbkd": (2, 0, 1, 3)}
CHOICE = "megatron_sep.kernels.sep_decode.triton.choose_launch"
AGAIN = 2 if full_run() or ON_GPU else 1
"""Pairs of steps after the first one, with the counter that the step before them has left."""
interpreted = pytest.mark.skipif(ON_GPU, reason="the interpreter's cases; a GPU runs the compiled ones")


@dataclass
class Step:
    """The arguments of one step."""

    q: Tensor
    k_new: Tensor
    v_new: Tensor
    k: Tensor
    v: Tensor
    length: Tensor
    reach_end: Tensor
    now: Tensor
    scale: float = 0.3
    rotary: tuple[Tensor, Tensor] | None = None
    arrived: Tensor | None = None
    dependent: bool = False

    def run(self, backend: str) -> Tensor:
        """The output; the caches are written."""
        tensors = (self.q, self.k_new, self.v_new, self.k, self.v, self.length, self.reach_end, self.now)
        options = {"rotary": self.rotary, "arrived_BK": self.arrived, "dependent": self.dependent}
        return decode_attention(*tensors, scale=self.scale, **options, backend=backend)

    def counted(self) -> "Step":
        """With a counter, so that the last share may finish the output."""
        return replace(self, arrived=torch.zeros(*self.k.shape[:2], dtype=torch.int32, device=DEVICE))

    def copy(self) -> "Step":
        """The same with caches of its own, of the same strides."""
        return replace(self, k=cloned(self.k), v=cloned(self.v))

    def wide(self) -> "Step":
        """The same in fp64: what the rounded arguments mean."""
        q, k_new, v_new, k, v = (x.double() for x in (self.q, self.k_new, self.v_new, self.k, self.v))
        return replace(self, q=q, k_new=k_new, v_new=v_new, k=k, v=v)


def cloned(view: Tensor) -> Tensor:
    """A copy of the same strides."""
    return torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=view.device).copy_(view)


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=self.generator))

    def one_of(self, *options):
        return options[self.below(len(options))]

    def poisoned(self, shape: list[int], dtype: torch.dtype, order: tuple[int, ...]) -> Tensor:
        """Random numbers in a view into memory of another order that is NaN everywhere else."""
        spare = [1] * (len(shape) - 2) + [16, 16]
        memory = torch.full([shape[i] + self.one_of(0, spare[i]) for i in order], torch.nan, dtype=dtype, device=DEVICE)
        view = memory.permute([order.index(i) for i in range(len(shape))])[tuple(slice(0, n) for n in shape)]
        return view.copy_(torch.randn(shape, generator=self.generator))

    def step(self, batch: int, heads: int, group: int, slots: int, size: int, dtype: torch.dtype) -> Step:
        """Rows of any length below the slots, 0 too; dead slots hold NaN; angles none, some or all."""
        rows = self.one_of(batch, batch * heads)
        length = torch.tensor([self.one_of(0, slots - 1, *[self.below(slots)] * 4) for _ in range(rows)])
        density = torch.tensor([self.one_of(0.0, 0.5, 0.9, 1.0) for _ in range(rows)])[:, None]
        now = torch.randint(-5, 100, (rows,), generator=self.generator)
        live = torch.rand(rows, slots, generator=self.generator) < density
        later = torch.randint(1, 50, (rows, slots), generator=self.generator)
        reach_end = torch.where(live, now[:, None] + later, now[:, None] + 1 - later)
        order = LAYOUTS[self.one_of(*LAYOUTS)]
        k, v = (self.poisoned([batch, heads, slots, size], dtype, order) for _ in range(2))
        dead = (~(live & (torch.arange(slots) < length[:, None]))).to(DEVICE).view(batch, -1, slots, 1)
        for cache in (k, v):
            cache.masked_fill_(dead, torch.nan)
        q, k_new, v_new = (self.poisoned([batch, n, size], dtype, (0, 1, 2)) for n in (heads * group, heads, heads))
        half = self.one_of(0, size // 2, size // 8, 5)
        angles = torch.arange(slots + self.below(3))[:, None] * 10.0 ** -torch.linspace(0, 4, max(half, 1))
        rotary = (angles.cos().to(DEVICE), angles.sin().to(DEVICE)) if half else None
        numbers = (x.int().to(DEVICE) for x in (length, reach_end, now))
        return Step(q, k_new, v_new, k, v, *numbers, scale=size**-0.5, rotary=rotary)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every element, NaN like NaN."""
    return torch.equal(torch.nan_to_num(a, 1e4), torch.nan_to_num(b, 1e4))


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(step: Step, tolerance: float, case: object) -> None:
    """The kernel's output is the reference's in fp64, and it leaves the same caches, unused memory included."""
    expected = step.copy().wide().run("reference")
    reference = step.copy()
    reference.run("reference")
    out = step.run("triton")
    assert out.dtype == step.q.dtype
    assert out.is_contiguous()
    assert relative(out, expected) <= tolerance, (case, relative(out, expected))
    assert same(step.k, reference.k), case
    assert same(step.v, reference.v), case


def by_definition(step: Step) -> Tensor:
    """The step from its definition: a dense mask over all slots and the new token as one more."""
    B, H, D = step.q.shape
    K, C = step.k.shape[1:3]
    length = step.length.view(B, -1).expand(B, K).long()
    slot = torch.arange(C)
    old = (slot < length[..., None]) & (step.reach_end > step.now[:, None]).view(B, -1, C)
    k, v = (x.nan_to_num() for x in (step.k, step.v))
    keys, values = (torch.cat([x, new[:, :, None]], 2) for x, new in ((k, step.k_new), (v, step.v_new)))
    q = step.q.view(B, K, H // K, D)
    if step.rotary is not None:
        half = step.rotary[0].shape[1]
        turn = torch.complex(*(x.double() for x in step.rotary))
        where = torch.cat([slot.expand(B, K, C), length[..., None]], 2)

        def turned(x: Tensor, angle: Tensor) -> Tensor:
            z = torch.complex(x[..., :half], x[..., half : 2 * half]) * angle
            return torch.cat([z.real, z.imag, x[..., 2 * half :]], -1)

        q, keys = turned(q, turn[length][:, :, None]), turned(keys, turn[where])
    scores = (q @ keys.mT * step.scale).masked_fill(~torch.cat([old, old.new_ones(B, K, 1)], 2)[:, :, None], -torch.inf)
    return (scores.softmax(-1) @ values).view(B, H, D)


def shape(draw: Draw) -> tuple[int, int, int, int, int]:
    """A small one: rows, key heads, heads of a group, slots, head size."""
    return (
        draw.one_of(1, 2, 3),
        draw.one_of(1, 2, 3),
        draw.one_of(1, 1, 2, 3),
        1 + draw.below(90),
        draw.one_of(16, 24, 40),
    )


@interpreted
def test_the_reference_is_the_definition() -> None:
    """Dense masks, rotation as complex numbers, in fp64: the same numbers; only slot ``length`` changes."""
    for seed in range(60):
        draw = Draw(seed)
        step = draw.step(*shape(draw), torch.float32).wide()
        before = step.copy()
        torch.testing.assert_close(step.run("reference"), by_definition(before), rtol=1e-9, atol=1e-9)
        rows = step.length.shape[0]
        at = torch.arange(step.k.shape[2]) == step.length.long()[:, None]
        written = at.view(step.k.shape[0], -1, step.k.shape[2], 1).expand(*step.k.shape[:3], 1)
        for after, old, new in ((step.k, before.k, step.k_new), (step.v, before.v, step.v_new)):
            assert same(after, torch.where(written, new[:, :, None], old)), (seed, rows)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_the_reference_has_the_same_bits_alone_and_among_any_slots(dtype: torch.dtype) -> None:
    """Neighbours, dead slots and unused slots change no bit."""
    for seed in range(10):
        step = Draw(seed).step(3, 2, 3, 50, 24, dtype)
        together = step.copy().run("reference")
        heads = step.length.shape[0] // 3
        for b in range(3):
            one, own = slice(b, b + 1), slice(b * heads, (b + 1) * heads)
            alone = replace(
                step,
                **{name: getattr(step, name)[one] for name in ("q", "k_new", "v_new")},
                **{name: torch.cat([getattr(step, name)[one]] * 2, 2) for name in ("k", "v")},
                **{name: getattr(step, name)[own] for name in ("length", "now")},
                reach_end=torch.cat([step.reach_end[own]] * 2, 1),
                rotary=step.rotary and tuple(torch.cat([x, x]) for x in step.rotary),
            )
            assert torch.equal(alone.run("reference")[0], together[b]), (seed, b)


@interpreted
@pytest.mark.parametrize("chunk", range(4))
def test_random_cases_equal_the_reference(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any lengths, ends of reach, groups, angles, layout, block and splits; NaN in every slot that is not live."""
    for seed in range(6 * chunk, 6 * chunk + 6):
        draw = Draw(seed)
        launch = Launch(draw.one_of(16, 32), draw.one_of(1, 1, 2, 3, 5))
        monkeypatch.setattr(CHOICE, lambda *_, x=launch: x)
        check(draw.step(*shape(draw), torch.float32), 2e-6, (seed, launch))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("slots", [90, 400])
def test_the_last_share_leaves_the_same_output_and_its_counter_at_zero(
    group: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, as a replayed graph steps, whichever shares are empty: the same bits."""
    for seed in range(3):
        draw = Draw(seed)
        launch = Launch(16, draw.one_of(2, 5, 20), last_combines=True)
        monkeypatch.setattr(CHOICE, lambda *_, x=launch: x)
        step = draw.step(2, 2, group, slots, 40, torch.float32).counted()
        first = step.copy().run("triton")
        for _ in range(AGAIN):
            check(step.copy(), 2e-5 if ON_GPU else 2e-6, (seed, launch))
            assert torch.equal(step.copy().run("triton"), first), (seed, launch)
            assert not step.arrived.any(), (seed, launch)


@interpreted
def test_without_a_counter_a_second_kernel_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its output is the same."""
    monkeypatch.setattr(CHOICE, lambda *_: Launch(16, 5, last_combines=True))
    step = Draw(3).step(2, 2, 3, 90, 40, torch.float32)
    torch.testing.assert_close(step.copy().run("triton"), step.counted().run("triton"), rtol=1e-6, atol=1e-7)


@interpreted
@pytest.mark.parametrize(("dtype", "group", "tolerance"), [(torch.bfloat16, 1, 8e-3), (torch.float16, 3, 2e-3)])
def test_half_precision_and_the_launch_it_chooses(dtype: torch.dtype, group: int, tolerance: float) -> None:
    """As launched for slots that are split."""
    for seed in range(3):
        draw = Draw(seed)
        assert choose_launch(2, group, 200, 32, 2, False, 132).splits > 1
        check(draw.step(1, 2, group, 200, 32, dtype).counted(), tolerance, seed)


COMBINATIONS = [(torch.bfloat16, size, group) for size in (16, 64, 72, 80, 128, 256) for group in (1, 4)]
COMBINATIONS += [(torch.bfloat16, 64, 3), (torch.bfloat16, 128, 8), (torch.bfloat16, 64, 71), (torch.bfloat16, 256, 40)]
COMBINATIONS += [(torch.float16, 64, 1), (torch.float16, 128, 7), (torch.float16, 96, 16), (torch.float32, 40, 1)]
COMBINATIONS += [(torch.float32, size, group) for size in (64, 128, 256) for group in (1, 2, 8)]
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


@pytest.mark.gpu
@pytest.mark.parametrize("last_combines", [False, True])
@pytest.mark.parametrize("splits", [None, 1, 5], ids=str)
@pytest.mark.parametrize(("dtype", "size", "group"), COMBINATIONS, ids=str)
def test_random_cases_equal_the_reference_on_gpu(
    dtype: torch.dtype, size: int, group: int, splits: int | None, last_combines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled: any lengths, ends of reach, angles and layout, the chosen splits and others; NaN in every dead slot."""
    changes = {"last_combines": last_combines} | ({"splits": splits} if splits else {})
    monkeypatch.setattr(CHOICE, lambda *a: choose_launch(*a)._replace(**changes))
    for seed in range(8):
        draw = Draw(seed)
        slots = draw.one_of(1 + draw.below(40), 1 + draw.below(300), 1 + draw.below(1500))
        step = draw.step(draw.one_of(1, 2, 5), draw.one_of(1, 2, 8), group, slots, size, dtype)
        check(step.counted(), TOLERANCES[dtype], (seed, slots))


@pytest.mark.gpu
@pytest.mark.parametrize("last_combines", [False, True])
def test_a_dependent_launch_leaves_the_same_bits(last_combines: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that each read what the one before wrote, in one stream, 100 times over."""
    if reason := dependent_launches(Call.on(torch.device("cuda"), torch.bfloat16)):
        pytest.skip(reason)
    monkeypatch.setattr(CHOICE, lambda *_: Launch(32, 7, last_combines=last_combines))
    step = Draw(6).step(1, 8, 4, 1500, 128, torch.bfloat16).counted()
    step.k, step.v, step.length = step.k.nan_to_num(), step.v.nan_to_num(), step.length.fill_(1000)
    expected = None
    for dependent in (False, *[True] * 100):
        chain = replace(step.copy(), length=step.length.clone(), dependent=dependent)
        for _ in range(8):
            chain.q = chain.run("triton")
            chain.length += 1
        found = torch.cat([chain.q.flatten(), chain.k.flatten(), chain.v.flatten()])
        expected = found if expected is None else expected
        assert torch.equal(found, expected)


@interpreted
def test_dependent_launches_are_refused_where_there_are_none() -> None:
    """The message says why, and the way out."""
    step = replace(Draw(5).step(2, 2, 2, 10, 16, torch.float32), dependent=True)
    for backend in ("triton", "reference", "auto"):
        with pytest.raises(BackendError, match=r"dependent=True: .*on cpu; pass dependent=False"):
            step.copy().run(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_row_that_sees_only_the_new_token_returns_its_value(backend: str, group: int, rotated: bool) -> None:
    """Bit for bit: an empty row, and one whose slots are all dead, beside a row that is not, split or not."""
    for slots in (20, 200):
        step = Draw(1).step(3, 2, group, slots, 32, torch.float32)
        step.length[:] = torch.tensor([0, slots - 1, slots - 1], dtype=torch.int32).repeat_interleave(
            len(step.now) // 3
        )
        step.now.fill_(7)
        step.reach_end.view(3, -1, slots)[:2] = 7
        step.k, step.v = step.k.nan_to_num(), step.v.nan_to_num()
        angles = torch.rand(slots, 16, device=DEVICE)
        step.rotary = (angles.cos(), angles.sin()) if rotated else None
        out = step.run(backend)
        assert torch.equal(out[:2], step.v_new[:2].repeat_interleave(group, 1))


@pytest.mark.parametrize("group", [1, 2])
def test_a_full_row_writes_nothing_and_still_attends(group: int) -> None:
    """Length C breaks the promise: the kernel stays inside the cache, the reference names the row."""
    step = Draw(2).step(2, 2, group, 40, 16, torch.float32)
    step.k, step.v = (torch.randn(2, 2, 40, 16, device=DEVICE) for _ in range(2))
    step.length.fill_(40)
    step.rotary = None
    before = step.copy()
    out = step.run("triton")
    assert torch.equal(before.k, step.k)
    assert torch.equal(before.v, step.v)
    cpu = {name: x.cpu() for name, x in vars(before).items() if isinstance(x, Tensor)}
    torch.testing.assert_close(out.cpu(), by_definition(replace(before, **cpu)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"row 0 has length 40 and 40 slots.*compact"):
        step.run("reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_of_heads_and_of_the_batch_are_one_case(backend: str) -> None:
    """Bookkeeping a batch row, repeated for each key head, gives the same bits."""
    step = Draw(4).step(2, 3, 2, 30, 16, torch.float32)
    one = {"length": step.length[:2], "reach_end": step.reach_end[:2], "now": step.now[:2]}
    step = replace(step, k=step.k.nan_to_num(), v=step.v.nan_to_num(), **one)
    each = replace(step.copy(), **{name: x.repeat_interleave(3, 0) for name, x in one.items()})
    torch.testing.assert_close(step.run(backend), each.run(backend), rtol=1e-6, atol=1e-6)


@dataclass
class Move:
    """The arguments of one compaction."""

    k: Tensor
    v: Tensor
    source: Tensor
    length: Tensor
    due: Tensor

    def run(self, backend: str) -> None:
        compact(self.k, self.v, self.source, self.length, self.due, backend=backend)


def move(draw: Draw, layers: int, batch: int, heads: int, slots: int, size: int, dtype: torch.dtype) -> Move:
    """Rows that keep none, some or all of their slots, some with a prefix that stays; nonsense behind the sources."""
    rows = draw.one_of(batch, batch * heads)
    source = torch.randint(-(2**31), 2**31 - 1, (rows, slots), generator=draw.generator)
    length = torch.zeros(rows, dtype=torch.int32)
    for row in range(rows):
        keep = torch.rand(slots, generator=draw.generator) < draw.one_of(0.0, 0.2, 0.7, 0.95, 1.0)
        keep[: draw.one_of(0, draw.below(slots))] = True
        kept = keep.nonzero()[:, 0]
        length[row] = len(kept)
        source[row, : len(kept)] = kept
    due = torch.rand(rows, generator=draw.generator) < 0.7
    due = due if draw.below(2) else due.to(torch.int8)
    order = draw.one_of((0, 1, 2, 3, 4), (1, 0, 3, 2, 4), (3, 0, 1, 2, 4))
    k, v = (draw.poisoned([layers, batch, heads, slots, size], dtype, order) for _ in range(2))
    return Move(k, v, source.int().to(DEVICE), length.to(DEVICE), due.to(DEVICE))


def check_move(case: Move, name: object) -> None:
    """Kernel and reference leave the same caches, and they are the kept slots by definition."""
    expected = replace(case, k=cloned(case.k), v=cloned(case.v))
    before = cloned(case.k)
    expected.run("reference")
    case.run("triton")
    assert torch.equal(case.k, expected.k), name
    assert torch.equal(case.v, expected.v), name
    heads = case.k.shape[1] * case.k.shape[2] // len(case.length)
    flat, old = case.k.flatten(1, 2), before.flatten(1, 2)
    for pair in range(flat.shape[1]):
        row = pair // heads
        n = int(case.length[row]) if case.due[row] else 0
        assert torch.equal(flat[:, pair, :n], old[:, pair, case.source[row, :n].long()]), name
        assert torch.equal(flat[:, pair, n:], old[:, pair, n:]), name


@interpreted
def test_compaction_keeps_what_it_should() -> None:
    """Random rows, layouts, sources and due rows; slots beyond the new length and rows not due keep every bit."""
    for seed in range(16):
        draw = Draw(seed)
        size = draw.one_of(16, 24)
        dtype = draw.one_of(torch.float32, torch.float16)
        sizes = (draw.one_of(1, 2), draw.one_of(1, 2), draw.one_of(1, 2), 1 + draw.below(300), size)
        check_move(move(draw, *sizes, dtype), seed)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compaction_keeps_what_it_should_on_gpu(dtype: torch.dtype, size: int) -> None:
    """Compiled, where the threads of a block really race: long rows, moves by one slot and by many."""
    for seed in range(20):
        draw = Draw(seed)
        sizes = (draw.one_of(1, 3), draw.one_of(1, 4), draw.one_of(1, 8), 1 + draw.below(3000), size)
        check_move(move(draw, *sizes, dtype), seed)


@pytest.mark.gpu
def test_caches_beyond_two_to_the_31_elements() -> None:
    """A step and a compaction at offsets that 32 bits do not hold."""
    slots = 2**20 + 1000
    k, v = (torch.zeros(1, 2, 8, slots, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    assert k.numel() > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    live = torch.rand(2, slots, device="cuda", generator=generator) < 3e-4
    live[:, -20:] = True
    kept = [row.nonzero()[:, 0] for row in live]
    for row in range(2):
        for cache in (k, v):
            cache[0, row, :, kept[row]] = torch.randn(8, len(kept[row]), 128, device="cuda").bfloat16()
    q, k_new, v_new = (torch.randn(2, n, 128, device="cuda").bfloat16() for n in (16, 8, 8))
    length, now = (torch.full((2,), x, dtype=torch.int32, device="cuda") for x in (slots - 1, 0))
    step = Step(q, k_new, v_new, k[0], v[0], length, live.int(), now, scale=0.09)
    expected = step.run("reference")
    k[:, :, :, -1] = v[:, :, :, -1] = 0
    assert relative(step.run("triton"), expected.double()) < 1e-2
    source = torch.zeros(2, slots, dtype=torch.int32, device="cuda")
    rows = [cache[:, row, :, kept[row]] for cache in (k, v) for row in range(2)]
    for row in range(2):
        source[row, : len(kept[row])] = kept[row]
    lengths = torch.tensor([len(x) for x in kept], dtype=torch.int32, device="cuda")
    compact(k, v, source, lengths, torch.ones(2, dtype=torch.bool, device="cuda"), backend="triton")
    moved = [cache[:, row, :, : len(kept[row])] for cache in (k, v) for row in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(moved, rows, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("batch", [1, 200])
def test_a_cuda_graph_holds_a_step_and_a_compaction(batch: int, group: int) -> None:
    """Captured once and replayed as the rows grow and shrink, split (batch 1) and not: what the reference does."""
    draw = Draw(batch)
    step = draw.step(batch, 2, group, 900, 64, torch.bfloat16)
    step.k, step.v = step.k.nan_to_num()[None].contiguous(), step.v.nan_to_num()[None].contiguous()
    step.length.fill_(100)
    step.reach_end.random_(0, 40, generator=torch.Generator("cuda").manual_seed(1))
    step.now.fill_(10)
    source = torch.arange(900, dtype=torch.int32, device="cuda").repeat(len(step.now), 1)
    shorter, due = torch.zeros_like(step.length), torch.zeros_like(step.length, dtype=torch.int8)

    def turn(backend: str, step: Step) -> Tensor:
        compact(step.k, step.v, source, shorter, due, backend=backend)
        out = replace(step, k=step.k[0], v=step.v[0]).run(backend)
        step.length += 1
        return out

    other = replace(step.copy(), length=step.length.clone())
    turn("triton", replace(step.copy(), length=step.length.clone()))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = turn("triton", step)
    for turns in range(12):
        step.q.normal_()
        due.fill_(turns == 7)
        if turns == 7:
            source[:, :50] = torch.arange(50, device="cuda", dtype=torch.int32) * 2
            shorter.fill_(50)
            step.length.fill_(50)
            other.length.fill_(50)
        graph.replay()
        assert relative(out, turn("reference", other).double()) < 1e-2, turns
        assert torch.equal(step.k, other.k), turns
        assert torch.equal(step.length, other.length)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_splits_fill_the_gpu_and_have_work(multiprocessors: int) -> None:
    """Enough programs where the slots allow, never a split without a block, one where rows or blocks are few."""
    for rows in (1, 8, 100, 1000):
        for slots in (1, 100, 1000, 100_000):
            for size, group in ((16, 1), (64, 3), (80, 1), (128, 8), (256, 71)):
                launch = choose_launch(rows, group, slots, size, 2, True, multiprocessors)
                assert launch.block >= 16
                assert launch.block & (launch.block - 1) == 0
                assert launch.splits == 1 or slots > max(launch.splits - 1, 3) * launch.block
                assert launch.splits <= 64
                assert rows * (launch.splits - 1) < 4 * multiprocessors


def test_what_does_not_fit_is_an_error() -> None:
    """The message names the value and the way out."""
    step = Draw(5).step(2, 2, 2, 10, 16, torch.float32)

    def refused(match: str, backend: str = "auto", **change: object) -> None:
        with pytest.raises(ValueError, match=match):
            replace(step, **change).run(backend)

    refused("3 query heads are no multiple of 2", q=step.q[:, :3])
    refused(r"q \[B, H, D\]", q=step.q[..., :8])
    refused(r"q \[B, H, D\]", k_new=step.k_new[:, :1])
    refused("caches alike", v=step.v[:, :, :5])
    refused("allocate them with D last", k=step.k.mT.contiguous().mT)
    refused("k_new is torch.float16", k_new=step.k_new.half())
    refused("3 rows of bookkeeping", length=step.length.new_zeros(3))
    refused("reach_end is .*pass .*int32", reach_end=step.reach_end.long())
    refused("now is .*pass", now=step.now.new_zeros(7))
    refused("rotary is cos", rotary=(torch.ones(5, 4, device=DEVICE), torch.ones(5, 4, device=DEVICE)))
    refused("arrived is .*pass contiguous", arrived=step.now.new_zeros(7))
    refused("rotary is cos", rotary=(torch.ones(10, 9, device=DEVICE), torch.ones(10, 9, device=DEVICE)))
    wide = [torch.zeros(1, 1, n, 12, device=DEVICE) for n in (1, 1, 1, 4, 4)]
    rows = [torch.zeros(*n, dtype=torch.int32, device=DEVICE) for n in ((1,), (1, 4), (1,))]
    with pytest.raises(ValueError, match=r"from 16 to 256.*not 12.*reference"):
        decode_attention(*(x[:, :, 0] for x in wide[:3]), *wide[3:], *rows, scale=1.0, backend="triton")
    with pytest.raises(BackendError, match="cuda is unknown; choose auto, triton, reference".replace("cuda", "'cuda'")):
        step.run("cuda")
    with pytest.raises(ValueError, match=r"due is .*bool or int8"):
        compact(step.k[None], step.v[None], step.reach_end, step.length, step.length)
