"""One batch on its way into a model, in plain numbers.

B batch, T tokens
"""

import torch
from torch import Tensor

from contracts.callbacks.reading import IGNORE, trailing_padding
from contracts.witness import BatchSeen


def describe(
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    labels_BT: Tensor | None,
    places: Tensor | None,
    *,
    step: int,
    pad_id: int | None,
    eos_id: int | None,
    max_length: int,
    embedding_rows: int,
) -> BatchSeen:
    """What the gate of batches judges, with one read of the device. `places` are position ids, where the model is given some."""
    ids_BT = ids_BT.long()
    text = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT > 0
    padding = ~text
    if mask_BT is None and pad_id is not None:
        padding = trailing_padding(ids_BT, pad_id, eos_id)
        padding &= torch.cat([torch.zeros_like(padding[:, :1]), padding[:, :-1]], 1)  # one end of text is text
    valid = torch.ones_like(text) if labels_BT is None else labels_BT != IGNORE
    same = valid & (labels_BT == ids_BT) if labels_BT is not None else torch.zeros_like(text)
    ends = torch.zeros_like(text[:, 1:])
    if eos_id is not None and (mask_BT is not None or pad_id != eos_id):
        ends = (ids_BT == eos_id)[:, 1:] & text[:, 1:] & ~padding[:, 1:] & valid[:, :-1]
    masks = (valid, valid[:, 1:], same, ends, ends & valid[:, 1:], valid & padding)
    longest = places.max() + 1 if places is not None and places.numel() else torch.tensor(ids_BT.shape[1], device=ids_BT.device)
    told = torch.stack([ids_BT.min(), ids_BT.max(), longest, *(m.sum() for m in masks)]).tolist()
    low, high, longest, n_valid, n_valid_next, n_same, n_ends, n_ends_learned, n_padded = map(int, told)
    own = 2 * n_same > n_valid  # labels stand with their own token, and are not those of another task
    return BatchSeen(
        step=step,
        n_rows=ids_BT.shape[0],
        length=longest,
        max_length=max_length,
        min_id=low,
        max_id=high,
        embedding_rows=embedding_rows,
        n_labels=0 if labels_BT is None else labels_BT.numel(),
        n_valid=n_valid_next if own or labels_BT is None else n_valid,
        n_stops=n_ends if own else 0,
        n_stops_learned=n_ends_learned if own else 0,
        n_padding_labels=n_padded if own else 0,
    )
