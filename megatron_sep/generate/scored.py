"""What layers under a score-based policy keep, in plain torch: baselines, made to be right and not to be fast.

The tokens that a layer keeps follow from its own attention: it has its own list of them for each key head. How many
they are is the same for all layers and key heads. The rows R of a group are texts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_sep.generate.layout import Layout
from megatron_sep.generate.policies import H2O, ScorePolicy, SnapKV, softmax

SPARE = 256
"""Slots that a growing cache gains at least, where its policy allows so many."""


class _Counted:
    """Counts and text positions, the same for all score-based policies."""

    def __init__(self, policy: ScorePolicy, num_layers: int, batch: int, device: torch.device) -> None:
        self.num_layers, self.batch, self.device = num_layers, batch, device
        self._name = type(policy).__name__
        self.seen_R, self.full_R = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.live_R = torch.zeros(batch, dtype=torch.float64, device=device)
        """Entries that each token saw, summed over the tokens: the mean over layers and key heads."""
        self._live_LR = torch.zeros(num_layers, batch, dtype=torch.float64, device=device)
        self._real_BT = torch.ones(batch, 0, dtype=torch.bool, device=device)
        self._place_BT = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self._attended = False
        """Has a layer looked at the tokens of the pass?"""

    def begin(self, ids_BT: Tensor, layout: Layout) -> Tensor:
        """Take new tokens in. Returns their text positions, int64 [B, T]."""
        if ids_BT.is_cuda and torch.cuda.is_current_stream_capturing():
            self.replayed()
        self._real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if layout.real_BT is None else layout.real_BT
        self._attended = False
        self._place_BT = (self.seen_R[:, None] + self._real_BT.cumsum(1) - 1).clamp(min=0)
        return self._place_BT

    def end(self) -> None:
        """All layers have attended."""
        new_R = self._real_BT.sum(1)
        self.full_R += new_R * (2 * self.seen_R + new_R + 1) // 2
        self.seen_R += new_R
        self.live_R = self._live_LR.mean(0)

    def abandon(self) -> bool:
        """The pass that began does not count. Is everything that was kept before it still there?"""
        return not self._attended

    def room(self) -> bool:
        """Each pass makes its own room."""
        return True

    def replayed(self) -> None:
        """Always an error: a CUDA graph cannot hold what these policies look at."""
        raise RuntimeError(f"{self._name} does not run in a CUDA graph; decode with graph=False")

    def select(self, rows_B: Tensor) -> None:
        """Make the texts of the batch those at these indices: int64."""
        self.seen_R, self.full_R, self.live_R = (t[rows_B] for t in (self.seen_R, self.full_R, self.live_R))
        self._live_LR = self._live_LR[:, rows_B]
        self.batch = len(rows_B)


@dataclass(frozen=True)
class _Slots:
    """A layer's slots under H2O, in no order."""

    keys_BKCD: Tensor
    values_BKCD: Tensor
    place_BKC: Tensor
    """int64: text position of the token in a slot, -1: none."""
    score_BKC: Tensor
    """Attention that it drew so far; 0 in an empty slot."""

    @classmethod
    def empty(cls, k_BKTD: Tensor, v_BKTD: Tensor) -> "_Slots":
        """No slots, for keys and values such as these."""
        keys, values = k_BKTD[:, :, :0], v_BKTD[:, :, :0]
        score_BKC = keys.new_zeros(keys.shape[:3], dtype=torch.promote_types(keys.dtype, torch.float32))
        return cls(keys, values, torch.zeros_like(score_BKC, dtype=torch.int64), score_BKC)

    def grown(self, num_slots: int) -> "_Slots":
        """With empty slots up to this number."""
        more = num_slots - self.place_BKC.shape[2]
        keys, values = (pad(store, (0, 0, 0, more)) for store in (self.keys_BKCD, self.values_BKCD))
        return _Slots(keys, values, pad(self.place_BKC, (0, more), value=-1), pad(self.score_BKC, (0, more)))

    def selected(self, rows_B: Tensor) -> "_Slots":
        """Of the texts at these indices."""
        tables = (self.keys_BKCD, self.values_BKCD, self.place_BKC, self.score_BKC)
        return _Slots(*(table[rows_B] for table in tables))


class HeavyHitters(_Counted):
    """Layers under H2O: a token takes an empty slot, and the one that leaves empties its own.

    A chunk is taken in token by token and leaves what single tokens would. Never are there more than budget + 1 slots.
    """

    def __init__(self, policy: H2O, num_layers: int, batch: int, device: torch.device) -> None:
        super().__init__(policy, num_layers, batch, device)
        self.policy = policy
        self.layers: dict[int, _Slots] = {}
        self._num_slots = self._columns = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(slots.keys_BKCD.nbytes + slots.values_BKCD.nbytes for slots in self.layers.values())

    def blocks(self) -> dict[str, Tensor]:
        """Slots in use, [R]: the mean over layers and key heads."""
        held = [(slots.place_BKC >= 0).sum(2).double().mean(1) for slots in self.layers.values()]
        return {"heavy hitters": torch.stack(held).mean(0)} if held else {}

    def begin(self, ids_BT: Tensor, layout: Layout) -> Tensor:
        """Take new tokens in; returns their text positions, int64 [B, T]."""
        self.reserve(ids_BT.shape[1])
        self._columns += ids_BT.shape[1]
        return super().begin(ids_BT, layout)

    def attend(self, layer: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
        """Attention of the new tokens in one layer of the group, [B, H, T, D]."""
        self._attended = True
        if layer not in self.layers:
            self.layers[layer] = _Slots.empty(k_BKTD, v_BKTD).grown(self._num_slots)
        padding_B1T1 = ~self._real_BT[:, None, :, None]
        columns = (t.masked_fill(padding_B1T1, 0).unbind(2) for t in (q_BHTD, k_BKTD, v_BKTD))
        tokens = enumerate(zip(*columns, strict=True))
        return torch.stack([self._token(layer, column, scale, *q_k_v) for column, q_k_v in tokens], dim=2)

    def reserve(self, tokens: int) -> bool:
        """Slots for so many more tokens of each text, as far as the policy keeps them; were stores replaced?"""
        most = self.policy.budget + 1
        needed = min(most, self._columns + tokens)
        if needed <= self._num_slots:
            return False
        self._num_slots = min(most, needed + SPARE)
        self.layers = {layer: slots.grown(self._num_slots) for layer, slots in self.layers.items()}
        return True

    def select(self, rows_B: Tensor) -> None:
        """Make the texts of the batch those at these indices: int64."""
        super().select(rows_B)
        self.layers = {layer: slots.selected(rows_B) for layer, slots in self.layers.items()}

    def _token(self, layer: int, column: int, scale: float, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        """One token of each text that has one in this column: [B, H, D]."""
        slots, real_B, newest_B = self.layers[layer], self._real_BT[:, column], self._place_BT[:, column]
        slot_BK1 = (slots.place_BKC < 0).int().argmax(-1, keepdim=True)
        slots.place_BKC.scatter_(2, slot_BK1, newest_B.where(real_B, -1)[:, None, None].expand_as(slot_BK1))
        for store_BKCD, new_BKD in ((slots.keys_BKCD, k_BKD), (slots.values_BKCD, v_BKD)):
            slot_BK1D = slot_BK1[..., None].expand(-1, -1, -1, store_BKCD.shape[3])
            store_BKCD.scatter_(2, slot_BK1D, new_BKD[:, :, None])

        held_BKC = slots.place_BKC >= 0
        q_BKGD = q_BHD.reshape(*k_BKD.shape[:2], -1, q_BHD.shape[2])
        scores_BKGC = (q_BKGD @ slots.keys_BKCD.mT) * scale
        nothing = torch.finfo(scores_BKGC.dtype).min
        weights_BKGC = softmax(scores_BKGC.masked_fill(~held_BKC[:, :, None], nothing)) * real_B[:, None, None, None]
        slots.score_BKC.add_(weights_BKGC.mean(2))
        self._live_LR[layer] += held_BKC.sum(2).double().mean(1) * real_B

        leaving_BKC = self.policy.leaving(slots.score_BKC, slots.place_BKC, newest_B)
        slots.place_BKC.masked_fill_(leaving_BKC, -1)
        slots.score_BKC.masked_fill_(leaving_BKC, 0)
        return (weights_BKGC.to(v_BKD.dtype) @ slots.values_BKCD).flatten(1, 2)


@dataclass(frozen=True)
class _Kept:
    """What a layer keeps of a text, in the order of the text."""

    keys_KED: Tensor
    values_KED: Tensor
    place_KE: Tensor
    """int64: text positions."""
    queries_HWD: Tensor
    """The last queries of the prompt, as long as it lasts."""

    def joined(self, k_KTD: Tensor, v_KTD: Tensor, place_T: Tensor) -> "_Kept":
        """With new tokens."""
        place_KT = place_T.expand(len(k_KTD), -1)
        return _Kept(
            torch.cat([self.keys_KED, k_KTD], dim=1),
            torch.cat([self.values_KED, v_KTD], dim=1),
            torch.cat([self.place_KE, place_KT], dim=1),
            self.queries_HWD,
        )

    def remembering(self, q_HTD: Tensor, window: int) -> "_Kept":
        """With the last of these queries and the former ones."""
        queries_HWD = torch.cat([self.queries_HWD, q_HTD], dim=1)[:, -window:].clone()
        return _Kept(self.keys_KED, self.values_KED, self.place_KE, queries_HWD)

    def compressed(self, policy: SnapKV, scale: float) -> "_Kept":
        """What stays of a prompt."""
        keys, values, place, queries = self.keys_KED, self.values_KED, self.place_KE, self.queries_HWD
        if place.shape[1] > policy.budget:
            kept_KE = policy.kept(policy.votes(queries, keys, scale))
            place = place.gather(1, kept_KE)
            keys, values = (t.gather(1, kept_KE[..., None].expand(-1, -1, t.shape[2])) for t in (keys, values))
        return _Kept(keys, values, place, queries[:, :0].clone())


class Prompts(_Counted):
    """Layers under SnapKV: a text has as many slots as tokens, and loses those that its prompt drops."""

    def __init__(self, policy: SnapKV, num_layers: int, batch: int, device: torch.device) -> None:
        super().__init__(policy, num_layers, batch, device)
        self.policy = policy
        self.layers: dict[int, list[_Kept]] = {}
        """Of each layer, its texts."""
        self._columns_B: list[Tensor] = []
        self._read_B, self._prompt_B, self._due_B = ([state] * batch for state in (False, True, False))
        """Texts of which something was read; whose prompt may go on; whose prompt ended before this pass."""
        self._before = self._read_B, self._prompt_B
        """What was so before the pass."""

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        texts = [kept for layer in self.layers.values() for kept in layer]
        return sum(kept.keys_KED.nbytes + kept.values_KED.nbytes for kept in texts)

    def blocks(self) -> dict[str, Tensor]:
        """Entries, [R]: the mean over layers."""
        held = [[kept.place_KE.shape[1] for kept in texts] for texts in self.layers.values()]
        return {"chosen and new": torch.tensor(held, dtype=torch.float64).mean(0)} if held else {}

    def begin(self, ids_BT: Tensor, layout: Layout) -> Tensor:
        """Take new tokens in; returns their text positions, int64 [B, T]."""
        self._before = self._read_B, self._prompt_B
        place_BT = super().begin(ids_BT, layout)
        self._columns_B = [real_T.nonzero()[:, 0] for real_T in self._real_BT]
        states = zip(self._columns_B, self._read_B, self._prompt_B, strict=True)
        self._due_B = [prompt and read and len(columns) == 1 for columns, read, prompt in states]
        self._prompt_B = [prompt and not due for prompt, due in zip(self._prompt_B, self._due_B, strict=True)]
        self._read_B = [read or len(columns) > 0 for columns, read in zip(self._columns_B, self._read_B, strict=True)]
        return place_BT

    def attend(self, layer: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
        """Attention of the new tokens in one layer of the group, [B, H, T, D]."""
        self._attended = True
        if layer not in self.layers:
            empty = (t[:, :, :0] for t in (k_BKTD, v_BKTD, k_BKTD[..., 0].long(), q_BHTD))
            self.layers[layer] = [_Kept(*tables) for tables in zip(*empty, strict=True)]
        out_BHTD = torch.zeros_like(q_BHTD)
        texts = self.layers[layer]
        for row, columns in enumerate(self._columns_B):
            q, k, v = (t[row][:, columns] for t in (q_BHTD, k_BKTD, v_BKTD))
            kept = texts[row].compressed(self.policy, scale) if self._due_B[row] else texts[row]
            kept = kept.joined(k, v, self._place_BT[row, columns])
            out_BHTD[row][:, columns] = _causal(q, kept.keys_KED, kept.values_KED, scale)
            texts[row] = kept.remembering(q, self.policy.window) if self._prompt_B[row] else kept
            entries, new = kept.place_KE.shape[1], len(columns)
            self._live_LR[layer, row] += entries * new - new * (new - 1) // 2
        return out_BHTD

    def abandon(self) -> bool:
        """The pass that began does not count. Is everything that was kept before it still there?"""
        self._read_B, self._prompt_B = self._before
        return super().abandon()

    def reserve(self, tokens: int) -> bool:
        """Every pass has stores of its own."""
        return tokens > 0

    def select(self, rows_B: Tensor) -> None:
        """Make the texts of the batch those at these indices: int64."""
        super().select(rows_B)
        rows = rows_B.tolist()
        self.layers = {layer: [texts[row] for row in rows] for layer, texts in self.layers.items()}
        self._read_B, self._prompt_B = ([states[row] for row in rows] for states in (self._read_B, self._prompt_B))


def _causal(q_HTD: Tensor, k_KED: Tensor, v_KED: Tensor, scale: float) -> Tensor:
    """Attention of the last T of E tokens."""
    new, entries = q_HTD.shape[1], k_KED.shape[1]
    visible_TE = None
    if 1 < new < entries:
        visible_TE = torch.ones(new, entries, dtype=torch.bool, device=q_HTD.device).tril(entries - new)
    q, k, v = q_HTD[None], k_KED[None], v_KED[None]
    grouped, whole = len(q_HTD) != len(k_KED), new == entries
    return scaled_dot_product_attention(q, k, v, visible_TE, is_causal=whole, scale=scale, enable_gqa=grouped)[0]
