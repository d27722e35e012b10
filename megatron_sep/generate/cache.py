"""SepCache: a cache for causal models of transformers that keeps what its policies keep and frees the rest."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from megatron_sep.attention.bilevel import Bilevel
from megatron_sep.generate.group import Group
from megatron_sep.generate.layer_policies import CacheError, LayerPolicy, check_positions, check_scored, first_policy
from megatron_sep.generate.layout import Layout, of_mask, restarts, whole_at_end
from megatron_sep.generate.policies import H2O, ScorePolicy, SnapKV
from megatron_sep.generate.rotary import Rotary
from megatron_sep.generate.rows import clear_texts, put_texts
from megatron_sep.generate.scored import HeavyHitters, Prompts
from megatron_sep.generate.scores import Scoring
from megatron_sep.generate.segments import Segments
from megatron_sep.generate.slots import ROLLBACK, SLACK, Slots

_SCORED: dict[type[ScorePolicy], Callable[[Any, int, int, torch.device], Group]] = {H2O: HeavyHitters, SnapKV: Prompts}
"""What keeps the tokens under a policy that looks at attention; under the others it is Slots."""


@dataclass(frozen=True)
class Retention:
    """What a cache kept of the texts it saw, measured at every token; padding does not count.

    Sums over tokens and texts, means over layers and key heads.
    """

    seen: float
    """Tokens that a query saw, itself included."""
    all: float
    """The same with everything kept."""
    queries: float
    num_bytes: int
    """Memory of keys and values now."""

    @property
    def live(self) -> float:
        """Tokens that a query saw, on average."""
        return self.seen / max(self.queries, 1)

    @property
    def full(self) -> float:
        """The same with everything kept."""
        return self.all / max(self.queries, 1)

    @property
    def share(self) -> float:
        """live / full"""
        return self.seen / self.all if self.all else 1.0

    def since(self, before: "Retention") -> "Retention":
        """Of the tokens that came after ``before`` alone."""
        return Retention(self.seen - before.seen, self.all - before.all, self.queries - before.queries, self.num_bytes)


class SepCache(Cache):  # type: ignore[misc]
    """One policy a layer; layers of the same policy share their bookkeeping.

    ``begin`` before a forward pass and ``end`` after it are called by what ``attach`` installs. ``document_end`` is the
    token after which everything before it is forgotten; ``slack`` the slots of a row that may hold tokens which nothing
    sees any more; ``rollback`` the newest tokens that ``crop`` may take back, where no policy has a capacity or looks
    at scores; ``backend`` that of the decode kernel. ``bilevel`` counts tokens by segments, whose numbers stand in for
    positions in the text; ``distances``: scores fall with them (ALiBi), and nothing turns. Raises CacheError.
    """

    def __init__(
        self,
        policies: Sequence[LayerPolicy],
        *,
        vocab_size: int,
        document_end: int | None = None,
        rotary: Rotary | None = None,
        slack: int = SLACK,
        rollback: int = ROLLBACK,
        backend: str = "auto",
        bilevel: Bilevel | None = None,
        distances: bool = False,
    ) -> None:
        super().__init__(layers=[])
        check_positions(policies)
        check_scored(policies, document_end)
        self.policies = tuple(policies)
        self.vocab_size, self.document_end, self.rotary = vocab_size, document_end, rotary
        self.slack, self.rollback, self.backend = slack, rollback, backend
        self.segments = None if bilevel is None else Segments(bilevel, document_end)
        self.distances = distances
        self._most_columns = self._whole_columns = 0
        """Columns that the cache has held at most, and how many of the last ones are tokens of every text."""
        self.columns = 0
        """Tokens of each text so far, padding included."""
        self.groups: dict[LayerPolicy, Group] = {}
        self._index = [self.policies[:layer].count(policy) for layer, policy in enumerate(self.policies)]
        self._new = 0
        """Columns of the pass that runs."""
        self._new_whole = 0
        """``_whole_columns`` after the pass that runs."""
        self._since_B: Tensor | None = None
        """int64: tokens of each text before its position 0; None: none, no documents were packed."""
        self._next_since_B: Tensor | None = None
        """The same after the pass that runs."""
        self._broken = False

    def begin(self, ids_BT: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """New tokens of every text, int64 [B, T]; returns the position ids to rotate them by, int64 [B, T].

        ``attention_mask`` is 0 at padding: [B, T], or [B, columns so far + T]; or it separates packed documents, as
        ``position_ids`` that begin at 0 again do. Raises CacheError, and AttachError for what says something else.
        """
        if self._new:
            self.abandon()  # nobody told that the pass was interrupted
        self._check_ids(ids_BT)
        self._check_state(len(ids_BT))
        layout = of_mask(attention_mask, ids_BT.shape[0], ids_BT.shape[1], self.columns)
        if position_ids is not None and not _captures(ids_BT):
            layout = self._with_restarts(layout, ids_BT, position_ids)
        if layout.starts_BT is not None:
            self._check_packable()
        if not self.groups:
            self.open(len(ids_BT), ids_BT.device)
        self._new = ids_BT.shape[1]
        self._new_whole = self._new + self._whole_columns if layout.real_BT is None else whole_at_end(layout.real_BT)
        if self.segments is not None:
            return self._begin_segments(self.segments.begin(ids_BT, layout), ids_BT, layout)
        own_BT, *_ = [group.begin(ids_BT, layout) for group in self.groups.values()]
        if self.distances:
            return torch.zeros_like(own_BT)
        if first_policy(self.policies).positions != "text":
            return own_BT
        if position_ids is not None:
            return position_ids.expand_as(own_BT)
        return own_BT if self._since_B is None else (own_BT - self._since_B[:, None]).clamp(min=0)

    def _begin_segments(self, segment_BT: Tensor, ids_BT: Tensor, layout: Layout) -> Tensor:
        """The numbers of the tokens' segments, or zeros where they are distances and nothing turns."""
        for group in self.groups.values():
            if self.distances and isinstance(group, Slots):
                group.begin(ids_BT, layout, segment_BT)
            else:
                group.begin(ids_BT, layout)
        return torch.zeros_like(segment_BT) if self.distances else segment_BT

    def open(self, batch: int, device: torch.device) -> None:
        """Of an empty cache one of ``batch`` empty texts."""
        self.groups = {policy: self._group(policy, n, batch, device) for policy, n in Counter(self.policies).items()}

    def put(self, rows: Sequence[int], texts: "SepCache") -> bool:
        """In the place of the texts at ``rows`` those of another cache of the same policies, in its order.

        Were stores replaced, so that a CUDA graph is void? Raises CacheError for policies that look at scores.
        """
        replaced = []
        for policy, group in self.groups.items():
            if not isinstance(group, Slots):
                raise CacheError(
                    f"{policy}: its texts stay where they are; pass an AttentionPattern or StreamingPattern"
                )
            replaced.append(put_texts(group, rows, texts.groups[policy]))  # type: ignore[arg-type]
        if self.segments is not None and texts.segments is not None:
            self.segments.put(rows, texts.segments, self.batch_size)
        self.columns = max(self.columns, texts.columns)
        return any(replaced)

    def clear(self, rows: Sequence[int]) -> None:
        """Nothing in the place of the texts at ``rows``."""
        for group in self.groups.values():
            if isinstance(group, Slots):
                clear_texts(group, rows)

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values now."""
        return sum(group.num_bytes for group in self.groups.values())

    def attend(
        self, layer: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, scoring: Scoring | None = None
    ) -> Tensor:
        """Attention of the new tokens in a layer of the model: [B, H, T, D]; ``scoring``: what else scores go through.

        Raises CacheError for a policy that looks at scores of the plain kind alone.
        """
        policy = self.policies[layer]
        group = self.groups[policy]
        if scoring is None:
            return group.attend(self._index[layer], q_BHTD, k_BKTD, v_BKTD, scale)
        if not isinstance(group, Slots):
            raise CacheError(
                f"layer {layer}: {policy} knows no {scoring}; pass an AttentionPattern or StreamingPattern"
            )
        return group.attend(self._index[layer], q_BHTD, k_BKTD, v_BKTD, scale, scoring)

    def end(self) -> None:
        """The forward pass is over: tokens that nothing will see leave."""
        for group in self.groups.values():
            group.end()
        self._whole_columns = self._new_whole
        self.columns += self._new
        self._most_columns = max(self._most_columns, self.columns)
        self._new, self._since_B = 0, self._next_since_B
        if self.segments is not None:
            self.segments.end()

    def abandon(self) -> None:
        """The forward pass failed: its tokens do not count, and the cache is as before them if that can be."""
        whole = [group.abandon() for group in self.groups.values()]
        self._broken, self._new, self._next_since_B = not all(whole), 0, self._since_B

    def room(self) -> bool:
        """Make sure of room for one more token of each text; were stores replaced, so that a CUDA graph is void?"""
        replaced = [group.room() for group in self.groups.values()]
        return any(replaced)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens of each text at once, so that no store has to grow while it is full."""
        for group in self.groups.values():
            group.reserve(tokens)

    def replayed(self) -> None:
        """A CUDA graph of a step has run once more: count it, as the graph holds no Python."""
        self.columns += 1
        self._whole_columns += 1
        self._most_columns = max(self._most_columns, self.columns)
        for group in self.groups.values():
            group.replayed()

    def retention(self) -> Retention:
        """What was kept so far."""
        seen = whole = queries = 0.0
        for group in self.groups.values():
            weight = group.num_layers / len(self.policies) * group.batch / len(group.seen_R)
            seen += weight * float(group.live_R.sum())
            whole += weight * float(group.full_R.sum())
            queries += weight * float(group.seen_R.sum())
        return Retention(seen, whole, queries, self.num_bytes)

    def blocks(self) -> list[tuple[int, dict[str, float]]]:
        """Slots in use now: for each policy how many layers it has, and by block the mean over texts and heads."""
        return [
            (group.num_layers, {name: float(count_R.double().mean()) for name, count_R in group.blocks().items()})
            for group in self.groups.values()
        ]

    @property
    def seen(self) -> float:
        """Tokens of a text so far without padding, on average."""
        return next((float(group.seen_R.double().mean()) for group in self.groups.values()), 0.0)

    def __len__(self) -> int:
        """Layers, as in a DynamicCache that was made for the model; so a cache is true, filled or not."""
        return len(self.policies)

    @property
    def is_initialized(self) -> bool:
        """Did it take in anything?"""
        return bool(self.groups)

    @property
    def is_compileable(self) -> bool:
        """May ``generate`` compile the forward pass? It compiles what has a static cache."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Can tokens be taken back without a trace?"""
        groups = self.groups.values()
        return (
            self.segments is None
            and self.rollback > 0
            and all(isinstance(group, Slots) and group.policy.capacity is None for group in groups)
        )

    @property
    def is_sliding(self) -> list[bool]:
        """Of each layer: none is a sliding window of transformers."""
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer: none has linear attention."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """Of each layer: all keep something."""
        return [False] * len(self)

    @property
    def batch_size(self) -> int:
        """Texts, -1 before the first."""
        return next((group.batch for group in self.groups.values()), -1)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a text may be of any length."""
        del layer_idx
        return -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: ``attend`` stores them."""
        del layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each text so far, padding included, kept or not."""
        del layer_idx
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As if everything were kept; no mask is made of it."""
        del layer_idx
        return self.columns + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: text i goes on from text ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each text ``repeats`` times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the texts at these indices."""
        for group in self.groups.values():
            group.select(indices.to(group.seen_R.device))
        if self.segments is not None:
            self.segments.select(indices)
        if self._since_B is not None:
            self._since_B = self._next_since_B = self._since_B[indices.to(self._since_B.device)]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens of each text, given as a negative number: those of a draft that was not accepted.

        Raises CacheError where something that they made the cache free is gone: always for policies of a capacity and
        those that look at scores, beyond ``rollback`` tokens for the others.
        """
        tokens = -tokens_to_remove
        if tokens == 0:
            return
        groups = [group for group in self.groups.values() if isinstance(group, Slots)]
        if self.segments is not None:
            raise CacheError(
                f"crop({tokens_to_remove}): of bilevel positions what was counted is not taken back; generate without "
                "assisted or speculative decoding"
            )
        if not self.is_croppable:
            raise CacheError(
                f"crop({tokens_to_remove}): under {first_policy(self.policies)} tokens are freed for good; generate "
                "without assisted or speculative decoding, or under an AttentionPattern"
            )
        most = min(self._whole_columns, self.columns - self._most_columns + self.rollback)
        if not 0 < tokens <= most or any(group.begun_within(tokens) for group in groups):
            raise CacheError(
                f"crop({tokens_to_remove}): the last {max(most, 0)} tokens can be taken back, as far as one document "
                "has them; draft fewer at a time, or keep more back with rollback=N in attach()"
            )
        for group in groups:
            group.crop(tokens)
        self.columns -= tokens
        self._whole_columns -= tokens

    def reset(self) -> None:
        """Forget everything."""
        self.groups, self.columns, self._new = {}, 0, 0
        self._most_columns = self._whole_columns = 0
        self._since_B, self._next_since_B, self._broken = None, None, False
        if self.segments is not None:
            self.segments.reset()

    def _group(self, policy: LayerPolicy, num_layers: int, batch: int, device: torch.device) -> Group:
        if isinstance(policy, ScorePolicy):
            return _SCORED[type(policy)](policy, num_layers, batch, device)
        return Slots(
            policy if isinstance(policy, tuple) else (policy,),
            num_layers,
            batch,
            device,
            document_end=self.document_end,
            rotary=self.rotary,
            slack=self.slack,
            rollback=self.rollback,
            backend=self.backend,
            segments=self.segments is not None and self.distances,
        )

    def _with_restarts(self, layout: Layout, ids_BT: Tensor, position_ids: Tensor) -> Layout:
        """With the documents that positions which begin at 0 again tell of."""
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if layout.real_BT is None else layout.real_BT
        text_BT = real_BT.cumsum(1) - 1
        for group in [*self.groups.values()][:1]:
            text_BT = text_BT + group.seen_R.view(len(ids_BT), -1)[:, :1]
        running_BT = text_BT if self._since_B is None else text_BT - self._since_B[:, None]
        starts_BT = restarts(position_ids, running_BT, layout.real_BT)
        if not bool(starts_BT.any()):
            return layout
        since_B = torch.where(starts_BT, text_BT, 0).amax(1)
        self._next_since_B = since_B if self._since_B is None else torch.maximum(since_B, self._since_B)
        return replace(layout, starts_BT=starts_BT if layout.starts_BT is None else layout.starts_BT | starts_BT)

    def _check_state(self, batch: int) -> None:
        if self._broken:
            raise CacheError(
                "cache: a forward pass failed midway and left a part of its tokens here; call reset() and "
                "send the text again"
            )
        if self.groups and batch != self.batch_size:
            raise CacheError(
                f"cache: holds {self.batch_size} texts, and {batch} came; start a new cache, or make copies "
                "of its texts with batch_select_indices"
            )

    def _check_packable(self) -> None:
        for policy in self.policies:
            if isinstance(policy, ScorePolicy):
                raise CacheError(
                    f"packed documents with {policy}: it knows none; pass each document as a text of its own"
                )

    def _check_ids(self, ids_BT: Tensor) -> None:
        if _captures(ids_BT):
            return
        if ids_BT.numel() and not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < self.vocab_size:
            raise CacheError(
                f"token ids from {int(ids_BT.min())} to {int(ids_BT.max())}: the model's vocabulary has "
                f"{self.vocab_size}, numbered from 0; encode the text with the model's own tokenizer"
            )


def _captures(ids_BT: Tensor) -> bool:
    """Does a CUDA graph of the pass come into being, which can look at nothing?"""
    return ids_BT.is_cuda and torch.cuda.is_current_stream_capturing()
