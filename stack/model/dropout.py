"""Dropout whose masks are computed from the place of an element, and not drawn one after another.

B batch, T tokens, D d_model, W blocks of eight features

The mask of an element is a function of seed, step, row of the step, layer, branch, position and
feature. It does not depend on micro-batches, ranks, recomputation or a random state. The function
is Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), in operations on int64 that are
exact on every device. Each element takes 16 bits, so a rate is one of 65536.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

ATTENTION, FEED_FORWARD = 0, 1  # the branches of a block
WORD, HALF, WHOLE = 0xFFFFFFFF, 0xFFFF, 1 << 16
PER_BLOCK = 8  # features that share one call of the generator
ROUNDS = 10
# Minus 2**32, so that a product with a word of 32 bits stays within int64.
MULTIPLIERS = 0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32)
KEY_STEPS = 0x9E3779B9, 0xBB67AE85

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10: four words of 32 random bits for each counter, as int64. Counter and key are
    words of 32 bits, as int64, of shapes that broadcast.
    """
    a, b, c, d = counter
    k, l = key  # noqa: E741
    # torch.compile folds the product of an arange and a number into a vector, which torch 2.13 does
    # wrongly for such numbers; a bitwise operation keeps it from folding.
    a, c = a & WORD, c & WORD
    for _ in range(ROUNDS):
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        # p is a·multiplier − a·2**32: adding a to its upper half gives that of the true product.
        a, b, c, d = ((q >> 32) + c) ^ b ^ k, q & WORD, ((p >> 32) + a) ^ d ^ l, p & WORD
        k, l = (k + KEY_STEPS[0]) & WORD, (l + KEY_STEPS[1]) & WORD  # noqa: E741
    return a, b, c, d


@dataclass(frozen=True)
class DropoutStream:
    """The masks of a run, by its seed of 63 bits."""

    seed: int

    def of_rows(self, step: int, rows: Sequence[int]) -> Tensor:
        """What the masks of some rows of a step are computed from, (B, 4) int64: the two words of
        the seed, the number of the row in the step of all ranks, and the step.
        """
        low, high = self.seed & WORD, self.seed >> 32
        words = [[low, high, row & WORD, step & WORD] for row in rows]
        return torch.tensor(words, dtype=torch.int64)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a forward are: their rows, as of `DropoutStream.of_rows`, and their
    positions along the row, (1, T) or (B, T) int64.
    """

    row_B4: Tensor
    position_BT: Tensor

    def at(self, index_BR: Tensor) -> "Places":
        """The places of some tokens of each row."""
        position_BT = self.position_BT.expand(len(index_BR), -1)
        return replace(self, position_BT=position_BT.gather(1, index_BR))

    def between(self, first: int, stop: int) -> "Places":
        """The places of a slice of the tokens."""
        return replace(self, position_BT=self.position_BT[:, first:stop])


def drawn_rows(n_rows: int, device: torch.device) -> Tensor:
    """Rows of a forward that belongs to no step of a run, (B, 4) int64: the seed is drawn from
    torch's random state.
    """
    row_B = torch.arange(n_rows, device=device)
    seed_2 = torch.randint(WORD + 1, (2,), device=device).expand(n_rows, 2)
    return torch.cat((seed_2, torch.stack((row_B, torch.zeros_like(row_B)), 1)), 1)


class Dropout(nn.Dropout):
    """Dropout on the output of a branch of a block. Rate and mode are those of `nn.Dropout`."""

    def __init__(self, p: float, layer: int):
        super().__init__(p)
        self.layer = layer

    @property
    def active(self) -> bool:
        """Whether a forward drops anything."""
        return self.training and self.p > 0

    def forward(self, x_BTD: Tensor, branch: int, places: Places | None) -> Tensor:
        """The elements that are kept, divided by their share; the others are 0. `places` are those
        of the tokens of `x_BTD`.
        """
        if not self.active:
            return x_BTD
        assert places is not None, "dropout needs the places of its tokens"
        n_kept = max(1, round((1 - self.p) * WHOLE))
        kept_BTD = keep_mask(places, 2 * self.layer + branch, x_BTD.shape[-1], n_kept)
        # A product and no selection: a NaN stays visible, and the backward keeps one byte.
        return x_BTD * (WHOLE / n_kept) * kept_BTD


def keep_mask(places: Places, site: int, width: int, n_kept: int) -> Tensor:
    """Which features of each token are kept, (B, T, D) bool, with probability n_kept / 65536.
    `site` is a number of 16 bits: twice the layer, plus the branch.
    """
    low, high, row, step = places.row_B4[:, None, None].unbind(-1)
    n_blocks = -(-width // PER_BLOCK)
    block_W = torch.arange(n_blocks, device=low.device) + (site << 16)
    words = philox((block_W, places.position_BT[..., None], row, step), (low, high))
    halves = [half < n_kept for word in words for half in (word & HALF, word >> 16)]
    return torch.stack(halves, -1).flatten(-2)[..., :width]
