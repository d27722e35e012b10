"""The slots of layers that keep the same tokens: which tokens lie in them, with their keys and values.

A row's slots [0, length) hold tokens in the order of the text. A token is written behind the last one; an eviction
moves those that stay to the front. Nothing else ever moves: a step reads the slots in use once and writes one.

A row is a text of the batch, or one key head of it where heads keep different tokens. One token a row is a few
operations on the device without a look at their results, so that a CUDA graph can hold them; a chunk of tokens is
planned on the host, row by row. Both leave the same tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_sep.generate.blocks import blocks_of
from megatron_sep.generate.chunk import RowScript, RowState, Segment, TokenPolicy, end_of_reach, plan_row
from megatron_sep.generate.dependent import DEPENDENT
from megatron_sep.generate.layout import Layout
from megatron_sep.generate.rotary import Rotary
from megatron_sep.generate.scores import Scoring, attend_shaped
from megatron_sep.generate.step import count_step, evict
from megatron_sep.kernels.sep_attention import sep_attention
from megatron_sep.kernels.sep_decode import compact, decode_attention
from megatron_sep.kernels.sep_decode.reference import attend_one

SLACK = 64
"""Slots of a row whose tokens nothing sees any more, before the others are moved together."""
ROLLBACK = 32
"""Tokens that can be taken back: a draft of transformers' assisted decoding has 20."""
SPARE = 256
"""Slots that a growing cache gains at least."""


class Slots:
    """Bookkeeping and storage of layers that share ``policies``: one for all heads, or one for each key head.

    Raises ValueError from the kernels for tensors that do not fit.
    """

    def __init__(
        self,
        policies: Sequence[TokenPolicy],
        num_layers: int,
        batch: int,
        device: torch.device,
        *,
        document_end: int | None = None,
        rotary: Rotary | None = None,
        slack: int = SLACK,
        rollback: int = ROLLBACK,
        backend: str = "auto",
        segments: bool = False,
    ) -> None:
        """``segments``: distances are those of the segments' numbers, which come with the tokens."""
        self.policies, self.num_layers, self.batch, self.device = tuple(policies), num_layers, batch, device
        self.document_end, self.slack, self.rollback, self.backend = document_end, slack, rollback, backend
        self.rotary = rotary if self.policy.positions == "cache" else None
        self.evicts = any(policy.evicts for policy in self.policies)
        num_slots = (self.policy.capacity or 0) if self.policy.bounded and self.policy.of_prompt.bounded else 0
        rows = batch * len(self.policies)
        self.place_RC, self.reach_end_RC = (self._counters(rows, num_slots) for _ in range(2))
        """int32: text position of the token in a slot, and the first one that does not see it."""
        self.landmark_RC = self._counters(rows, num_slots).bool()
        self.stand_RC = self._counters(rows, num_slots) if segments else None
        """int32: the number of the token's segment."""
        self.length_R, self.seen_R, self.document_R = (self._counters(rows) for _ in range(3))
        """int32: slots in use, tokens of the text so far, text position where its document began."""
        self.live_R, self.full_R = (self._counters(rows).long() for _ in range(2))
        """int64: entries that each token saw, and tokens of the text up to it, summed over the tokens."""
        self.keys_LBKCD: Tensor | None = None
        self.values_LBKCD: Tensor | None = None
        self._arrived_BK: Tensor | None = None
        """What the kernel of a step counts in; zeros between steps."""
        self._most = 0
        """No row has more slots in use: what the host knows without asking the device."""
        self._scripts: list[RowScript] | None = None
        self._ids_B1: Tensor | None = None
        self._reads_prompt = True
        """Did no pass have a single token yet?"""
        self._chunk_tokens = 0
        """Columns of the chunk that is read."""
        self._stored = False
        """Has a layer stored what it keeps of the chunk?"""

    @property
    def policy(self) -> TokenPolicy:
        """The first key head's."""
        return self.policies[0]

    @property
    def num_slots(self) -> int:
        """Slots a row has."""
        return self.place_RC.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        stores = (self.keys_LBKCD, self.values_LBKCD)
        return sum(store.numel() * store.element_size() for store in stores if store is not None)

    def blocks(self) -> dict[str, Tensor]:
        """Slots in use by block, int64 [R] each; a separator in the window counts as window."""
        return blocks_of(self)

    def begin(self, ids_BT: Tensor, layout: Layout, segment_BT: Tensor | None = None) -> Tensor:
        """Take new tokens in. Returns the position ids that the model rotates queries and keys by, int64 [B, T].

        ``segment_BT``: the numbers of their segments, where distances are meant by them.
        """
        if ids_BT.shape[1] == 1 and layout.plain:
            return self._begin_step(ids_BT, segment_BT)
        return self._begin_chunk(ids_BT.cpu(), layout, segment_BT)

    def attend(
        self, layer: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, scoring: Scoring | None = None
    ) -> Tensor:
        """Attention of the new tokens in one layer of the group, [B, H, T, D]; keys and values are kept for later.

        ``scoring`` is what else the scores go through, not together with positions inside the cache.
        """
        if self.keys_LBKCD is None or self.values_LBKCD is None:
            shape = (self.num_layers, self.batch, k_BKTD.shape[1], self.num_slots, k_BKTD.shape[3])
            self.keys_LBKCD, self.values_LBKCD = k_BKTD.new_zeros(shape), v_BKTD.new_zeros(shape)
        keys_BKCD, values_BKCD = self.keys_LBKCD[layer], self.values_LBKCD[layer]
        if self._scripts is not None:
            return self._attend_chunk(q_BHTD, k_BKTD, v_BKTD, keys_BKCD, values_BKCD, scale, scoring)
        if scoring is not None:
            return self._attend_shaped_step(q_BHTD, k_BKTD, v_BKTD, keys_BKCD, values_BKCD, scale, scoring)
        out_BHD = decode_attention(
            q_BHTD[:, :, 0],
            k_BKTD[:, :, 0],
            v_BKTD[:, :, 0],
            keys_BKCD,
            values_BKCD,
            self.length_R,
            self.reach_end_RC,
            self.seen_R,
            scale=scale,
            rotary=self.rotary.tables(self.num_slots) if self.rotary else None,
            arrived_BK=self.counter(keys_BKCD),
            dependent=DEPENDENT.get(),
            backend=self.backend,
        )
        return out_BHD[:, :, None]

    def end(self) -> None:
        """All layers have attended: tokens that nothing will see leave."""
        if self._scripts is None:
            self._reads_prompt = False
            self._end_step()
        else:
            self._reads_prompt &= self._chunk_tokens > 1
            self._end_chunk(self._scripts)
        self._scripts = self._ids_B1 = None

    def abandon(self) -> bool:
        """The pass that began does not count. Is everything that was kept before it still there?"""
        whole = self._scripts is None or not self._stored or all(script.appends for script in self._scripts)
        self._scripts = self._ids_B1 = None
        return whole

    def room(self) -> bool:
        """Make sure of a slot for one more token a row, with some to spare where there is none; stores replaced?

        Where a prompt was read whole, the slots that it alone needed are given back.
        """
        if self.policy.bounded and not self._reads_prompt and self.num_slots != self.policy.capacity:
            self._resize(self.policy.capacity or 0)
            return True
        return self._most + 1 > self.num_slots and self.reserve(max(SPARE, self.num_slots // 4))

    def reserve(self, tokens: int) -> bool:
        """Make room for so many more tokens a row, fewer where tokens leave; were the stores replaced?

        The device is asked for the lengths only where what the host knows might not suffice.
        """
        if self.policy.bounded and (self.policy.of_prompt.bounded or not self._reads_prompt):
            return False
        if self._most + tokens <= self.num_slots:
            return False
        self._most = int(self.length_R.max())
        if self._most + (self.slack if self.evicts else tokens) < self.num_slots:
            return False
        self._grow(self._most + tokens)
        return True

    def replayed(self) -> None:
        """A CUDA graph of a step has run once more: the host counts along."""
        self._most += 1

    def begun_within(self, tokens: int) -> bool:
        """Did a document of any row begin behind the first of its newest ``tokens``?"""
        return bool((self.document_R > self.seen_R - tokens).any())

    def crop(self, tokens: int) -> None:
        """Take back the newest ``tokens`` of each row, no more than ``rollback`` and all of one document."""
        used_RC = torch.arange(self.num_slots, device=self.device) < self.length_R[:, None]
        before_R1 = (self.seen_R - tokens)[:, None]
        until_RC = torch.minimum(self.reach_end_RC, self.seen_R[:, None])
        seen_RC = (until_RC - torch.maximum(self.place_RC, before_R1)).clamp(min=0)
        self.live_R -= (seen_RC * used_RC).sum(1)
        self.full_R -= (2 * self.seen_R - tokens + 1).long() * tokens // 2
        self.length_R -= (used_RC & (self.place_RC >= before_R1)).sum(1).to(torch.int32)
        self.seen_R -= tokens

    def select(self, rows_B: Tensor) -> None:
        """Make the texts of the batch those at these indices: int64."""
        heads = len(self.policies)
        rows_R = (rows_B[:, None] * heads + torch.arange(heads, device=rows_B.device)).flatten()
        for name in (*self.tables, "length_R", "seen_R", "document_R", "live_R", "full_R"):
            setattr(self, name, getattr(self, name)[rows_R])
        if self.keys_LBKCD is not None and self.values_LBKCD is not None:
            self.keys_LBKCD, self.values_LBKCD = self.keys_LBKCD[:, rows_B], self.values_LBKCD[:, rows_B]
        self.batch = len(rows_B)

    def make_room(self, length: int) -> bool:
        """For texts that were read elsewhere and hold ``length`` tokens; were stores replaced?"""
        grows, self._most = length + 1 > self.num_slots, max(self._most, length)
        if grows:
            self._grow(length + SPARE)
        self._reads_prompt = self.policy.capacity is not None and length >= self.policy.capacity
        return grows

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of what is known of the token in each slot: [R, C] each."""
        return ("place_RC", "reach_end_RC", "landmark_RC", *(() if self.stand_RC is None else ("stand_RC",)))

    def _begin_step(self, ids_B1: Tensor, segment_B1: Tensor | None) -> Tensor:
        self.room()
        self._ids_B1 = ids_B1
        every = len(self.policies)
        place_B1 = (self.seen_R - self.document_R)[::every, None]
        landmarks = [policy.landmarks_at(ids_B1, place_B1) for policy in self.policies]
        reaches = [policy.reaches(each) for policy, each in zip(self.policies, landmarks, strict=True)]
        landmark_BK, reach_BK = torch.cat(landmarks, 1), torch.cat(reaches, 1)
        slot_R1 = self.length_R[:, None].long()
        self.place_RC.scatter_(1, slot_R1, self.seen_R[:, None])
        self.reach_end_RC.scatter_(1, slot_R1, end_of_reach(self.seen_R, reach_BK.flatten())[:, None])
        self.landmark_RC.scatter_(1, slot_R1, landmark_BK.reshape(-1, 1))
        if self.stand_RC is not None and segment_B1 is not None:
            self.stand_RC.scatter_(1, slot_R1, segment_B1.repeat_interleave(every, 0).to(torch.int32))
        return self._position_ids(self.length_R[::every, None].long(), self.seen_R[::every, None].long())

    def _end_step(self) -> None:
        assert self._ids_B1 is not None
        count_step(self.reach_end_RC, self.length_R, self.seen_R, self.live_R, self.full_R)
        self._most += 1
        if self.evicts:
            self._evict()
        if self.document_end is not None:
            ends_R = (self._ids_B1[:, 0] == self.document_end).repeat_interleave(len(self.policies))
            self.length_R.masked_fill_(ends_R, 0)
            self.document_R.copy_(torch.where(ends_R, self.seen_R, self.document_R))

    def _evict(self) -> None:
        source_RC, due_R = evict(
            self.policy,
            tuple(getattr(self, name) for name in self.tables),
            self.length_R,
            self.seen_R,
            self.slack,
            self.rollback,
        )
        if self.keys_LBKCD is not None and self.values_LBKCD is not None:
            compact(self.keys_LBKCD, self.values_LBKCD, source_RC, self.length_R, due_R, backend=self.backend)

    def _begin_chunk(self, ids_BT: Tensor, layout: Layout, segment_BT: Tensor | None) -> Tensor:
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if layout.real_BT is None else layout.real_BT.cpu()
        starts_BT = None if layout.starts_BT is None else layout.starts_BT.cpu()
        segment_BT = None if segment_BT is None else segment_BT.cpu()
        states = self._states()
        scripts, self._chunk_tokens = [], ids_BT.shape[1]
        for row, state in enumerate(states):
            text, head = divmod(row, len(self.policies))
            columns_T = real_BT[text].nonzero()[:, 0]
            ids_T, begins_T = ids_BT[text, columns_T], None if starts_BT is None else starts_BT[text, columns_T]
            policy = self.policies[head]
            policy = policy.of_prompt if self._reads_prompt and self._chunk_tokens > 1 else policy
            end, back = self.document_end, self.rollback
            stand_T = None if segment_BT is None else segment_BT[text, columns_T]
            scripts.append(plan_row(policy, state, ids_T, columns_T, end, self.device, begins_T, back, stand_T))
        self._scripts, self._stored = scripts, False
        self._most = max(len(script.kept) for script in scripts)
        if self._most > self.num_slots:
            self._grow(self._most + SPARE)
        cached_BT, text_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
        for row, script in enumerate(scripts[:: len(self.policies)]):
            cached_BT[row, script.columns_T.cpu()] = script.cache_positions
            text_BT[row, script.columns_T.cpu()] = script.text_positions
        return self._position_ids(cached_BT, text_BT).to(self.device)

    def _states(self) -> list[RowState]:
        place_RC, reach_end_RC, landmark_RC = (t.cpu() for t in (self.place_RC, self.reach_end_RC, self.landmark_RC))
        stand_RC = place_RC if self.stand_RC is None else self.stand_RC.cpu()
        counts = zip(*(t.tolist() for t in (self.length_R, self.seen_R, self.document_R)), strict=True)
        return [
            RowState(
                place_RC[r, :length],
                reach_end_RC[r, :length],
                landmark_RC[r, :length],
                seen,
                document,
                stand_RC[r, :length],
            )
            for r, (length, seen, document) in enumerate(counts)
        ]

    def _attend_chunk(
        self,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        keys_BKCD: Tensor,
        values_BKCD: Tensor,
        scale: float,
        scoring: Scoring | None,
    ) -> Tensor:
        assert self._scripts is not None
        q_RHTD, *stores = (
            t.reshape(len(t) * len(self.policies), t.shape[1] // len(self.policies), *t.shape[2:])
            for t in (q_BHTD, keys_BKCD, values_BKCD, k_BKTD, v_BKTD)
        )
        out_RHTD = torch.zeros_like(q_RHTD)
        for row, script in enumerate(self._scripts):
            keys, values, new_k, new_v = (t[row] for t in stores)
            k_KED = torch.cat([keys[:, : script.before], new_k[:, script.columns_T]], dim=1)
            v_KED = torch.cat([values[:, : script.before], new_v[:, script.columns_T]], dim=1)
            part = None if scoring is None else scoring.of_heads(self._heads_of(row, q_BHTD.shape[1]))
            for segment in script.segments:
                columns = script.columns_T[segment.begin : segment.end]
                q, k, v = q_RHTD[row][:, columns], k_KED[:, segment.entries_E], v_KED[:, segment.entries_E]
                out_RHTD[row][:, columns] = self._attend_segment(segment, q, k, v, scale, part)
            keys[:, : len(script.kept)] = k_KED[:, script.kept].detach()
            values[:, : len(script.kept)] = v_KED[:, script.kept].detach()
        self._stored = True
        return out_RHTD.reshape(q_BHTD.shape)

    def _heads_of(self, row: int, query_heads: int) -> slice:
        """Query heads of a row."""
        each = query_heads // len(self.policies)
        first = row % len(self.policies) * each
        return slice(first, first + each)

    def _attend_shaped_step(
        self,
        q_BH1D: Tensor,
        k_BK1D: Tensor,
        v_BK1D: Tensor,
        keys_BKCD: Tensor,
        values_BKCD: Tensor,
        scale: float,
        scoring: Scoring,
    ) -> Tensor:
        batch, heads = keys_BKCD.shape[:2]
        each = heads // len(self.policies)
        slot_BK11 = self.length_R.long().view(batch, -1, 1, 1).repeat_interleave(each, 1)
        slot_BK1D = slot_BK11.expand(-1, -1, -1, keys_BKCD.shape[3])
        keys_BKCD.scatter_(2, slot_BK1D, k_BK1D.detach())
        values_BKCD.scatter_(2, slot_BK1D, v_BK1D.detach())
        used_RC = torch.arange(self.num_slots, device=self.device) <= self.length_R[:, None]
        live_RC = used_RC & (self.reach_end_RC > self.seen_R[:, None])
        live_BK1C = live_RC.view(batch, -1, 1, self.num_slots).repeat_interleave(each, 1)
        distance_BK1C = (
            self._distances(scoring.bias_scale is not None)
            .view(batch, -1, 1, self.num_slots)
            .repeat_interleave(each, 1)
        )
        return attend_shaped(q_BH1D, keys_BKCD, values_BKCD, live_BK1C, scale, scoring, distance_BK1C)

    def _distances(self, from_start: bool) -> Tensor:
        """From the token in each slot to the newest one, which stands behind the slots in use: int [R, C].

        ``from_start``: to the first token of the text.
        """
        if self.policy.positions != "text":
            return self.length_R[:, None] - torch.arange(self.num_slots, device=self.device)
        stand_RC = self.place_RC if self.stand_RC is None else self.stand_RC
        return -stand_RC if from_start else stand_RC.gather(1, self.length_R[:, None].long()) - stand_RC

    def _attend_segment(
        self, segment: Segment, q_HTD: Tensor, k_KED: Tensor, v_KED: Tensor, scale: float, scoring: Scoring | None
    ) -> Tensor:
        if scoring is not None:
            every = torch.ones(1, 1, len(segment.entries_E), dtype=torch.bool, device=self.device)
            visible_1TE = every if segment.plan is None else segment.plan.dense()
            stand_E = segment.stand_E.to(self.device)
            distance_TE = stand_E[segment.past :, None] - stand_E
            if scoring.bias_scale is not None:
                distance_TE = -stand_E.expand_as(distance_TE)
            return attend_shaped(
                q_HTD[None], k_KED[None], v_KED[None], visible_1TE[:, None], scale, scoring, distance_TE[None, None]
            )[0]
        if segment.plan is None:
            q_KGD = q_HTD.view(len(k_KED), -1, q_HTD.shape[-1])
            angles = self.rotary.angles(segment.past) if self.rotary is not None else None
            return attend_one(q_KGD, k_KED, v_KED, scale, angles).flatten(0, 1)[:, None]
        if self.rotary is not None:
            q_HTD, k_KED = self.rotary.rotate(q_HTD, segment.past), self.rotary.rotate(k_KED, 0)
        return sep_attention(q_HTD[None], k_KED[None], v_KED[None], segment.plan, scale=scale)[0]

    def _end_chunk(self, scripts: list[RowScript]) -> None:
        for row, script in enumerate(scripts):
            after, count = script.after, len(script.kept)
            self.place_RC[row, :count] = after.place_E.to(self.device)
            self.reach_end_RC[row, :count] = after.reach_end_E.to(self.device)
            self.landmark_RC[row, :count] = after.landmark_E.to(self.device)
            if self.stand_RC is not None and after.stand_E is not None:
                self.stand_RC[row, :count] = after.stand_E.to(self.device)
            self.length_R[row], self.seen_R[row], self.document_R[row] = count, after.seen, after.document
            self.live_R[row] += script.live
            self.full_R[row] += script.full

    def _position_ids(self, cached_BT: Tensor, text_BT: Tensor) -> Tensor:
        """Zeros turn nothing: the cache itself rotates where positions are those inside it."""
        return {"cache": torch.zeros_like(text_BT), "text": text_BT, "frozen": cached_BT}[self.policy.positions]

    def counter(self, keys_BKCD: Tensor) -> Tensor:
        """What a step over such keys counts in: int32 [B, K], zeros between the kernels."""
        if self._arrived_BK is None or self._arrived_BK.shape != keys_BKCD.shape[:2]:
            self._arrived_BK = self._counters(*keys_BKCD.shape[:2])
        return self._arrived_BK

    def _counters(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    def _resize(self, num_slots: int) -> None:
        """To so many slots, which hold all tokens there are."""
        if num_slots > self.num_slots:
            self._grow(num_slots)
            return
        self.place_RC, self.reach_end_RC, self.landmark_RC = (
            table_RC[:, :num_slots].clone() for table_RC in (self.place_RC, self.reach_end_RC, self.landmark_RC)
        )
        if self.keys_LBKCD is not None and self.values_LBKCD is not None:
            self.keys_LBKCD = self.keys_LBKCD[..., :num_slots, :].clone()
            self.values_LBKCD = self.values_LBKCD[..., :num_slots, :].clone()

    def _grow(self, num_slots: int) -> None:
        more = num_slots - self.num_slots
        for name in self.tables:
            setattr(self, name, pad(getattr(self, name), (0, more)))
        if self.keys_LBKCD is not None and self.values_LBKCD is not None:
            self.keys_LBKCD = pad(self.keys_LBKCD, (0, 0, 0, more))
            self.values_LBKCD = pad(self.values_LBKCD, (0, 0, 0, more))
