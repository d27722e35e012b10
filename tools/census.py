"""Which causal architectures of the installed transformers run under a cache of this program, as a table.

    python tools/census.py [--only NAME ...] [--write docs/inference.md]     two minutes on one core

Each is built from a tiny configuration with random weights. What its own eager attention gives under the pattern's
mask, with all of a text at once and no cache, is held against the same text through ``attach``: whole, in chunks, token
by token, in a batch padded on the left, and as ``generate`` goes on with it.
"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.errors import UserError
from megatron_sep.generate.architecture import cache_name
from megatron_sep.generate.attach import attach

EXACT, REFUSED, UNVERIFIED, WRONG, CRASHES = "exact", "refused", "not verified", "wrong", "crashes"
BEGIN, END = "<!-- table of tools/census.py -->", "<!-- end of the table -->"
SEP = AttentionPattern(window=5, sinks=2, separator_ids=(5, 9, 20))
FULL = AttentionPattern()
TOKENS, PROMPT = 24, 14
TOLERANCE = 1e-4
"""Of the largest logit. A softmax in fp32 inside of a model in fp64 stays far below it, another mask far above."""


@dataclass(frozen=True)
class Finding:
    """What became of an architecture."""

    architecture: str
    verdict: str
    why: str = ""

    def row(self) -> str:
        """Of the table."""
        return f"| {self.architecture} | {self.verdict} | {self.why} |"


class Undecidable(Exception):  # noqa: N818
    """A model that gives nothing to compare with."""


def examine(architecture: str) -> Finding:
    """Build an architecture and compare."""
    try:
        model = tiny_model(architecture)
    except Exception as error:
        return Finding(architecture, UNVERIFIED, f"no tiny model: {_first_line(error)}")
    try:
        attach(model, SEP).detach()
    except UserError as error:
        return Finding(architecture, REFUSED, _reason(error))
    try:
        return _compared(architecture, model)
    except Undecidable as error:
        return Finding(architecture, UNVERIFIED, str(error))
    except UserError as error:
        return Finding(architecture, REFUSED, _reason(error))
    except Exception as error:
        return Finding(architecture, CRASHES, _first_line(error))


@torch.no_grad()
def _compared(architecture: str, model: Any) -> Finding:
    model = _in_fp64(model)
    ids = some_ids()
    whole, masked = expected(model, ids, FULL), expected(model, ids, SEP)
    scale = float(masked.abs().max())
    if _apart(whole, masked) < 100 * TOLERANCE * scale:
        raise Undecidable("its logits hardly depend on what is seen")
    wrong = [name for name, check in CHECKS.items() if not check(model, ids, masked, TOLERANCE * scale)]
    return Finding(architecture, WRONG, ", ".join(wrong)) if wrong else Finding(architecture, EXACT)


def some_ids() -> Tensor:
    """Two texts with separators in them."""
    return torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def _in_fp64(model: Any) -> Any:
    """Where its own code computes in it; else as it is."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            kept = parameter.clone() if parameter.dim() == 1 else 0  # norms and biases, which often begin at 0 or 1
            nn.init.normal_(parameter, std=0.3).add_(kept)
    try:
        model.double()(some_ids(), use_cache=False)
    except RuntimeError:
        return model.float()
    return model


_MASK: ContextVar[Tensor] = ContextVar("mask")
"""What a query sees of a key, bool [B, T, T], beside what the model's own mask says."""
_CALLS: Counter[int] = Counter()


def _eager_under_a_mask(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The eager attention of the module's own file, which sees less."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise Undecidable("its file has no eager attention")
    tokens = query.shape[2]
    if attention_mask is None or attention_mask.shape[-2:] != (tokens, tokens):
        raise Undecidable(f"its attention gets a mask of {None if attention_mask is None else attention_mask.shape}")
    _CALLS[getattr(module, "layer_idx", -1)] += 1
    mask = attention_mask.masked_fill(~_MASK.get()[:, None], torch.finfo(attention_mask.dtype).min)
    return eager(module, query, key, value, attention_mask=mask, **kwargs)


def expected(model: Any, ids: Tensor, pattern: AttentionPattern) -> Tensor:
    """Logits of the whole texts under a pattern, by transformers alone. Raises Undecidable where it cannot say."""
    seen = pattern.plan(ids).dense()
    _MASK.set(seen)
    _CALLS.clear()
    with _implementation(model, "census"):
        found: Tensor = model(ids, use_cache=False).logits
    if not _CALLS:  # attention of its own, which takes a mask as it is
        added = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        with _implementation(model, "eager"):
            found = model(ids, attention_mask=added[:, None], use_cache=False).logits
    if pattern == FULL:
        with _implementation(model, "eager"):
            own = model(ids, use_cache=False).logits
        if _apart(found, own) > TOLERANCE * float(own.abs().max()):
            raise Undecidable("its own attention is another one than that of its file")
    return found


@contextmanager
def _implementation(model: Any, name: str) -> Iterator[None]:
    configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    former = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, each in zip(configs, former, strict=True):
            config._attn_implementation = each


def _apart(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).abs().max())


def _whole(model: Any, ids: Tensor, masked: Tensor, tolerance: float) -> bool:
    with attached(model):
        return _apart(model(ids).logits, masked) < tolerance


def _in_parts(sizes: list[int]) -> Callable[[Any, Tensor, Tensor, float], bool]:
    def check(model: Any, ids: Tensor, masked: Tensor, tolerance: float) -> bool:
        with attached(model) as attachment:
            cache = attachment.new_cache()
            parts = [model(part, **{cache_name(model): cache}).logits for part in torch.split(ids, sizes, dim=1)]
        return _apart(torch.cat(parts, 1), masked) < tolerance

    return check


def _padded(model: Any, ids: Tensor, masked: Tensor, tolerance: float) -> bool:
    """The first text behind six columns of padding beside the second one."""
    short = ids[:1, : TOKENS - 6]
    rows = torch.cat([torch.cat([torch.full((1, 6), 3), short], 1), ids[1:]])
    real = torch.ones_like(rows)
    real[0, :6] = 0
    with attached(model):
        found = model(rows, attention_mask=real).logits
    return max(_apart(found[:1, 6:], masked[:1, : TOKENS - 6]), _apart(found[1:], masked[1:])) < tolerance


def _generated(model: Any, ids: Tensor, _: Tensor, tolerance: float) -> bool:
    """Greedily from a prompt: each token that it added is the likeliest one under the mask."""
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": TOKENS - PROMPT, "do_sample": False, "pad_token_id": 0}
    with attached(model):
        made = model.generate(ids[:, :PROMPT], **options)
    logits = expected(model, made, SEP)[:, PROMPT - 1 : -1]
    chosen = logits.gather(2, made[:, PROMPT:, None])[..., 0]
    return made.shape[1] == TOKENS and float((logits.amax(-1) - chosen).max()) < tolerance


@contextmanager
def attached(model: Any) -> Iterator[Any]:
    """Under the pattern, and as it was afterwards."""
    attachment = attach(model, SEP)
    try:
        yield attachment
    finally:
        attachment.detach()


CHECKS: dict[str, Callable[[Any, Tensor, Tensor, float], bool]] = {
    "whole": _whole,
    "chunks": _in_parts([7, 1, 9, 1, 6]),
    "token by token": _in_parts([1] * TOKENS),
    "padded": _padded,
    "generate": _generated,
}


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return text.split("ValueError: ")[-1].split(" but it was not found")[0][:100]


def _reason(error: Exception) -> str:
    """Of a refusal, without the name of the model that it begins with and the way out that it ends with."""
    text = " ".join(str(error).split()).replace("|", "/")
    return text.split(": ", 1)[-1].split(";")[0]


def table(findings: list[Finding]) -> str:
    """With a sum of the verdicts above it."""
    counts = Counter(finding.verdict for finding in findings)
    sums = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (EXACT, REFUSED, UNVERIFIED, WRONG, CRASHES))
    head = f"transformers {transformers.__version__}, {len(findings)} causal architectures: {sums}."
    rows = [finding.row() for finding in findings]
    return "\n".join([head, "", "| architecture | verdict | why |", "|---|---|---|", *rows])


def census(names: list[str] | None = None) -> list[Finding]:
    """Of these architectures, or of all."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    AttentionInterface.register("census", _eager_under_a_mask)
    AttentionMaskInterface.register("census", eager_mask)
    return [examine(name) for name in sorted(names or ARCHITECTURES)]


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--write", type=Path, help="page to put the table into, between its two marks")
    options = parser.parse_args()
    made = table(census(options.only))
    if options.write is None:
        print(made)
        return
    before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    options.write.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
