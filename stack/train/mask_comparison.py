"""The dropout masks of all ranks in a step, compared with those of one process and one another.

T tokens, D d_model

A mask is that of one row behind one branch, on the slice of the row that its rank holds. Masks are
computed again from the places that the forward of the step was given, by the modules that it used.
"""

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stackproof.contracts.events import MasksCompared
from stackproof.model.dropout import ATTENTION, FEED_FORWARD, Dropout, DropoutStream, Places
from stackproof.model.transformer import Transformer
from stackproof.spec.canonical import sha256_bytes
from stackproof.train.state import TrainState

# Kept and dropped elements of a mask; with fewer, two masks may be equal by chance.
TELLING_MIN = 32


class PlacesWatch:
    """Keeps the places that the forwards of a model are given, until `end`."""

    def __init__(self, model: Transformer):
        self.model, self.seen = model, []
        inner = model.forward_context

        def watched(*inputs):
            context = inner(*inputs)
            self.seen.append(context.places)
            return context

        model.forward_context = watched

    def end(self, n: int) -> list[Places | None]:
        """The places of the last `n` forwards."""
        del self.model.__dict__["forward_context"]
        return self.seen[-n:]


@dataclass(frozen=True)
class Masks:
    """The masks of a rank: how many, how many of them are not those of one process, and SHA-256 of
    those that no other mask equals by chance.
    """

    n: int
    n_foreign: int
    telling: tuple[str, ...]


@torch.no_grad()
def masks_held(
    state: TrainState, stream: DropoutStream, step: int, seen: Sequence[Places | None]
) -> Masks:
    """The masks of this rank in a step, of the places that its micro-steps were `seen` with.
    `stream` is that of one process.
    """
    cfg, sizes = state.cfg.model, state.ranks.sizes
    index_1T = torch.arange(cfg.max_seq_len, device=state.device)[None]
    n, n_foreign, telling = 0, 0, []
    for i, places in enumerate(seen):
        n_rows = len(places.row_B4)
        first = (i * sizes.n_data_ranks + state.ranks.data_rank) * n_rows
        row_B4 = stream.of_rows(step, range(first, first + n_rows)).to(state.device)
        for layer, block in enumerate(state.model.layers):
            alone = Dropout(cfg.dropout, layer)
            for branch in (ATTENTION, FEED_FORWARD):
                ones = torch.ones(n_rows, cfg.max_seq_len, cfg.d_model, device=state.device)
                wanted = alone(ones, branch, Places(row_B4, index_1T)).chunk(sizes.tensor, 1)
                wanted = wanted[state.ranks.rank % sizes.tensor]
                found = block.dropout(torch.ones_like(wanted), branch, places)
                for mask_TD, wanted_TD in zip(found != 0, wanted != 0, strict=True):
                    n += 1
                    n_foreign += not torch.equal(mask_TD, wanted_TD)
                    if min(int(mask_TD.sum()), int((~mask_TD).sum())) >= TELLING_MIN:
                        telling.append(digest(mask_TD))
    return Masks(n, n_foreign, tuple(telling))


def digest(mask_TD: Tensor) -> str:
    """SHA-256 of the bits of a mask."""
    return sha256_bytes(np.packbits(mask_TD.cpu().numpy()).tobytes())


def compare_masks(
    step: int, found: Sequence[Masks], before: Set[str]
) -> tuple[MasksCompared, set[str]]:
    """The event of a step from the masks of all ranks, and their digests; `before` are those of the
    step that was compared last.
    """
    times = Counter(name for masks in found for name in masks.telling)
    n_repeated = sum(n - (name not in before) for name, n in times.items())
    event = MasksCompared(
        step=step,
        n_masks=sum(masks.n for masks in found),
        n_foreign=sum(masks.n_foreign for masks in found),
        n_repeated=n_repeated,
        n_telling=times.total(),
    )
    return event, set(times)
