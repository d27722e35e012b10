"""How many (query, key) pairs a pattern leaves visible when only the share of separators is known; torch-free.

What a batch really leaves is counted by ``attention/pattern.py``; this is its mean over texts whose separators fall
independently of each other.
"""

from megatron_sep.config.schema import AttentionConfig


def all_pairs(length: int) -> float:
    """Under causal attention: of a sequence of so many tokens, a query with itself included."""
    return length * (length + 1) / 2


def landmark_share(attention: AttentionConfig, separator_share: float) -> float:
    """Of the tokens after the sinks, those that stay visible for good."""
    separators = separator_share if attention.separators or attention.separator_ids else 0.0
    strided = 1 / attention.stride if attention.stride else 0.0
    return 1 - (1 - separators) * (1 - strided)


def visible_pairs(attention: AttentionConfig, length: int, separator_share: float) -> float:
    """Of one layer with the pattern, for a sequence that is one document; a run that anneals ends with it."""
    if attention.window is None or attention.window >= length:
        return all_pairs(length)
    window, old = attention.window, length - attention.window
    sinks = min(attention.sinks, old)
    of_sinks = all_pairs(sinks) + sinks * (old - sinks)
    near = all_pairs(window) + window * old
    return near + of_sinks + landmark_share(attention, separator_share) * (all_pairs(old) - of_sinks)


def kept_tokens(attention: AttentionConfig, length: int, separator_share: float) -> float:
    """Tokens that a cache keeps of a text of so many, in a layer with the pattern."""
    if attention.window is None or attention.window >= length:
        return length
    old = length - attention.window
    sinks = min(attention.sinks, old)
    return attention.window + sinks + landmark_share(attention, separator_share) * (old - sinks)


def num_full_layers(attention: AttentionConfig, layers: int) -> int:
    """Layers that see everything."""
    return layers if attention.window is None else len({layer % layers for layer in attention.full_layers})


def model_pairs(attention: AttentionConfig, layers: int, length: int, separator_share: float) -> float:
    """Summed over all layers, for one sequence."""
    full = num_full_layers(attention, layers)
    return full * all_pairs(length) + (layers - full) * visible_pairs(attention, length, separator_share)


def most_landmarks(attention: AttentionConfig, length: int) -> int:
    """Of a row, as a plan promises them before it has looked at the ids; the fused kernel keeps room for so many."""
    if attention.window is None:
        return 0
    if attention.separators or attention.separator_ids or attention.document_boundaries:
        return length
    strided = max(0, length - attention.sinks) // attention.stride if attention.stride else 0
    return min(length, attention.sinks + strided)
