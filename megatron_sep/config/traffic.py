"""Bytes that one context-parallel rank receives for the attention of a layer, forward, by each way of doing it.

Keys and values are ``key_width`` numbers each (key heads x head size; of this tensor-parallel rank). The backward pass
sends as much back. Torch-free.
"""


def all_gather_bytes(rows: int, length: int, key_width: int, ranks: int, number_bytes: int = 2) -> float:
    """Of all keys and values, at once or around a ring: what full attention takes."""
    return 2 * number_bytes * rows * length * key_width * (ranks - 1) / ranks


def ulysses_bytes(rows: int, length: int, query_width: int, key_width: int, ranks: int, number_bytes: int = 2) -> float:
    """Of queries, keys, values and outputs exchanged for heads (arXiv 2309.14509): no more ranks than key heads."""
    return 2 * number_bytes * rows * (length / ranks) * (query_width + key_width) * (ranks - 1) / ranks


def landmark_bytes(
    rows: int,
    length: int,
    key_width: int,
    ranks: int,
    *,
    share: float,
    window: int,
    rank: int = 0,
    number_bytes: int = 2,
) -> float:
    """Of the landmarks before a rank's late chunk and the window before each chunk: what Sep-Attention takes here.

    ``share`` of the tokens are landmarks. Rank 0 receives the most. The window is no longer than a chunk of the
    sequence, and a row is one document.
    """
    chunks_before = 2 * ranks - 2 - rank
    landmarks = share * length * chunks_before / (2 * ranks)
    windows = 0 if ranks == 1 else 1 if rank in (0, ranks - 1) else 2
    return 2 * number_bytes * rows * key_width * (landmarks + windows * (window - 1) * (1 - share))
