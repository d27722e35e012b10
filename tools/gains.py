"""What Sep-Attention gains on this machine, in three lines: training, cache and decoding, beside full attention.

    python tools/gains.py RUN FULL [--texts 64] [--tokens 32]

RUN is a trained SepLLM, FULL a run of the same model with full attention, of which the speed alone is read; both were
trained on this machine. Cache and decoding are those of RUN's own weights on rows of its data, as long as in training,
once with the cache of its pattern and once with all keys kept.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config import load_config
from megatron_sep.data.open_data import open_data
from megatron_sep.errors import SepError, UserError
from megatron_sep.generate.attach import attach
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.decode import Decoder, compile_layers
from megatron_sep.generate.load import Loaded, load
from megatron_sep.parallel.device import current_device
from megatron_sep.train.written import METRICS, SETTINGS, read_jsonl

WARM_UP = 4
"""Steps before those that are timed: a graph is captured in them."""


class GainsError(UserError):
    """Runs that cannot be compared."""


class Decoded(NamedTuple):
    """Of texts that went on after a prompt."""

    mebibytes: float
    """Keys and values of a text that are kept."""
    milliseconds: float
    """Of a step, one token of each text; median."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("full", type=Path)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="steps that are timed")
    options = parser.parse_args()
    try:
        for line in gains(options.run, options.full, options.texts, options.tokens):
            print(line, flush=True)
    except SepError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


def gains(run: Path, full: Path, texts: int, tokens: int) -> list[str]:
    """The three lines. Raises GainsError and what opening the run raises."""
    own, theirs = (tokens_per_second(each) for each in (run, full))
    loaded, ids_BT = load(run, current_device()), rows_of(run, texts)
    if ids_BT.shape[1] <= tokens + WARM_UP:
        raise GainsError(f"--tokens {tokens}: a text of {run} has {ids_BT.shape[1]}; time fewer steps")
    if ids_BT.device.type == "cuda":
        compile_layers(loaded.model)
    small, whole = (decoded(loaded, policies, ids_BT, tokens) for policies in (None, AttentionPattern()))
    length = ids_BT.shape[1]
    return [
        f"training: {own:,.0f} tokens/s, {own / theirs:.2f} times full attention's {theirs:,.0f}",
        f"cache: {small.mebibytes:.2f} MiB a text of {length:,} tokens, "
        f"1/{whole.mebibytes / small.mebibytes:.1f} of the full {whole.mebibytes:.2f}",
        f"decoding {texts} texts: {small.milliseconds:.2f} ms a step, {whole.milliseconds / small.milliseconds:.2f} "
        f"times as fast as the full cache's {whole.milliseconds:.2f}",
    ]


def tokens_per_second(run: Path) -> float:
    """Median of the later half of a run's lines. Raises GainsError."""
    rates = [line["speed/tokens_per_second"] for line in read_jsonl(run / METRICS) if "speed/tokens_per_second" in line]
    if not rates:
        raise GainsError(f"{run / METRICS}: tells no speed; name the dir of a run that has trained")
    return statistics.median(rates[len(rates) // 2 :])


def rows_of(run: Path, count: int) -> Tensor:
    """The first rows of a run's training data, [count, T], on the device."""
    config = load_config(run / SETTINGS)
    tokenizer = load(run, torch.device("cpu")).tokenizer
    samples = open_data(config.data, "train", config.model.sequence_length, tokenizer, count)
    return torch.from_numpy(samples.take(0, count).ids[:, :-1]).to(current_device())


def decoded(loaded: Loaded, policy: Any, ids_BT: Tensor, tokens: int) -> Decoded:
    """The last ``tokens`` of the rows one by one, after the others; ``policy``: None is the model's own pattern."""
    rules = loaded.rules()
    attachment = attach(loaded.model, policy or list(rules.patterns), document_end=rules.document_end)
    try:
        cache = attachment.new_cache()
        decoder, first = Decoder(loaded.model, cache), ids_BT.shape[1] - tokens - WARM_UP
        decoder.read(ids_BT[:, :first])
        times = [timed(decoder, ids_BT[:, place : place + 1]) for place in range(first, ids_BT.shape[1])]
        return Decoded(mebibytes_of(cache, loaded.model), statistics.median(times[WARM_UP:]))
    finally:
        attachment.detach()


def mebibytes_of(cache: SepCache, model: Any) -> float:
    """What a text's kept keys and values take, in the mean; room for more is not counted."""
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    size = model.config.hidden_size // model.config.num_attention_heads
    slots = sum(layers * sum(blocks.values()) for layers, blocks in cache.blocks())
    return float(slots * 2 * heads * size * model.dtype.itemsize / 2**20)


def timed(decoder: Decoder, ids_B1: Tensor) -> float:
    """Milliseconds of a step."""
    start = time.perf_counter()
    decoder.step(ids_B1)
    if ids_B1.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
