"""The loss of a step: cross-entropy as a sum over valid labels, which the caller divides once, by
the count of the whole step; and what the gates read of it in the first step of a process.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stackproof.contracts.callbacks.losses import loss_measured
from stackproof.contracts.callbacks.reading import read, resolve
from stackproof.contracts.conditions import ensure, require
from stackproof.contracts.events import LossMeasured
from stackproof.data.data_loader import Batch
from stackproof.data.packing import IGNORE_INDEX
from stackproof.distributed.tensors import is_divided, whole
from stackproof.kernels import dispatch
from stackproof.model.forward_context import ExpertLoad
from stackproof.train.state import AUTOCAST, TrainState


@require(
    lambda x_BTD, labels_BT: x_BTD.shape[:2] == labels_BT.shape,
    "features and labels agree in batch and length",
)
@ensure(lambda result: result.ndim == 0, "the sum is one number")
def linear_cross_entropy_sum(x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of −log p(label) in nats over labels that are not IGNORE_INDEX, where p =
    softmax(x·headᵀ). Returned in float32, shape (). The head may be divided along the vocabulary.
    """
    rows = x_BTD.flatten(0, 1), head_VD, labels_BT.flatten()
    if is_divided(head_VD):
        from stackproof.kernels import vocabulary_parallel

        nats = vocabulary_parallel.linear_cross_entropy(*rows, ignore_index=IGNORE_INDEX)
    else:
        nats, _ = dispatch.linear_cross_entropy(*rows, ignore_index=IGNORE_INDEX)
    return nats


def balance_term(loads: Sequence[ExpertLoad], weight: float) -> Tensor | float:
    """Weighted balance of all layers with experts, summed over tokens, shape (); 0 without any."""
    if not loads or weight == 0:
        return 0.0
    return weight * sum(load.balance_sum for load in loads)


def count_valid(labels_BT: Tensor) -> int:
    """How many labels enter the loss."""
    return int((labels_BT != IGNORE_INDEX).sum())


def is_finite(*numbers: float) -> bool:
    """No number is NaN or infinite."""
    return all(map(math.isfinite, numbers))


# --- as the gates read it -------------------------------------------------------------------------


class LossOfFirstStep:
    """Measures the loss of the first step of a process at the input of the head, at every position
    and before the update, from the hidden states and their gradient.

    While the step is taken, `state.features` is wrapped. The step's numbers stay as they are.
    """

    gates = ("loss.logit-gradient", "loss.first")

    def __init__(self) -> None:
        self.done, self.seconds = False, 0.0

    def watch(self, state: TrainState, batches: Sequence[Batch]) -> None:
        """The next passes of the model are those of `batches`, in their order."""
        if not self.done:
            self.batches, self.features, self.n_forward = batches, state.features, 0
            self.unread, self.changed = [], []
            state.features = partial(self._forward, state)

    def _forward(self, state: TrainState, *inputs: Tensor | None) -> tuple[Tensor, Any]:
        x_BTD, report = self.features(*inputs)
        batch = self.batches[self.n_forward % len(self.batches)]
        self.n_forward += 1
        x_BTD.register_hook(partial(self._read, state, batch, inputs, x_BTD.detach()))
        return x_BTD, report

    def _read(
        self,
        state: TrainState,
        batch: Batch,
        inputs: tuple[Tensor | None, ...],
        x_BTD: Tensor,
        gradient: Tensor,
    ) -> None:
        if x_BTD.shape[:2] != batch.input_ids.shape:
            return  # other rows: this micro-batch counts as left out
        began, device = time.perf_counter(), x_BTD.device
        ids_BT, labels_BT = batch.input_ids.to(device), batch.labels.to(device)
        # At the end of a piece of a document, the next token is not in the row.
        within = torch.ones_like(ids_BT[:, 1:], dtype=torch.bool)
        if batch.document_ids is not None:
            within = batch.document_ids.diff().to(device) == 0
        next_BT = labels_BT.clamp_min(0)
        next_BT[:, :-1] = torch.where(within, ids_BT[:, 1:], next_BT[:, :-1])
        dtype = AUTOCAST[state.cfg.train.dtype] or x_BTD.dtype
        unread = read(
            x_BTD.to(dtype),
            gradient,
            ids_BT,
            labels_BT == IGNORE_INDEX,
            next_BT=next_BT,
            head=whole(state.model.head_weight.detach()),
            scale=state.scaler.get_scale(),
        )
        self.unread.append(unread)
        self.changed.append(changed_rows(inputs, batch, device))
        self.seconds += time.perf_counter() - began

    def measured(
        self, state: TrainState, n_rounds: int, *, applied: bool, reported_nats: float
    ) -> LossMeasured | None:
        """The event of the step, whose gradients were computed `n_rounds` times; the last ones
        count. None after the first step, or if the update was not `applied`.
        """
        if self.done:
            return None
        began = time.perf_counter()
        self.done, state.features = applied, self.features
        if not self.done:
            return None
        n = len(self.batches)
        off = abs(len(self.unread) - n * n_rounds)  # passes that are missing or too many
        own, changed = resolve(self.unread[-n:], self.changed[-n:])
        n_labels, n_changed = state.ranks.total(
            sum(count_valid(b.labels) for b in self.batches),
            int(sum(changed)) + off * len(self.batches[0].input_ids),
        )
        event = loss_measured(
            state.step,
            [reading for readings in state.ranks.of_data_ranks(own) for reading in readings],
            n_labels=n_labels,
            reported_nats=reported_nats,
            n_changed_rows=n_changed,
        )
        self.batches, self.unread, self.changed = (), [], []
        self.seconds += time.perf_counter() - began
        return event


def changed_rows(inputs: tuple[Tensor | None, ...], batch: Batch, device: torch.device) -> Tensor:
    """Number of rows that entered a forward pass with other tokens or document ids than they were
    drawn with, (1,) float64.
    """
    drawn, entered = (batch.input_ids, batch.document_ids), (inputs[0], *inputs[2:3], None)
    changed = torch.zeros(len(batch.input_ids), dtype=torch.bool, device=device)
    for wanted, got in zip(drawn, entered):
        if wanted is None or got is None or wanted.shape != got.shape:
            changed |= wanted is not got
        else:
            changed |= (wanted.to(device) != got).any(1)
    return changed.sum(dtype=torch.float64)[None]
