"""Statistics of one batch before the forward pass, as plain numbers.

B batch, T tokens
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stackproof.contracts.callbacks.reading import IGNORE, trailing_padding
from stackproof.contracts.events import ModelInput, RowHashes

# Where padding is the end of text, a row of packed documents may begin with one or two.
LEFT_PADS = 4
SHORT = 16  # tokens; shorter rows may be equal by chance


class Numbers(NamedTuple):
    """What one copy from the device holds of a batch: counts in the order of `model_input`, and
    sums and lengths of its rows.
    """

    counts: list[int]
    rows: list[int]
    n_labels: int


def read(
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    labels_BT: Tensor | None,
    places: Tensor | None,
    *,
    pad_id: int | None,
    eos_id: int | None,
) -> Numbers:
    """All numbers of a batch that gates judge, with one copy from the device. `places` are the
    position ids, if the model is given any.
    """
    ids_BT = ids_BT.long()
    text = _text(ids_BT, mask_BT)
    padding = ~text
    if mask_BT is None and pad_id is not None:
        padding = trailing_padding(ids_BT, pad_id, eos_id)
        # The first end of text is text.
        padding &= torch.cat([torch.zeros_like(padding[:, :1]), padding[:, :-1]], 1)
    valid = torch.ones_like(text) if labels_BT is None else labels_BT != IGNORE
    same = valid & (labels_BT == ids_BT) if labels_BT is not None else torch.zeros_like(text)
    ends = torch.zeros_like(text[:, 1:])
    if eos_id is not None and (mask_BT is not None or pad_id != eos_id):
        ends = (ids_BT == eos_id)[:, 1:] & text[:, 1:] & ~padding[:, 1:] & valid[:, :-1]
    follows, up = _places_up(places, text)
    masks = (
        valid,
        valid[:, 1:],
        same,
        ends,
        ends & valid[:, 1:],
        valid & padding,
        _left_padded(ids_BT, mask_BT, pad_id),
        follows,
        up,
    )
    longest = (
        places.max() + 1
        if places is not None and places.numel()
        else torch.tensor(ids_BT.shape[1], device=ids_BT.device)
    )
    told = torch.stack([ids_BT.min(), ids_BT.max(), longest, *(m.sum() for m in masks)])
    fetched = torch.cat([told, _row_sums(ids_BT, text).flatten()]).tolist()
    return Numbers(
        fetched[: len(told)], fetched[len(told) :], 0 if labels_BT is None else labels_BT.numel()
    )


def model_input(numbers: Numbers, *, step: int, max_length: int, embedding_rows: int) -> ModelInput:
    """The event of a training batch."""
    (
        low,
        high,
        longest,
        n_valid,
        n_valid_next,
        n_same,
        n_ends,
        n_ends_learned,
        n_padded,
        n_left,
        n_places,
        n_up,
    ) = numbers.counts
    # Labels are aligned with their own token, and are not those of another task.
    own = 2 * n_same > n_valid
    return ModelInput(
        step=step,
        n_rows=len(numbers.rows) // 2,
        length=longest,
        max_length=max_length,
        min_id=low,
        max_id=high,
        embedding_rows=embedding_rows,
        n_labels=numbers.n_labels,
        n_valid=n_valid_next if own or not numbers.n_labels else n_valid,
        n_stops=n_ends if own else 0,
        n_stops_learned=n_ends_learned if own else 0,
        n_padding_labels=n_padded if own else 0,
        n_left_padded=n_left,
        n_places=n_places,
        n_places_up=n_up,
    )


def row_hashes(told: list[int], *, step: int, phase: str) -> RowHashes:
    """The event of the rows, from their sums followed by their lengths; short rows are left out."""
    rows, lengths = told[: len(told) // 2], told[len(told) // 2 :]
    return RowHashes(
        step, phase, tuple(row for row, length in zip(rows, lengths) if length >= SHORT)
    )


def _left_padded(ids_BT: Tensor, mask_BT: Tensor | None, pad_id: int | None) -> Tensor:
    """(B,) bool: rows that begin with padding before text, where no mask marks it."""
    if pad_id is None or ids_BT.shape[1] <= LEFT_PADS:
        return torch.zeros_like(ids_BT[:, 0], dtype=torch.bool)
    is_pad = ids_BT == pad_id
    taken_for_text = is_pad if mask_BT is None else is_pad & (mask_BT > 0)
    return taken_for_text[:, :LEFT_PADS].all(1) & ~is_pad.all(1)


def _places_up(places: Tensor | None, text_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens that follow a token, those of them whose position is one more); all False where
    positions have another shape.
    """
    if (
        places is None
        or places.ndim != 2
        or places.shape[1] != text_BT.shape[1]
        or places.shape[0] not in (1, text_BT.shape[0])
    ):
        return torch.zeros_like(text_BT[:, 1:]), torch.zeros_like(text_BT[:, 1:])
    follows = text_BT[:, 1:] & text_BT[:, :-1]
    return follows, follows & (places[:, 1:] - places[:, :-1] == 1)


def read_rows(ids_BT: Tensor, mask_BT: Tensor | None) -> list[int]:
    """Sums of the rows of a batch, then their lengths, with one copy from the device."""
    return _row_sums(ids_BT.long(), _text(ids_BT, mask_BT)).flatten().tolist()


def _text(ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """(B, T) bool: what is not padding; everything if there is no mask."""
    return torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT > 0


def _row_sums(ids_BT: Tensor, text_BT: Tensor) -> Tensor:
    """(2, B) int64: per row the wrapping sum of id times a key of the token's place in its text,
    and the row's length.

    Padding on either side does not count. Unequal rows have equal sums with a chance of 2^-64.
    """
    rank_BT = text_BT.long().cumsum(1)
    keys_BT = (rank_BT * 0x1E3779B97F4A7C15 ^ rank_BT << 29) * 0x3F58476D1CE4E5B9
    return torch.stack(
        [((ids_BT + 1) * (keys_BT ^ keys_BT >> 31) * text_BT).sum(1), rank_BT[:, -1]]
    )
