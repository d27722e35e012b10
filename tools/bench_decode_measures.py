"""Which measures shorten a decode step at batch 1, where the weights alone take most of it.

    python tools/bench_decode_measures.py [--profile] [--out measures.json] [ROW ...]

One GPU with 40 GB or more. A row is ``as-is``, or measures joined by +:

no-reductions   products of one row as the library computes them, not as Inductor's reductions
no-activations  Inductor's own bound of what it computes anew for each row of a matrix
bookkeeping     what the end of a step does to the slots' tables, compiled
apart           queries, keys and values as three products, gate and up as two
combo           kernels that do not need each other's results in one launch, where Inductor finds such
combined        the last share of the decode kernel finishes its output
launch          the decode kernel cut as --launch says
independent     no kernel launched before the one before it has ended

Each is the step of tools/bench_decode.py (Llama-3-8B's shape, SepLLM n=256 or a bounded stream, one CUDA graph).
``off`` is how far its logits are from the first row's, the largest distance over the logits' deviation. ``copy ms`` is
what reading the weights once takes at the speed of memory, measured by a copy.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_decode import SEP, STREAM, filled, free, llama_8b, text, timed
from torch import Tensor

from megatron_sep.generate import decode
from megatron_sep.generate import slots as slots_module
from megatron_sep.generate import step as step_module
from megatron_sep.generate.products import part_products
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.sep_decode import triton as kernel
from megatron_sep.kernels.why_not import dependent_launches

LADDER = ("independent+apart", "apart", "as-is", "combined", "combo", "combined+combo", "as-is")
TUNING, APART = decode.OPTIONS
COMBO = "combo_kernels"
OPTIONS, CHOOSE = dict(decode.OPTIONS), kernel.choose_launch
ASKED: dict[str, Any] = {"dependent": None, "merged": True}
"""Of the compiled layers, and the first of the decoder, too."""


def without_measures(model: Any) -> None:
    """The program as it is."""
    part_products(model)
    decode.OPTIONS.clear()
    decode.OPTIONS |= OPTIONS
    kernel.choose_launch = CHOOSE
    ASKED.update(dependent=None, merged=True)
    for name in ("count_step", "evict"):
        setattr(slots_module, name, getattr(step_module, name))


def compile_bookkeeping() -> None:
    """What the end of a step does to the slots' tables."""
    for name in ("count_step", "evict"):
        setattr(slots_module, name, torch.compile(getattr(step_module, name), dynamic=False))


def launch_with(**changes: Any) -> None:
    """The decode kernel's launches, otherwise as they are chosen now."""
    chosen = kernel.choose_launch
    kernel.choose_launch = lambda *shape: chosen(*shape)._replace(**changes)


def measures(cut: list[int] | None) -> dict[str, Callable[[], Any]]:
    """What each does to the program."""
    return {
        "as-is": lambda: None,
        "no-reductions": lambda: decode.OPTIONS.update({TUNING: False}),
        "no-activations": lambda: decode.OPTIONS.update({APART: 8}),
        "bookkeeping": compile_bookkeeping,
        "apart": lambda: ASKED.update(merged=False),
        "combo": lambda: decode.OPTIONS.update({COMBO: True}),
        "combined": lambda: launch_with(last_combines=True),
        "launch": lambda: launch_with(**dict(zip(kernel.Launch._fields, cut or (), strict=False))),
        "independent": lambda: ASKED.update(dependent=False),
    }


def weights_gib(model: Any) -> float:
    """That a step reads: all but the embedding, of which it reads a row."""
    read = sum(p.numel() * p.element_size() for p in model.parameters()) - model.model.embed_tokens.weight.numel() * 2
    return float(read) / 2**30


def copy_ms(gib: float) -> float:
    """Milliseconds to read so much, by a copy of 4 GiB, which reads and writes them."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), 3, 20) / 8 * gib


def kernels(step: Any, times: int = 10) -> list[tuple[str, float, float]]:
    """Of a replayed step: name, microseconds, launches, the longest together first."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            step()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in profile.events():
        if str(event.device_type).endswith("CUDA"):
            spent[event.name[:90]] += event.device_time
            count[event.name[:90]] += 1
    return [(name, spent[name] / times, count[name] / times) for name, _ in spent.most_common(40)]


def measured(model: Any, policy: Any, context: int, profile: bool) -> tuple[dict[str, Any], Tensor]:
    """Of one policy: milliseconds a step, its kernels where they were asked for; and a replayed step's logits."""
    torch.manual_seed(0)
    decoder, ids = decode.Decoder(model, filled(model, policy, 1, context), dependent=ASKED["dependent"]), text(1, 1)
    logits_BV = [decoder.step(ids).float().clone() for _ in range(6)][-1]
    row: dict[str, Any] = {"ms": timed(lambda: decoder.step(ids), 6, 100)}
    if profile:
        row["kernels"] = kernels(lambda: decoder.step(ids))
        row["busy ms"] = sum(spent for _, spent, _ in row["kernels"]) / 1000
    return row, logits_BV


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", default=LADDER, help=f"by default {' '.join(LADDER)}")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--launch", type=int, nargs=4, metavar=("BLOCK", "SPLITS", "WARPS", "STAGES"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    known = measures(None)
    if unknown := {name for row in options.rows for name in row.split("+")} - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: no measure; choose from {', '.join(known)}")
    if (options.launch is None) == any("launch" in row.split("+") for row in options.rows):
        parser.error("the measure launch and the option --launch go together; pass both or neither")
    return options


def main() -> None:
    """See the top of the file."""
    options = parsed()
    model = llama_8b()
    gib = weights_gib(model)
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy ms": copy_ms(gib)}
    print(f"{found['gpu']}, torch {torch.__version__}: {gib:.2f} GiB of weights, read in {found['copy ms']:.2f} ms")
    found["dependent"] = dependent_launches(Call.on(model.device, model.dtype)) or "launches can be"
    print(f"dependent: {found['dependent']}")
    first: dict[str, Tensor] = {}
    apply = measures(options.launch)
    for number, rung in enumerate(options.rows):
        begun, again = time.perf_counter(), options.rows[:number].count(rung)
        without_measures(model)
        for name in rung.split("+"):
            apply[name]()
        torch.compiler.reset()
        decode.compile_layers(model, **ASKED)
        for name, policy in (("SepLLM n=256", SEP), ("stream 4,64,256,800", STREAM)):
            free()
            row, logits_BV = measured(model, policy, options.context, options.profile)
            expected_BV = first.setdefault(name, logits_BV)
            row["off"] = float((logits_BV - expected_BV).abs().max() / expected_BV.std())
            found[f"{rung}{' again' * again}: {name}"] = row
            print(f"{rung:34s} {name:20s} {row['ms']:.2f} ms, off {row['off']:.3f}", flush=True)
            for title, spent, count in row.get("kernels", ()):
                print(f"    {spent:9.1f} us {count:6.1f} x  {title}")
        print(f"    {time.perf_counter() - begun:.0f} s, compilation and all", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
