"""README.md of an export: what the model sees, how it was trained and measured, and how to run it."""

from typing import Any

from megatron_sep.train.written import read_jsonl
from megatron_sep.weights.open_source import OpenedSource
from megatron_sep.weights.sealed import describe

_MEASURED = {
    "valid/loss": "validation loss, nats a token",
    "valid/perplexity": "validation perplexity",
    "train/loss": "training loss, nats a token",
    "attention/visible": "share of the attention map that is visible",
}


def model_card(source: OpenedSource, rules: dict[str, Any], eod_id: int | None) -> str:
    """Markdown with the front matter of a model hub. ``rules`` are those of ``export_rules``."""
    config = source.config
    shape = (
        f"{config.num_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads, vocabulary "
        f"{source.vocab_size:,}, trained on sequences of {config.sequence_length:,} tokens."
    )
    parts = [_FRONT, "# A language model with Sep-Attention", shape, "## What a token sees", _pattern(rules)]
    end = "" if eod_id is None else f" Token {eod_id} ends a text."
    parts += ["## Measured", _measured(source), "## How to run it", _RUN + end]
    return "\n\n".join(parts) + "\n"


def _pattern(rules: dict[str, Any]) -> str:
    """The rule in words."""
    if rules["window"] is None:
        return "Every earlier token: full causal attention."
    seen = [f"the newest {rules['window']:,} tokens, itself included"]
    seen += [f"the first {rules['sinks']} tokens of the document"] if rules["sinks"] else []
    ids = ", ".join(map(str, rules["separator_ids"]))
    seen += [f"every separator, which are the tokens {ids}"] if ids else []
    seen += [f"every {rules['stride']}th token"] if rules["stride"] else []
    lines = ["A token sees, of those before it:", "", *(f"- {each}" for each in seen)]
    if rules["full_layers"]:
        lines += ["", f"Layers {', '.join(map(str, rules['full_layers']))} see every earlier token."]
    if rules["document_end"] is not None:
        lines += ["", f"Behind token {rules['document_end']}, which ends a document, nothing before it is seen."]
    return "\n".join(lines)


def _measured(source: OpenedSource) -> str:
    """The newest values that the run had logged when the checkpoint was written."""
    values = _logged(source) if source.own else {}
    rows = [f"| {text} | {values[name]:.4g} |" for name, text in _MEASURED.items() if name in values]
    if not rows:
        return "Nothing was logged beside the checkpoint that this was made from."
    return "\n".join(
        [f"By the run that trained it, up to step {values['step']:,.0f}:", "", "| | |", "|---|---|", *rows]
    )


def _logged(source: OpenedSource) -> dict[str, float]:
    log, step = source.place.parent.parent / "metrics.jsonl", describe(source.place).state.step
    lines = [line for line in read_jsonl(log) if line["step"] <= step] if log.is_file() else []
    return {name: value for line in lines for name, value in line.items()}


_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- sepllm
- sep-attention
---"""
_RUN = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("Once upon a time,", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

With `trust_remote_code` the files `modeling_sep.py`, `sep_cache.py` and `sep_pattern.py` of this directory compute what
the model was trained with, and the cache of `generate` keeps only what can still be seen. They need torch and
transformers 5. Without it transformers loads the same weights with full attention, which is not what they were
trained with.

Padding goes before a text, with an `attention_mask`. `attn_implementation` is `sdpa` or `eager`."""
