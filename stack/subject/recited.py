"""What a gate counts by itself of the passages that a model recites.

N passages, W tokens each.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from stackproof.contracts.events import Recited
from stackproof.data.data_loader import Batch
from stackproof.evaluate.bits_per_byte import evaluating
from stackproof.evaluate.memorization import ROWS_AT_ONCE
from stackproof.train.state import TrainState

PASSAGES, PASSAGE_TOKENS = 32, 64  # as the gate declares; not those of the measurement


def recited(state: TrainState, read: Sequence[Batch], unread: Sequence[Batch]) -> Recited:
    """Counts of passages of the training batches `read`, and of held-out ones. All ranks call it.

    It shares no selection and no forward with the measurement that it is compared with.
    """
    read_NW, unread_NW = cut(read), cut(unread)
    matches, n_asked = matched(state, read_NW), read_NW.shape[1] - read_NW.shape[1] // 2
    held_out = partial(_n_whole, state, unread_NW, n_asked)
    return Recited(
        n_windows=len(matches),
        n_recited=sum(n == n_asked for n in matches),
        prefix_tokens=read_NW.shape[1] // 2,
        matched_tokens=sum(matches) / max(1, len(matches)),
        n_held_out=len(unread_NW),
        held_out=state.ranks.ahead(held_out),
    )


def cut(batches: Sequence[Batch]) -> Tensor:
    """Passages (N, W) of the rows of some batches that lie within one document and have labels, the
    first of every row before the second of any.
    """
    width = min(PASSAGE_TOKENS, batches[0].input_ids.shape[1])
    # (rows, places, W) to (places, rows, W)
    ids, labels = (
        torch.cat([getattr(b, name) for b in batches]).unfold(1, width, width).transpose(0, 1)
        for name in ("input_ids", "labels")
    )
    whole = torch.ones(ids.shape[:2], dtype=torch.bool)
    if batches[0].document_ids is not None:
        documents = torch.cat([b.document_ids for b in batches])
        documents = documents.unfold(1, width, width).transpose(0, 1)
        whole = documents.amin(-1) == documents.amax(-1)
        whole &= ~(labels[..., : width - 1] < 0).any(-1)
    return ids[whole][:PASSAGES]


def matched(state: TrainState, ids_NW: Tensor) -> list[int]:
    """Tokens of the second half of each passage that are most likely after the tokens before them,
    up to the first that is not.
    """
    matches = []
    with evaluating(state.model):
        # As many rows at once as were measured: experts with a capacity serve a whole batch.
        for rows in ids_NW.to(state.device).split(ROWS_AT_ONCE):
            with state.autocast():
                best = state.model(rows[:, :-1]).argmax(-1)
            for wrong in (best != rows[:, 1:])[:, rows.shape[1] // 2 - 1 :].tolist():
                matches.append([*wrong, True].index(True))
    return matches


def _n_whole(state: TrainState, ids_NW: Tensor, n_asked: int) -> int:
    return sum(n == n_asked for n in matched(state, ids_NW))
