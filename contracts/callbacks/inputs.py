"""The batches that enter a model, as events.

B batch, T tokens
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks import probe
from stackproof.contracts.callbacks.reading import IGNORE, trailing_padding
from stackproof.contracts.callbacks.settings import TrainerSettings
from stackproof.contracts.callbacks.text import TextReader
from stackproof.contracts.events import IdsRead, ModelInput, ModuleModes, RowHashes

# Where padding is the end of text, a row of packed documents may begin with one or two.
LEFT_PADS = 4
SHORT = 16  # tokens; shorter rows may be equal by chance
SPREAD = 4
STATES = 64


class InputReader:
    """Reads each batch before the forward pass. `batch` is the one that the trainer drew last; its
    mask and labels are used where the model is not given any.
    """

    def __init__(self, model: nn.Module, settings: TrainerSettings, tokenizer: Any = None):
        self.model, self.settings, self.text = model, settings, TextReader(tokenizer)
        self.batch: Mapping[str, Any] = {}
        self.epoch: int | None = None  # None where the trainer does not state it
        self.max_length = probe.max_length_of(model)
        self.embedding_rows = probe.embedding_rows(model)
        self.dropouts = [Dropout(*found) for found in _dropouts(model)]
        self.idle: set[str] = set()  # dropouts that were off inside of a training pass
        self._last: tuple[int, tuple[int, ...]] = (0, ())
        self._states: deque[bytes] = deque(maxlen=STATES)  # of random numbers

    def watch_modes(self) -> list:
        """Hooks that find the dropouts which a model switches off inside of its forward pass, at
        SPREAD of them.
        """
        spread = self.dropouts[:: max(1, len(self.dropouts) // SPREAD)]
        return [d.module.register_forward_pre_hook(d.noting(self.idle)) for d in spread]

    def training(
        self, step: int, module: nn.Module, named: Mapping[str, Any], ids_BT: Tensor
    ) -> Iterator[ModelInput | IdsRead | RowHashes | ModuleModes]:
        """The events of one training batch; `named` are the arguments of the call of `module`."""
        places, pad_id = named.get("position_ids"), self.settings.pad_id
        mask, labels = self.mask_and_labels(ids_BT, named)
        given = named.get(probe.MASK)
        if mask is None and given is not None:
            # A mask of another shape marks padding that is not read here.
            pad_id, places = None, None
        counts, rows = read(
            ids_BT,
            mask,
            labels,
            places if isinstance(places, Tensor) else None,
            pad_id=pad_id,
            eos_id=self.settings.eos_id,
            masked=given is not None,
        )
        yield ModelInput(
            step=step,
            n_rows=len(ids_BT),
            max_length=self.max_length,
            embedding_rows=self.embedding_rows,
            n_labels=0 if labels is None else labels.numel(),
            **counts,
        )
        text_BT = _text(ids_BT, mask)
        if event := self.text.read(step, "training", ids_BT, text_BT):
            yield event
        # A second pass over a batch, as with two masks of dropout, draws nothing.
        drawn, self._last = self._last != (step, rows), (step, rows)
        yield RowHashes(step, "training", rows, self.epoch if drawn else None)
        off = {d.name for d in self.dropouts if d.is_off()} | self.idle
        self.idle.clear()
        yield ModuleModes(step, "training", tuple(sorted(off)), None, self._draws_again(ids_BT))

    def _draws_again(self, ids_BT: Tensor) -> bool:
        """Whether a pass with dropout begins with the random state of one before it."""
        if not any(d.module.training and not d.is_off() for d in self.dropouts):
            return False
        device = ids_BT.device
        on_gpu = device.type == "cuda"
        state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
        digest = hashlib.sha256(state.numpy().tobytes()).digest()
        again = digest in self._states
        self._states.append(digest)
        return again

    def evaluation(
        self, step: int, module: nn.Module, named: Mapping[str, Any], ids_BT: Tensor
    ) -> Iterator[ModuleModes | RowHashes | IdsRead]:
        """The modules in training mode, and the rows of one held-out batch; no rows where they are
        short, and for steps of generation.
        """
        wrong = tuple(n for n, m in self.model.named_modules() if m.training)
        yield ModuleModes(step, "evaluation", wrong)
        generates = named.get("past_key_values") is not None
        if not (module.training or generates or ids_BT.shape[1] < SHORT):
            mask = _fitting(named.get(probe.MASK), ids_BT)
            rows = read_rows(ids_BT, mask)
            yield RowHashes(step, "evaluation", rows, None, self.settings.held_out_declared)
            if event := self.text.read(step, "evaluation", ids_BT, _text(ids_BT, mask)):
                yield event

    def mask_and_labels(
        self, ids_BT: Tensor, named: Mapping[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mask and labels of a batch: those that the model is given, else those of the batch that
        the trainer drew, if its ids are the same.
        """
        mask, labels = named.get(probe.MASK), probe.labels_of(named)
        own = probe.ids_of(self.batch)
        same = own is not None and own.shape == ids_BT.shape
        if same and torch.equal(own.to(ids_BT.device), ids_BT):
            mask = self.batch.get(probe.MASK) if mask is None else mask
            labels = probe.labels_of(self.batch) if labels is None else labels
        return _fitting(mask, ids_BT), _fitting(labels, ids_BT)


@dataclass(frozen=True)
class Dropout:
    """One module with dropout: its name, the attribute of its probability, and the part around it
    that has parameters.
    """

    name: str
    module: nn.Module
    attribute: str
    part: nn.Module

    def is_off(self) -> bool:
        """Whether it is off by mode, or its probability has become 0, in a part that is trained."""
        off = not self.module.training or not getattr(self.module, self.attribute)
        return off and any(p.requires_grad for p in self.part.parameters())

    def noting(self, names: set[str]) -> Callable:
        """A hook that notes where a forward pass with gradients runs with it off."""

        def note(module: nn.Module, args: tuple) -> None:
            if torch.is_grad_enabled() and self.is_off():
                names.add(self.name)

        return note


def _dropouts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Modules with a probability of dropout above 0: of their own, or as an attribute whose name
    has `drop` in it, for a function that takes it.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        own = isinstance(module, nn.modules.dropout._DropoutNd)
        found = [k for k in vars(module) if "drop" in k] if not own else ["p"]
        rates = {k: getattr(module, k) for k in found}
        if used := [k for k, v in rates.items() if isinstance(v, float) and 0 < v < 1]:
            around = [name]
            while around[-1]:
                around.append(around[-1].rpartition(".")[0])
            parts = (modules[n] for n in around if any(True for _ in modules[n].parameters()))
            yield name, module, used[0], next(parts, model)


def _fitting(value: Any, ids_BT: Tensor) -> Tensor | None:
    """A tensor with one entry for each id, on the device of the ids; None for anything else."""
    fits = isinstance(value, Tensor) and value.shape == ids_BT.shape
    return value.to(ids_BT.device) if fits else None


# --- numbers of one batch, with one copy from the device ------------------------------------------


def read(
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    labels_BT: Tensor | None,
    places: Tensor | None,
    *,
    pad_id: int | None,
    eos_id: int | None,
    masked: bool = True,
) -> tuple[dict[str, int], tuple[int, ...]]:
    """(the fields of ModelInput that depend on values, hashes of the rows). `places` are the
    position ids, if the model is given any; `masked` is whether it is given the mask.
    """
    ids_BT = ids_BT.long()
    text = _text(ids_BT, mask_BT)
    padding = ~text
    if mask_BT is None and pad_id is not None:
        padding = trailing_padding(ids_BT, pad_id, eos_id)
        # The first end of text is text.
        padding &= torch.cat([torch.zeros_like(padding[:, :1]), padding[:, :-1]], 1)
    no_labels = labels_BT is None
    valid = torch.ones_like(text) if no_labels else labels_BT != IGNORE
    same = torch.zeros_like(text) if no_labels else valid & (labels_BT == ids_BT)
    # Labels are aligned with their own token, and are not those of another task.
    own = 2 * same.sum() > valid.sum()
    ends = torch.zeros_like(text[:, 1:])
    if eos_id is not None and (mask_BT is not None or pad_id != eos_id):
        ends = (ids_BT == eos_id)[:, 1:] & text[:, 1:] & ~padding[:, 1:] & valid[:, :-1]
    follows, up = _places_up(places, text)
    longest = ids_BT.new_tensor(ids_BT.shape[1])
    if places is not None and places.numel():
        longest = places.max() + 1
    counts = {
        "min_id": ids_BT.min(),
        "max_id": ids_BT.max(),
        "length": longest,
        "n_valid": torch.where(own | no_labels, valid[:, 1:].sum(), valid.sum()),
        "n_stops": (ends & own).sum(),
        "n_stops_learned": (ends & valid[:, 1:] & own).sum(),
        "n_padding_labels": (valid & padding & own).sum(),
        "n_left_padded": (
            _left_padded(ids_BT, mask_BT, pad_id) | (~text[:, 0] & text.any(1) & (not masked))
        ).sum(),
        "n_places": follows.sum(),
        "n_places_up": up.sum(),
    }
    sums = _row_sums(ids_BT, text)
    fetched = torch.cat([torch.stack(list(counts.values())), sums.flatten()]).tolist()
    return dict(zip(counts, fetched)), _hashes(fetched[len(counts) :])


def read_rows(ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[int, ...]:
    """Hashes of the rows of a batch."""
    return _hashes(_row_sums(ids_BT.long(), _text(ids_BT, mask_BT)).flatten().tolist())


def _hashes(sums: list[int]) -> tuple[int, ...]:
    """The sums of rows, which are followed by their lengths; short rows are left out."""
    rows, lengths = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    return tuple(row for row, length in zip(rows, lengths) if length >= SHORT)


def _left_padded(ids_BT: Tensor, mask_BT: Tensor | None, pad_id: int | None) -> Tensor:
    """(B,) bool: rows that begin with padding before text, where no mask marks it."""
    if pad_id is None or ids_BT.shape[1] <= LEFT_PADS:
        return torch.zeros_like(ids_BT[:, 0], dtype=torch.bool)
    is_pad = ids_BT == pad_id
    unmasked = is_pad & _text(ids_BT, mask_BT)
    return unmasked[:, :LEFT_PADS].all(1) & ~is_pad.all(1)


def _places_up(places: Tensor | None, text_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens that follow a token, those of them whose position is one more); all False where
    positions have another shape.
    """
    n_rows, length = text_BT.shape
    if places is None or places.shape not in ((1, length), (n_rows, length)):
        return (torch.zeros_like(text_BT[:, 1:]),) * 2
    follows = text_BT[:, 1:] & text_BT[:, :-1]
    return follows, follows & (places[:, 1:] - places[:, :-1] == 1)


def _text(ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """(B, T) bool: what is not padding; everything without a mask."""
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
