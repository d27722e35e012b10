"""What the cache of an export keeps: the columns of its texts that a later token can still see.

A column is a place of the batch, with a token of each text or with padding. In each row some columns are gone; those
that are there stand in order and end together, so that the newest ones can be taken back. Beside the keys and values of
the model's layers a cache has layers of its own, for the ids and for the numbers of the columns that are there:
whatever chooses, repeats or takes back texts and tokens in a cache does so in all of its layers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicLayer

ROLLBACK = 32
"""Newest columns that stay, seen or not: those of a draft, which is taken back where it is not accepted."""
SLACK = 16
"""Columns that come in before a cache looks again for what nothing sees any more."""


class SepLayer(DynamicLayer):
    """Keys and values [B, K, C, D] of the columns that are there."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen = 0
        """Columns so far, those that are gone too."""
        self.whole = 0
        """Newest columns of which none is gone in any layer of the cache."""

    @property
    def held(self) -> int:
        """Columns that are there: C."""
        return self.keys.shape[-2] if self.seen else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[-2]
        self.whole += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def keep(self, source: Tensor) -> None:
        """Only the columns at these places, int64 [B, C]."""
        index = source.to(self.keys.device)[:, None, :, None]
        self.keys, self.values = (
            part.gather(2, index.expand(-1, part.shape[1], -1, part.shape[3])) for part in (self.keys, self.values)
        )

    def get_seq_length(self, *_: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """As if every column were there. Before transformers 5.3 the positions of the queries are given."""
        return self.seen + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def crop(self, tokens: int) -> None:
        """Take so many columns back, given as a negative number, or all but so many. Raises ValueError for too many."""
        remove = -tokens if tokens <= 0 else self.seen - tokens
        if remove > self.whole:
            raise ValueError(f"crop({tokens}): the last {self.whole} tokens can be taken back; draft fewer at a time")
        if remove > 0:
            self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
            self.seen, self.whole = self.seen - remove, self.whole - remove

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.seen, self.whole = False, 0, 0


class Ids(SepLayer):
    """The ids of all columns [B, 1, N, 1]: 8 bytes each, and the rule follows from them."""


class Columns(SepLayer):
    """Which columns of a pattern are there, int64 [B, 1, C, 1]; -1 where a row has fewer than others."""

    def __init__(self, pattern: int, layers: list[int]) -> None:
        super().__init__()
        self.pattern, self.layers = pattern, layers
        self.unseen = 0
        """Columns that came in since the cache looked."""

    def add(self, ids: Tensor) -> None:
        """The next columns, as many as there are ids [B, 1, T, 1]."""
        new = torch.arange(self.seen, self.seen + ids.shape[2], device=ids.device)[:, None].expand_as(ids)
        self.update(new, new[..., :0])
        self.unseen += ids.shape[2]


def prepare(cache: Any, pattern_of_layer: list[int], evicts: list[bool]) -> None:
    """Let an empty cache keep the ids, and of patterns that evict what it has to. Raises ValueError for fixed sizes."""
    if cache.is_compileable:
        raise ValueError(f"a {type(cache).__name__} has room of a fixed size; pass a DynamicCache, or none")
    plain = all(type(layer) in (DynamicLayer, SepLayer, Ids, Columns) for layer in cache.layers)
    if plain:
        cache.layers[:] = [SepLayer() for _ in pattern_of_layer]
    cache.layers[len(pattern_of_layer) :] = [Ids()]
    for pattern, each in enumerate(evicts):
        if each and plain:
            numbers = [number for number, own in enumerate(pattern_of_layer) if own == pattern]
            cache.layers.append(Columns(pattern, numbers))


def ids_in(cache: Any) -> Any:
    """The layer of the ids, or None."""
    return next((layer for layer in cache.layers if isinstance(layer, Ids)), None)


def columns_in(cache: Any, pattern: int) -> Tensor | None:
    """The columns of a pattern that are there, int64 [B, C]; None: all."""
    found = () if cache is None else cache.layers
    layer = next((each for each in found if isinstance(each, Columns) and each.pattern == pattern), None)
    return layer.keys[:, 0, :, 0] if layer is not None and layer.seen else None


def remember(cache: Any, ids: Tensor) -> None:
    """Take in the ids [B, T] of a pass that is over."""
    ids = ids[:, None, :, None]
    for layer in cache.layers:
        if isinstance(layer, Columns):
            layer.add(ids)
        elif isinstance(layer, Ids):
            layer.update(ids, ids[..., :0])


def free(cache: Any, plans: list[Any]) -> None:
    """Drop what no later token sees under the pattern's plan, over the columns of the cache and of the coming pass."""
    for layer in cache.layers:
        if isinstance(layer, Columns) and layer.unseen >= SLACK:
            layer.unseen = 0
            _free(cache, layer, plans[layer.pattern].reach_BT)


def _free(cache: Any, layer: Columns, reach_BT: Tensor) -> None:
    column_BC = layer.keys[:, 0, :, 0]
    last_BC = column_BC + reach_BT.gather(1, column_BC.clamp(min=0))
    kept_BC = (column_BC >= 0) & (last_BC > layer.seen - ROLLBACK)
    kept_BC[:, -ROLLBACK:] = True  # padding too: rows end together
    count_B1 = kept_BC.sum(1, keepdim=True)
    most = int(count_B1.max())
    if most == layer.held:
        return
    place = torch.arange(layer.held, device=column_BC.device)
    target_BC = torch.where(kept_BC, most - kept_BC.flip(1).cumsum(1).flip(1), most)
    source_BC = place.new_zeros(len(column_BC), most + 1).scatter_(1, target_BC, place.expand_as(column_BC))[:, :most]
    for each in [*(cache.layers[number] for number in layer.layers), layer]:
        each.keep(source_BC)
    for each in cache.layers:
        each.whole = min(each.whole, ROLLBACK)
    layer.keys[:, 0, :, 0].masked_fill_(place[:most] < most - count_B1, -1)
