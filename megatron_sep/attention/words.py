"""Patterns in words: what a query sees, and in which layers."""

from itertools import groupby

from megatron_sep.attention.pattern import AttentionPattern

SHOWN_IDS = 20


def layer_lines(patterns: tuple[AttentionPattern, ...]) -> list[str]:
    """One line for each run of layers with the same pattern."""
    lines = []
    for pattern, group in groupby(enumerate(patterns), key=lambda item: item[1]):
        layers = [number for number, _ in group]
        name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        lines.append(f"{name}: {in_words(pattern)}")
    return lines


def in_words(pattern: AttentionPattern) -> str:
    """What a query sees under a pattern."""
    if pattern.window is None:
        return "every earlier token"
    seen = [f"the last {pattern.window} tokens"]
    if pattern.sinks:
        seen.append(f"the first {pattern.sinks}")
    if pattern.separator_ids:
        seen.append(f"every separator ({_ids_in_words(pattern.separator_ids)})")
    if pattern.stride:
        seen.append(f"every {pattern.stride}th token")
    return ", ".join(seen)


def _ids_in_words(ids: tuple[int, ...]) -> str:
    """All of a list that a reader takes in; of a longer one how many, and the first."""
    if len(ids) <= SHOWN_IDS:
        return f"ids {', '.join(map(str, ids))}"
    return f"{len(ids)} ids: {', '.join(map(str, ids[:SHOWN_IDS]))} ..."
