"""`generate --prompts FILE --out FILE`: all prompts of a file, their results as JSON lines, and a line of figures."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sep.generate.many import Many, Result
from megatron_sep.generate.results import ResultsFile, read_many
from megatron_sep.generate.sampler import Sampling
from megatron_sep.generate.session import SessionError, open_session


def continue_file(
    checkpoint: Path,
    prompts: Path | None,
    out: Path,
    other: Sequence[str],
    rows: int,
    sampling: Sampling,
    options: dict[str, Any],
) -> str:
    """Continue what has no result in ``out`` yet; ``options`` are those of ``open_session``. Returns a line of figures.

    Raises SessionError, ResultsError, and what opening the model raises.
    """
    if prompts is None or other:
        raise SessionError(f"--out {out}: takes the prompts of a file; pass --prompts FILE and no --prompt")
    texts = read_many(prompts)
    session = open_session(checkpoint, **options)
    settings = {"model": str(checkpoint)} | asdict(sampling)
    settings |= {name: None if value is None else str(value) for name, value in options.items()}
    with ResultsFile(out, texts, settings) as results:
        before, begun = results.done, time.perf_counter()
        loaded = session.loaded
        many = Many(session.attachment, loaded.model, loaded.tokenizer, sampling, min(rows, len(texts)))
        made = list(results.write(many.run(results.left())))
    return figures(made, before, time.perf_counter() - begun, many.peak_bytes)


def figures(made: Sequence[Result], before: int, seconds: float, peak_bytes: int) -> str:
    """What was made in so many seconds, beside ``before`` results that were there."""
    there = f" beside {before:,} that were there" if before else ""
    if not made:
        return f"0 prompts{there}"
    tokens, firsts = sum(result.tokens for result in made), [result.first_token_s for result in made]
    slowest = statistics.quantiles(firsts, n=20)[-1] if len(firsts) > 1 else firsts[0]
    return (
        f"{len(made):,} prompts{there}: {tokens:,} tokens in {seconds:,.1f} s, {tokens / seconds:,.1f} a second; first "
        f"token after {statistics.median(firsts):.3f} s (median), {slowest:.3f} s (95 %); cache "
        f"{peak_bytes / 2**20:,.1f} MiB at most"
    )
