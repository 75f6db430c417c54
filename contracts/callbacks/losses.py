"""The loss of one step, read off the gradients at its logits, as an event.

B batch, T tokens
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stackproof.contracts.callbacks.reading import Reading, Unread, read
from stackproof.contracts.callbacks.repeat import Call
from stackproof.contracts.callbacks.settings import TrainerSettings
from stackproof.contracts.events import LossMeasured


@dataclass
class LossPlace:
    """One forward pass whose loss is read when its gradient comes. `silent` (B, T-1) marks the
    places whose next token is not learned, `n_labels` counts labels, `loss` is the model's own.
    `autocast` is the type of products in the pass, None without autocast.
    """

    ids_BT: Tensor
    silent: Tensor
    n_labels: Tensor | None
    loss: Tensor | None
    closed: Tensor | None = None  # () bool: nothing is learned at the last place of a row
    autocast: torch.dtype | None = None
    call: Call | None = None  # where the pass is to be made again
    done: bool = False


class LossReader:
    """Collects the readings of all backward passes of a step, and the losses that the trainer
    reports.
    """

    def __init__(self, settings: TrainerSettings):
        self.settings = settings
        self._turn = 0
        self.reset()

    def reset(self) -> None:
        """A new step begins."""
        self._unread: list[Unread] = []
        self._reported: list[Tensor | float] = []
        self._readings: list[Reading] = []

    def tell(self, loss: Tensor | float) -> None:
        """The loss of one micro-step as the trainer computed it."""
        self._reported.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def add(self, place: LossPlace, values: Tensor, gradient: Tensor, head: Tensor | None) -> None:
        """Read one backward pass; the figures stay on the device. `values` are logits, or what
        enters a head of weight `head`.
        """
        self._turn += 1
        if head is not None and place.autocast is not None:
            values = values.to(place.autocast)  # as the head multiplies
        reading = read(
            values,
            gradient,
            place.ids_BT,
            place.silent,
            head=head,
            turn=self._turn,
            scale=self.settings.loss_scale(),
            smoothing=self.settings.smoothing,
            n_labels=place.n_labels,
            loss=place.loss,
            closed=place.closed,
        )
        self._unread.append(reading)

    def pending(self) -> tuple[list[Unread], list[Tensor]]:
        """Readings and reported losses that are still on the device."""
        return self._unread, [torch.as_tensor(x).double().reshape(1) for x in self._reported]

    def fetched(self, readings: list[Reading], reported: list[Tensor]) -> float:
        """The mean loss of the step, from the fetched values of `pending`: of the reported losses,
        or of the places that were read if none is reported. NaN if a value or gradient is not
        finite.
        """
        self._readings = readings
        if not self.finite:
            return math.nan
        return float(sum(reported)) if reported else mean_nats(self._readings)

    @property
    def finite(self) -> bool:
        """Whether all values and gradients that were read are finite."""
        return all(r.finite for r in self._readings)

    @property
    def n_expected(self) -> int:
        """Tokens to learn in this step."""
        return sum(r.n_expected for r in self._readings)

    @property
    def readings(self) -> list[Reading]:
        """The fetched readings of the step."""
        return self._readings

    def measured(self, step: int) -> LossMeasured:
        """The event of the step."""
        return loss_measured(step, self._readings, absolute=self.settings.absolute)


def loss_measured(
    step: int,
    readings: Sequence[Reading],
    *,
    n_labels: int | None = None,
    absolute: bool = True,
    reported_nats: float = math.nan,
    n_changed_rows: int | None = None,
) -> LossMeasured:
    """The event of one step from the readings of its backward passes. `n_labels` is the number of
    its labels, None where the trainer's loss may leave out some of them; `reported_nats` is the
    loss that the trainer reports, NaN where not every position is read.
    """
    offsets = [o for r in readings for o in r.offsets]
    wrong = [o for o in offsets if o != 1]
    learned = sum(r.n_learned for r in readings)
    low, high = _range([w for r in readings for w in r.weights])
    single_low, single_high = _range([w for r in readings for w in r.single_weights])
    # A loss may leave out more than labels and mask do, such as a prompt: N is then the number of
    # tokens that it learns. A trainer may count the first label of each row, which no logit
    # predicts, as transformers 5.23 does for GPT-2 (26 of 28 on short rows).
    known = (sum(r.n_expected for r in readings), learned, sum(r.n_labels for r in readings))
    counts = known if n_labels is None else (n_labels,)
    n = min(counts, key=lambda n: abs(high * n - 1))
    return LossMeasured(
        step=step,
        mean_nats=mean_nats(readings),
        n_learned=learned,
        vocab_size=max((r.vocab_size for r in readings), default=0),
        n_judged=len(offsets),
        n_off_target=len(wrong),
        offset=max(set(wrong), key=wrong.count) if wrong else 1,
        n_masked_learned=sum(r.n_masked_learned for r in readings),
        weight_min=low * n,
        weight_max=high * n,
        single_min=single_low * n,
        single_max=single_high * n,
        absolute=absolute,
        half=any(r.half for r in readings),
        reported_nats=reported_nats,
        n_changed_rows=n_changed_rows,
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest value; NaN without any, or if one is."""
    if not values or any(map(math.isnan, values)):
        return math.nan, math.nan
    return min(values), max(values)


def mean_nats(readings: Sequence[Reading]) -> float:
    """The mean loss over the places that were read, NaN without any."""
    nats = [x for r in readings for x in r.nats]
    return sum(nats) / len(nats) if nats else math.nan
