"""Which files make a tokenizer."""

from pathlib import Path

_VOCAB, _MERGES = "vocab.json", "merges.txt"


def merge_files(vocab: Path) -> tuple[Path, ...]:
    """Where the merges of a GPT-2 vocabulary may lie: gpt2-merges.txt beside gpt2-vocab.json, or merges.txt."""
    named = [f"{vocab.name.removesuffix(_VOCAB)}{_MERGES}"] if vocab.name.endswith(_VOCAB) else []
    return tuple(vocab.with_name(name) for name in dict.fromkeys([*named, _MERGES]))
