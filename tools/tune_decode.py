"""Which launch of the decode kernel is fastest at batch 1, at the slots that bench_decode.py's two policies have.

    python tools/tune_decode.py [--seconds 60] [--out tuned.json]     one GPU

Times 32 layers of Llama-3-8B's shape (32 query heads on 8 key heads of 128, bf16) in one CUDA graph, each layer with a
cache of its own, so that nothing is left in the GPU's cache. One choice after another is varied, the best kept, twice
around or until the seconds of a policy are over. Microseconds are of one layer, launched after the one before it;
``--dependent``: while that one still ends.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_decode import timed
from torch import Tensor
from triton.runtime.errors import OutOfResources

from megatron_sep.generate.dependent import chosen as chosen_launches
from megatron_sep.kernels.sep_decode import decode_attention
from megatron_sep.kernels.sep_decode import triton as kernel
from megatron_sep.kernels.sep_decode.triton import Launch

LAYERS, HEADS, KEY_HEADS, SIZE = 32, 32, 8, 128
CASES = {"SepLLM n=256": (4_608, 4_043, False), "stream 4,64,256,800": (800, 799, True)}
"""Slots, those in use, whether keys turn as they are read."""
SPLITS, BLOCKS, WARPS, STAGES = (8, 12, 16, 24, 32), (16, 32, 64), (2, 4, 8), (2, 3, 4)


def steps(slots: int, used: int, turns: bool, dependent: bool) -> Callable[[], list[Tensor]]:
    """Attention of all layers, one after another."""
    keys, values = torch.randn(2, LAYERS, 1, KEY_HEADS, slots, SIZE, dtype=torch.bfloat16, device="cuda")
    q, k, v = (torch.randn(1, n, SIZE, dtype=torch.bfloat16, device="cuda") for n in (HEADS, KEY_HEADS, KEY_HEADS))
    length, now = (torch.full((1,), n, dtype=torch.int32, device="cuda") for n in (used, 0))
    reach_end = torch.ones(1, slots, dtype=torch.int32, device="cuda")
    angle = torch.rand(slots, SIZE // 2, device="cuda")
    arrived = torch.zeros(1, KEY_HEADS, dtype=torch.int32, device="cuda")
    options: Any = {"scale": SIZE**-0.5, "rotary": (angle.cos(), angle.sin()) if turns else None}
    options |= {"arrived_BK": arrived, "dependent": dependent, "backend": "triton"}
    return lambda: [
        decode_attention(q, k, v, keys[layer], values[layer], length, reach_end, now, **options)
        for layer in range(LAYERS)
    ]


def microseconds(layers: Callable[[], list[Tensor]], expected: Tensor | None) -> tuple[float, Tensor]:
    """Of one layer of a replayed graph, and the last one's output. Raises OutOfResources, or if the output is off."""
    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layers()
    spent = timed(graph.replay, 5, 30) * 1000 / LAYERS
    if expected is not None:
        torch.testing.assert_close(outputs[-1], expected, rtol=2e-2, atol=2e-3)
    return spent, outputs[-1].clone()


def choices() -> list[list[dict[str, Any]]]:
    """What is varied together, and all that it can be."""
    return [
        [{"splits": splits, "last_combines": last} for splits, last in product(SPLITS, (False, True))],
        [{"block": block, "warps": warps} for block, warps in product(BLOCKS, WARPS)],
        [{"stages": stages} for stages in STAGES],
    ]


def tuned(layers: Callable[[], list[Tensor]], chosen: Launch, seconds: float) -> dict[Launch, float]:
    """Microseconds of all launches that were tried, the fastest first."""
    kernel.choose_launch = lambda *_: chosen
    spent, expected = microseconds(layers, None)
    found, best, end = {chosen: spent}, chosen, time.monotonic() + seconds
    for changes in 2 * choices():
        for launch in [tried for change in changes if (tried := best._replace(**change)) not in found]:
            if time.monotonic() > end:
                break
            kernel.choose_launch = lambda *_, x=launch: x
            try:
                found[launch] = microseconds(layers, expected)[0]
            except OutOfResources:
                found[launch] = float("inf")
        best = min(found, key=found.__getitem__)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of each policy")
    parser.add_argument("--dependent", action="store_true", help="launch each layer while the one before it still ends")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    dependent = chosen_launches(torch.device("cuda"), options.dependent)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {'' if dependent else 'in'}dependent launches")
    report, choose = {}, kernel.choose_launch
    for name, (slots, used, turns) in CASES.items():
        chosen = choose(KEY_HEADS, HEADS // KEY_HEADS, slots, SIZE, 2, turns, processors)
        found = tuned(steps(slots, used, turns, dependent), chosen, options.seconds)
        print(f"{name}, {used} slots: {found[chosen]:.2f} us as chosen, {chosen}; the best of {len(found)}:")
        for launch, spent in list(found.items())[:6]:
            print(f"    {spent:6.2f} us  {launch}", flush=True)
        report[name] = [launch._asdict() | {"us": spent} for launch, spent in found.items()]
        torch.cuda.empty_cache()
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
