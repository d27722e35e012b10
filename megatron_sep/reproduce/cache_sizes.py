"""Mean sizes of the bounded cache (equation 4; r.KV of Tables 5 to 8 and 11 to 13), counted by the cache itself."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.layout import Layout
from megatron_sep.generate.slots import Slots
from megatron_sep.reproduce.item import Inputs, Make, Result, Row, Table

DENSITY = 0.115
"""Of separators in the Pile, which Table 3 implies."""
_SEPARATOR = 1
_PERIODS = 12
"""Times that the cache fills up while it is measured."""


def stream(tokens: int, density: float = DENSITY, seed: int = 0) -> Tensor:
    """Ids of a text, int64 [1, tokens]: 1 is a separator, 0 is not."""
    drawn = torch.rand(1, tokens, generator=torch.Generator().manual_seed(seed))
    return (drawn < density).long()


def sep(sinks: int, separators: int, window: int, capacity: int) -> StreamingPattern:
    """SepLLM's cache as the paper writes it: a, s, w, c."""
    return StreamingPattern(sinks, separators, window, capacity, (_SEPARATOR,))


@lru_cache(maxsize=64)
def mean_size(policy: StreamingPattern) -> float:
    """Tokens that a new token finds in the cache, once there are separators enough to fill their block."""
    assert policy.capacity is not None
    kept = policy.sinks + (policy.separators or 0) + policy.window
    ramp = int(2 * policy.capacity + 1.5 * (policy.separators or 0) / DENSITY)
    ids = stream(ramp + _PERIODS * (policy.capacity - kept))
    slots = Slots([policy], 1, 1, ids.device)
    _read(slots, ids[:, :ramp])
    before, seen = int(slots.live_R[0]), int(slots.seen_R[0])
    _read(slots, ids[:, ramp:])
    return (int(slots.live_R[0]) - before) / (int(slots.seen_R[0]) - seen) - 1  # a token sees itself too


def _read(slots: Slots, ids_1T: Tensor) -> None:
    slots.begin(ids_1T, Layout())
    slots.end()


def mean_size_of_everything(tokens: int) -> float:
    """The same where nothing ever leaves, over a text of so many tokens."""
    return float(AttentionPattern().plan(stream(tokens)).num_visible().double().mean()) - 1


_HALF = "half a token: an eviction comes when the cache holds c tokens, so a new one never finds c"
_FORMULA = "the paper prints (a + s + w + c) / 2"
Size = tuple[str, StreamingPattern, float]
"""Name, cache and the paper's r.KV."""


def sized(sizes: Sequence[Size], full: Sequence[tuple[str, int, float]] = ()) -> Make:
    """Makes the r.KV of a table: of caches, and of full attention by its tokens."""

    def make(inputs: Inputs) -> Result:
        del inputs
        rows = [
            Row(name, mean_size(policy), paper, _HALF if policy.separators else "always full")
            for name, policy, paper in sizes
        ]
        rows += [Row(name, mean_size_of_everything(tokens), paper, "T / 2") for name, tokens, paper in full]
        formula = tuple(
            Row(name, policy.mean_size, paper, _FORMULA) for name, policy, paper in sizes if policy.separators
        )
        return Result(
            (
                Table("r.KV: mean tokens in the cache, counted", tuple(rows), 1),
                *([Table("The same by equation 4", formula, 1)] if formula else []),
            ),
            ("r.KV is no result of the models: it follows from a, s, w and c alone.",),
        )

    return make


def _strm(capacity: int, sinks: int = 4) -> Size:
    name = f"StrmLLM c={capacity}" + ("" if sinks else ", no first tokens")
    return name, StreamingPattern.streaming_llm(sinks, capacity - sinks), float(capacity)


def _sep(sinks: int, separators: int, window: int, capacity: int, paper: float, name: str = "SepLLM") -> Size:
    return (
        f"{name} a={sinks} s={separators} w={window} c={capacity}", sep(sinks, separators, window, capacity), paper,
    )  # fmt: skip


_USUAL = _sep(4, 64, 256, 800, 562)
TABLE_5 = sized([_strm(800), _USUAL], [("Vanilla, 20K", 20_000, 10_000), ("Vanilla, 64K", 64_000, 32_000)])
TABLE_6 = sized([_sep(4, 32, 224, 324, 292), _sep(4, 48, 224, 324, 300), _sep(4, 64, 224, 324, 308)])
TABLE_7 = sized(
    [
        *map(_strm, (324, 516, 800)),
        _sep(4, 64, 224, 324, 308),
        _sep(4, 64, 320, 516, 452),
        _sep(4, 64, 512, 800, 690),
    ]
)
TABLE_8 = sized([_strm(324), _strm(324, 0), _sep(4, 32, 224, 324, 292), _sep(0, 32, 224, 324, 290)])
TABLE_11 = sized([_strm(800), _USUAL], [("Vanilla, 64K", 64_000, 32_000)])
TABLE_12 = sized([_USUAL, _sep(4, 64, 800, 1024, 946), _sep(4, 64, 928, 1280, 1138)])
TABLE_13 = sized([*map(_strm, (1024, 800)), _sep(4, 64, 720, 1024, 906), _sep(4, 64, 512, 800, 690)])
