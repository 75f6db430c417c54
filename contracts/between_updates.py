"""Whether weights or optimizer state change between two updates."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.checksums import checksums
from stackproof.contracts.events import SINCE_UPDATE, StateCompared

# Tensors are compared whole in the first updates, then one section of this many at each.
SECTIONS = 16
SETTLED = 4  # updates
RATES = ("lr", "momentum", "params")
Mark = tuple[int, int, int]


def _mark(tensor: Tensor) -> Mark:
    """What changes with every write to a tensor, but for one through `.data`."""
    return id(tensor), tensor.data_ptr(), tensor._version


class BetweenUpdates:
    """Compares weights and optimizer state before an update with those after the last one.

    The tensor's version shows a write without reading its numbers. Sums of all bits show whether
    it changed anything, as a swap that is undone does not. They also find writes that a version
    does not count: in all tensors in the first SECTIONS updates, in one section of tensors later.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer
        self._names, self._parameters = map(list, zip(*model.named_parameters()))
        self._updates = 0
        self._marks: dict[tuple[int, str], Mark] = {}
        self._sums: dict[tuple[int, str], int] = {}
        self._settings: dict[str, Any] = {}
        self._scheduled: set[str] = set()
        self.settle(checksums(self._parameters))

    def settle(self, weight_sums: Tensor | None = None, *, updated: bool = False) -> None:
        """Accept the state as it is, as after an update; `weight_sums` are those of all weights.
        Without them only the tensors that are due are summed.
        """
        self._updates += updated
        found = dict(self._tensors())
        self._marks = {key: _mark(t) for key, t in found.items()}
        due = [k for k in found if (k[1] or weight_sums is None) and self._is_due(k)]
        sums = checksums(found[key] for key in due).tolist() if due else []
        self._settings = self._group_settings()
        self._sums = dict(zip(due, sums))
        if weight_sums is not None:
            weights = [key for key in found if not key[1]]
            self._sums |= dict(zip(weights, weight_sums.tolist()))

    def compare(self, step: int, *, whole: bool) -> StateCompared:
        """The parts that have changed since `settle`; with `whole`, all weights are looked at."""
        found = dict(self._tensors())
        gone = [key for key in self._marks if key not in found]
        written = {key for key in found if self._marks.get(key) != _mark(found[key])}
        looked = [
            key
            for key in found
            if key in self._sums and (key in written or self._is_due(key) or (whole and not key[1]))
        ]
        sums = checksums(found[key] for key in looked).tolist() if looked else []
        changed = [key for key, now in zip(looked, sums) if now != self._sums[key]]
        # State of which no sum was kept: a write in place changes it, a copy may be equal.
        unsummed = written - set(looked)
        changed += [key for key in unsummed if self._is_in_place(key, found[key])]
        names = tuple(map(self._name, sorted(set(gone + changed)))) + self._reset()
        if whole or self._updates < SECTIONS:
            names += self._replaced()
        n = len(looked) + len(unsummed) + len(self._settings)
        return StateCompared(step, SINCE_UPDATE, n, names)

    def _replaced(self) -> tuple[str, ...]:
        """Parameters of the model that were not there when it was first seen."""
        known = set(map(id, self._parameters))
        return tuple(n for n, p in self.model.named_parameters() if id(p) not in known)

    def _reset(self) -> tuple[str, ...]:
        """Settings of the optimizer's groups that were constant and have changed. Those that change
        before SETTLED updates have a schedule.
        """
        now = self._group_settings()
        differing = {k for k, v in self._settings.items() if now.get(k) != v}
        if self._updates < SETTLED:
            self._scheduled |= differing
        return tuple(sorted(differing - self._scheduled))

    def _group_settings(self) -> dict[str, Any]:
        """Numbers by which the optimizer's groups update, but for their rates."""
        return {
            f"{name} of group {i}": value
            for i, group in enumerate(self.optimizer.param_groups)
            for name, value in group.items()
            if isinstance(value, (int, float, tuple)) and not any(r in name for r in RATES)
        }

    def _is_due(self, key: tuple[int, str]) -> bool:
        sections = min(SECTIONS, len(self._parameters))
        return self._updates < SECTIONS or key[0] % sections == self._updates % sections

    def _is_in_place(self, key: tuple[int, str], tensor: Tensor) -> bool:
        before = self._marks.get(key)
        return before is not None and before[:2] == _mark(tensor)[:2]

    def _tensors(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """Weights, of an empty second key, and the optimizer's state of each."""
        state = self.optimizer.state
        for i, p in enumerate(self._parameters):
            yield (i, ""), p
            for name, value in state.get(p, {}).items():
                if isinstance(value, Tensor) and value.numel():
                    yield (i, str(name)), value

    def _name(self, key: tuple[int, str]) -> str:
        return f"{key[1]} of {self._names[key[0]]}" if key[1] else self._names[key[0]]
