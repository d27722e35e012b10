"""Recomputes what a run logged, from its newest checkpoint, its data and brute force, and holds both side by side.

    python tools/recompute_run.py runs/quickstart

The validation loss (and, where the step after the checkpoint has a line of its own, that training loss) comes from
transformers' model under a mask that is made pair by pair; visible pairs, separators, operations, learning rate and
consumed sequences are counted here anew. Nothing of the trainer, of the attention's rule or of the kernels is used:
only the order of the samples and the reading of weights are the program's. Made for small runs: work grows with the
square of the sequence length. Exit code 1 where a number is not the one that was logged.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer as Library
from torch import Tensor

from megatron_sep.config.schema import RunConfig
from megatron_sep.convert.as_transformers import as_transformers
from megatron_sep.data.open_data import open_data
from megatron_sep.data.samples import Samples
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.weights.open_source import open_source

NINE = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
"""Relative, by the precision of the training."""
EXACT = 1e-9

Line = dict[str, float]


@dataclass(frozen=True)
class Compared:
    """One number of a line."""

    name: str
    logged: float
    found: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return math.isclose(self.logged, self.found, rel_tol=self.tolerance)

    def __str__(self) -> str:
        mark = "" if self.agrees else "   <-- differs"
        return f"{self.name:34} {self.logged:>22.10g} {self.found:>22.10g}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="dir of a run")
    run = parser.parse_args().run
    checkpoint = sorted((run / "checkpoints").glob("step-????????"))[-1]
    described = json.loads((checkpoint / "manifest.json").read_text())["description"]
    rows = list(compare(run, checkpoint, described))
    print(f"{checkpoint}\n{'':34} {'logged':>22} {'recomputed':>22}", *rows, sep="\n")
    sys.exit(0 if all(row.agrees for row in rows) else 1)


def compare(run: Path, checkpoint: Path, described: dict[str, Any]) -> Iterator[Compared]:
    """Every number that the checkpoint and the data determine."""
    config, step = RunConfig.model_validate(described["config"]), described["state"]["step"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "train/lr" in line and line["step"] <= step]
    last = training[-1]
    if last["step"] != step:
        raise SystemExit(f"{run}: no training line of step {step}; set metrics.every to a divisor of checkpoint.every")
    before = training[-2]["step"] if len(training) > 1 else config.checkpoint.init_step
    yield Compared("train/lr", last["train/lr"], learning_rate(config, step), EXACT)
    yield Compared("train/consumed", last["train/consumed"], config.train.global_batch_size * step, EXACT)
    yield from sparsity(config, described["vocab_size"], last, before)
    yield from losses(config, checkpoint, lines, step)


def learning_rate(config: RunConfig, step: int) -> float:
    """Warm-up, then cosine, linear or constant."""
    optimizer = config.optimizer
    end = optimizer.decay_steps or config.train.steps
    warm = optimizer.warmup * end
    if step < warm:
        return optimizer.lr * step / warm
    done = min(1.0, (step - warm) / (end - warm)) if end > warm else 1.0
    share = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[optimizer.decay]
    return optimizer.min_lr + share * (optimizer.lr - optimizer.min_lr)


def sparsity(config: RunConfig, vocab_size: int, line: Line, before: float) -> Iterator[Compared]:
    """Visible share, separators and operations of the steps since the line before."""
    size, length = config.train.global_batch_size, config.model.sequence_length
    steps = range(int(before), int(line["step"]))
    ids = rows_of(samples_of(config, "train"), range(steps.start * size, steps.stop * size))[:, :-1]
    separators = separator_ids(config)
    triangle = length * (length + 1) // 2
    pairs = sum(int(mask(row, config, layer).sum()) for row in ids for layer in range(config.model.num_layers))
    whole = len(ids) * triangle * config.model.num_layers
    yield Compared("attention/visible", line["attention/visible"], pairs / whole, EXACT)
    density = float(np.isin(ids, separators).mean())
    yield Compared("attention/separator_density", line["attention/separator_density"], density, EXACT)
    logged = line["speed/model_flops"] * line["speed/step_seconds"] * len(steps)
    yield Compared("operations since the last line", logged, operations(config, vocab_size, ids.size, pairs), 1e-6)
    tokens = line["speed/tokens_per_second"] * line["speed/step_seconds"] * len(steps)
    yield Compared("tokens since the last line", tokens, ids.size, 1e-6)


def operations(config: RunConfig, vocab_size: int, tokens: int, pairs: int) -> float:
    """Two for each multiply-add; three passes: one forward, and twice as much backward."""
    h, heads, model = config.model.hidden_size, config.model.num_attention_heads, config.model
    head = h // heads
    qkv = h * (heads + 2 * (model.num_key_value_heads or heads)) * head
    inner = model.ffn_hidden_size or 4 * h
    mlp = h * inner * (3 if model.activation == "swiglu" else 2)
    matrices = model.num_layers * (qkv + h * heads * head + mlp) + vocab_size * h
    return 3.0 * (2 * tokens * matrices + pairs * heads * (2 * head + 2 * head))


def losses(config: RunConfig, checkpoint: Path, lines: Sequence[Line], step: int) -> Iterator[Compared]:
    """Of the validation after the step, and of the training step that follows it."""
    tolerance = LOSS_TOLERANCE[config.train.precision]
    model = as_transformers(open_source(checkpoint), torch.device("cpu"), torch.float32)
    size = config.train.global_batch_size
    for line in lines:
        if line["step"] == step and "valid/loss" in line:
            samples = samples_of(config, "valid")
            count = min(config.train.eval_batches * size, samples.num_samples)
            found = mean_loss(model, rows_of(samples, range(count)), config)
            yield Compared("valid/loss", line["valid/loss"], found, tolerance)
            yield Compared("valid/perplexity", line["valid/perplexity"], math.exp(found), 10 * tolerance)
        if line["step"] == step + 1 and "train/loss_last" in line:
            rows = rows_of(samples_of(config, "train"), range(step * size, (step + 1) * size))
            yield Compared(
                "train/loss_last of the next step", line["train/loss_last"], mean_loss(model, rows, config), tolerance
            )


@torch.no_grad()
def mean_loss(model: Any, rows: npt.NDArray[np.int64], config: RunConfig) -> float:
    """Nats per token of rows of T + 1 tokens, each layer under its own mask."""
    masks: list[Tensor] = []
    for number, layer in enumerate(model.base_model.layers):
        layer.register_forward_pre_hook(_Masked(masks, number), with_kwargs=True)
    total = 0.0
    for row in rows:
        seen = [torch.from_numpy(mask(row[:-1], config, layer)) for layer in range(config.model.num_layers)]
        masks[:] = [torch.where(m[None, None], 0.0, -torch.inf) for m in seen]
        logits = model(torch.from_numpy(row[None, :-1]), use_cache=False).logits[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(row[1:])))
    for layer in model.base_model.layers:
        layer._forward_pre_hooks.clear()
    return total / len(rows)


class _Masked:
    """Puts a layer's own mask in the place of the causal one."""

    def __init__(self, masks: list[Tensor], number: int) -> None:
        self.masks, self.number = masks, number

    def __call__(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": self.masks[self.number]}


def mask(row: npt.NDArray[np.int64], config: RunConfig, layer: int) -> npt.NDArray[np.bool_]:
    """Which keys each query of a row sees in a layer, said once more in the paper's words: bool [T, T]."""
    attention, length = config.attention, len(row)
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    start = np.zeros(length, np.int64)
    if attention.document_boundaries:
        for position in range(1, length):
            new = row[position - 1] == end_of_document(config)
            start[position] = position if new else start[position - 1]
    full: npt.NDArray[np.bool_] = (key <= query) & (start[:, None] == start[None, :])
    if layer in {number % config.model.num_layers for number in attention.full_layers} or attention.window is None:
        return full
    place = np.arange(length) - start
    kept = (place < attention.sinks) | np.isin(row, separator_ids(config))
    if attention.stride:
        kept |= (place >= attention.sinks) & ((place - attention.sinks + 1) % attention.stride == 0)
    sparse: npt.NDArray[np.bool_] = full & ((query - key < attention.window) | kept[None, :])
    return sparse


def separator_ids(config: RunConfig) -> list[int]:
    """The ids of the separators, from the tokenizer's library itself. Raises SystemExit for merged ones and lists."""
    library = Library.from_file(str(config.tokenizer.path))
    chosen = NINE if config.attention.separators == "default" else config.attention.separators
    if not isinstance(chosen, tuple):
        raise SystemExit(f"attention.separators={chosen}: this tool knows default, texts and attention.separator_ids")
    texts = [library.encode(text, add_special_tokens=False).ids for text in chosen]
    return [*(ids[0] for ids in texts), *config.attention.separator_ids]


def end_of_document(config: RunConfig) -> int:
    return load_tokenizer(config.tokenizer.path, config.tokenizer.eod).eod_id


def samples_of(config: RunConfig, split: Any) -> Samples:
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eod)
    count = config.train.steps if split == "train" else config.train.eval_batches
    length = config.model.sequence_length
    return open_data(config.data, split, length, tokenizer, count * config.train.global_batch_size)


def rows_of(samples: Samples, numbers: range) -> npt.NDArray[np.int64]:
    return samples.take(numbers.start, len(numbers)).ids


if __name__ == "__main__":
    main()
