"""What a SepCache asks of the layers that share their bookkeeping."""

from typing import Protocol

from torch import Tensor

from megatron_sep.generate.layout import Layout


class Group(Protocol):
    """Layers that share their bookkeeping; rows R are texts, or the key heads of texts (b-major)."""

    num_layers: int
    batch: int
    """Texts: B."""
    seen_R: Tensor
    """Integers: tokens of each row's text so far; padding does not count here and below."""
    live_R: Tensor
    """Numbers: tokens that each token saw, itself included, summed over the tokens."""
    full_R: Tensor
    """Integers: the same with everything kept."""

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""

    def blocks(self) -> dict[str, Tensor]:
        """Slots in use by block: numbers [R] each."""

    def begin(self, ids_BT: Tensor, layout: Layout) -> Tensor:
        """Take new tokens in, int64 [B, T]. Returns the position ids that the model rotates them by, int64 [B, T]."""

    def attend(self, layer: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
        """Attention of the new tokens in a layer, counted within the group: [B, H, T, D]; keys and values are kept."""

    def end(self) -> None:
        """All layers have attended: what nothing will see leaves."""

    def abandon(self) -> bool:
        """The pass that began does not count. Is everything that was kept before it still there?"""

    def room(self) -> bool:
        """Make sure of room for one more token of each text; were stores replaced?"""

    def reserve(self, tokens: int) -> bool:
        """Make room for so many more tokens of each text; were stores replaced?"""

    def replayed(self) -> None:
        """A CUDA graph of a step has run once more. Raises RuntimeError where none can."""

    def select(self, rows_B: Tensor) -> None:
        """Make the texts of the batch those at these indices: int64, repeated or left out as they may be."""
