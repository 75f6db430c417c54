"""Compares the ranks of a run of another trainer: their identity, weights, rows and gradients.
Small documents are exchanged once per step, before its update.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stackproof.contracts.callbacks.reading import Reading
from stackproof.contracts.callbacks.repeat import (
    MAX_RANKS,
    StepRepeat,
    sketch_size,
    step_repeated,
    weights_compared,
    weights_of,
)
from stackproof.contracts.callbacks.session import Session
from stackproof.contracts.callbacks.settings import Trained, TrainerSettings
from stackproof.contracts.checksums import checksums
from stackproof.contracts.distributed import compare_parts
from stackproof.contracts.events import RanksJoined, ReplicasCompared, RowsDealt, StepRepeated
from stackproof.spec.canonical import sha256_file
from stackproof.spec.provenance import environment

COMPARED_EVERY = 64  # steps between comparisons of replicas, besides the first and the end
# What may differ between the machines of one run.
OF_A_MACHINE = ("device", "device_uuid", "cpu_count", "os", "allocator", "world_size")
ROWS_GATE, STEP_GATE = "distributed.rows", "distributed.one-process-step"
REPLICAS_GATE = "distributed.replicas"
LOGGED_STEPS = 64
ROWS_MIN = 8  # of each rank, before its rows are judged
KEPT_ROWS = 2**17  # of an epoch, of all ranks
NO_GROUP = "this process trains in no group with others"
SHARDED = "parameters are divided among the ranks, which this adapter does not assemble"
LATE = "the trainer has updated the weights before its gradient could be compared"


class RankWatch:
    """Compares the ranks of one run. In a run of one process it does nothing.

    With `late` a step is judged after its update, so that its gradient cannot be computed again.
    """

    def __init__(
        self, session: Session, trained: Trained, settings: TrainerSettings, *, late: bool
    ):
        self.session, self.trained, self.settings = session, trained, settings
        self.ranks = session.ranks
        self.rows: list[int] = []  # hashes of the rows of this step
        self.epoch: int | None = None  # None where the trainer does not state it
        self.reported: dict[str, float] | None = None
        self.repeat: StepRepeat | None = None
        self._exchanged = -1
        self._first, self._even = True, True
        self._losses: list[float] | None = []  # of the steps before the first log
        if self.ranks.world_size == 1:
            return
        self._ledger = RowLedger(self.ranks.world_size)
        self._late = late
        if any(map(_is_sharded, trained.model.modules())):
            session.leave_out(REPLICAS_GATE, SHARDED)
            session.leave_out(STEP_GATE, SHARDED)
        elif not late and self.ranks.world_size <= MAX_RANKS:
            size = sketch_size(self.ranks.world_size)
            self.repeat = StepRepeat(trained.model, size)
            self.repeat.wanted = STEP_GATE in session.keeper.states

    def begin(self) -> None:
        """Compare the ranks, their weights and optimizer state before step 1."""
        step = self.trained.first_step
        if self.ranks.n_started == 1:
            return
        document = identity(self.trained, self.session)
        found = self.session.exchange((document, self._parts(step)))
        n, differing = compare_parts([one for one, _ in found])
        n, sizes = n or len(document), (self.ranks.world_size, self.ranks.n_started)
        if self.ranks.world_size == 1:
            for gate_id in (ROWS_GATE, STEP_GATE, REPLICAS_GATE):
                self.session.leave_out(gate_id, NO_GROUP)
        self._observe(RanksJoined(step, *sizes, n, differing))
        if self.ranks.world_size > 1:
            self._replicas(step, [parts for _, parts in found])

    def before_update(
        self, step: int, readings: Sequence[Reading], loss_nats: float, factor: float
    ) -> None:
        """All that is known of a step before its update. `readings` are those of its loss, `factor`
        is what its gradient was divided by since the last backward pass.
        """
        if self.ranks.world_size == 1 or step == self._exchanged:
            return
        self._exchanged = step
        document = {"at": step, "rows": self.rows, "epoch": self.epoch}
        self.rows = []
        if self._first or self._even:
            document["weights"] = weights_of(readings)
        if self.repeat and self.repeat.wanted:
            document["gradient"] = self.repeat.end(factor) | {"unknown": self.repeat.unknown}
        if step == self.trained.first_step + 2 or step % COMPARED_EVERY == 0:
            document["parts"] = self._parts(step - (not self._late))
        if self._losses is not None:
            self._losses.append(loss_nats)
        document |= self._logged_since()
        self._judge(step, self.session.exchange(document))

    def saving(self, step: int) -> bool:
        """The trainer saves, on every rank: compare the replicas. Returns whether their gate is in
        this run.
        """
        if self.ranks.world_size == 1 or REPLICAS_GATE not in self.session.keeper.states:
            return False
        document = {"at": f"save {step}", "parts": self._parts(step), "rows": []}
        self._judge(step, self.session.exchange(document))
        return True

    def end(self, step: int) -> None:
        """Training has ended on every rank."""
        if self.ranks.world_size == 1:
            return
        document = {"at": "end", "parts": self._parts(step), "rows": []} | self._logged_since()
        self._judge(step, self.session.exchange(document))
        if not self._ledger.judged:
            self.session.leave_out(ROWS_GATE, self._ledger.why)

    def logged(self, loss: float) -> None:
        """The trainer logs a loss as the mean over all ranks and the steps since its last log. The
        first is compared, if so few steps came before that their sum in float32 is exact enough.
        """
        losses, self._losses = self._losses, None
        if losses and len(losses) <= LOGGED_STEPS:
            self.reported = {"logged": loss, "own": sum(losses) / len(losses)}

    def _logged_since(self) -> dict[str, Any]:
        reported, self.reported = self.reported, None
        return {} if reported is None else {"reported": reported}

    def _observe(self, event: RanksJoined | RowsDealt | StepRepeated | ReplicasCompared) -> None:
        with self.session.alike():
            self.session.observe(event)

    def _judge(self, step: int, found: Sequence[Mapping[str, Any]]) -> None:
        places = {str(one["at"]) for one in found}
        if len(places) > 1:
            # The ranks have taken different numbers of steps, and cannot be compared any more.
            self._observe(ReplicasCompared(step, 1, ("number of steps",)))
            self.ranks = self.session.alone()
            return
        if event := self._ledger.dealt(step, [one["rows"] for one in found], found[0].get("epoch")):
            self._observe(event)
        if "weights" in found[0]:
            self._step(step, found)
        if "parts" in found[0]:
            self._replicas(found[0]["parts"].get("step", step), [one["parts"] for one in found])
        if all("reported" in one for one in found):
            self._logged(step, [one["reported"] for one in found])

    def _step(self, step: int, found: Sequence[Mapping[str, Any]]) -> None:
        """Compare the gradient of the first step, and the weights of tokens in the first step where
        the ranks have unequal numbers of them.
        """
        declared = self.settings.mean_of_ranks
        weights = [one["weights"] for one in found]
        uneven = len({tuple(one["counts"]) for one in weights}) > 1
        if self._first:
            documents = [one["weights"] | one.get("gradient", {}) for one in found]
            if "gradient" in found[0]:
                event = step_repeated(step, self.repeat.names, documents, declared)
            else:
                reason = LATE if self._late else f"more than {MAX_RANKS} ranks are not compared"
                event = StepRepeated(step, 0, {}, "", {}, reason)
            self._observe(event)
        elif uneven:
            self._observe(weights_compared(step, weights, declared))
        self._first, self._even = False, self._even and not uneven

    def _logged(self, step: int, found: Sequence[Mapping[str, float]]) -> None:
        mean = sum(one["own"] for one in found) / len(found)
        error = max(abs(one["logged"] - mean) for one in found) / max(abs(mean), 1e-30)
        if error == error:
            self._observe(StepRepeated(step, len(found), {"loss": error}, "", {}))

    def _replicas(self, step: int, found: Sequence[Mapping[str, Any]]) -> None:
        if REPLICAS_GATE in self.session.keeper.states:
            n, differing = compare_parts(found)
            names = tuple(sorted(f"{name}{odd_ranks(name, found)}" for name in differing))
            self._observe(ReplicasCompared(step, n, names))

    def _parts(self, step: int) -> dict[str, Any]:
        if self.ranks.world_size == 1 or REPLICAS_GATE not in self.session.keeper.states:
            return {}
        return parts_held(self.trained, step)


def odd_ranks(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The ranks that hold another value of a part than most of them do; empty where no value is
    that of most ranks, as on two.
    """
    values = {rank: repr(one[name]) for rank, one in enumerate(found) if name in one}
    common, n = Counter(values.values()).most_common(1)[0]
    if 2 * n <= len(values):
        return ""
    return f" on rank {', '.join(str(r) for r, v in values.items() if v != common)}"


def identity(trained: Trained, session: Session) -> dict[str, Any]:
    """What must be the same on all ranks: code, versions, configuration and data."""
    device = str(next(trained.model.parameters()).device)
    facts = {k: v for k, v in environment(device).items() if k not in OF_A_MACHINE}
    files = {"script": sys.argv[0], "code of the model": _source(type(trained.model))}
    facts |= {name: sha256_file(Path(p)) for name, p in files.items() if p and Path(p).is_file()}
    facts |= {"spec": session.spec.sha256, "gates": sorted(session.keeper.states)}
    return facts | {f"configuration: {k}": str(v) for k, v in session.configured.items()}


def _source(kind: type) -> str | None:
    try:
        return inspect.getsourcefile(kind)
    except TypeError:
        return None  # defined in an interactive session


def parts_held(trained: Trained, step: int) -> dict[str, Any]:
    """What every replica holds, by name: checksums of weights, buffers and optimizer state, rates
    and counters. Statistics of batch normalization are those of each rank.
    """
    model, optimizer, scheduler = trained.model, trained.optimizer, trained.scheduler
    tensors = {f"weights.{n}": p for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            buffers = module.named_buffers(prefix=name, recurse=False)
            tensors |= {f"buffers.{n}": b for n, b in buffers}
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(owned):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{i}.{name}"] = value
    tensors = {n: t for n, t in tensors.items() if t.numel()}
    parts: dict[str, Any] = dict(zip(tensors, checksums(tensors.values()).tolist()))
    for i, group in enumerate(optimizer.param_groups):
        parts |= {f"group.{i}.{k}": float(group[k]) for k in ("lr", "weight_decay") if k in group}
    if hasattr(scheduler, "last_epoch"):
        parts["schedule.last_epoch"] = scheduler.last_epoch
    return parts | {"step": step}


def _is_sharded(module: nn.Module) -> bool:
    """Whether a module holds a part of its parameters: FSDP, tensor parallelism, DeepSpeed."""
    own = module.parameters(recurse=False)
    marks = ("placements", "ds_id", "_local_shard")
    return type(module).__name__ == "FullyShardedDataParallel" or any(
        hasattr(p, mark) for p in own for mark in marks
    )


class RowLedger:
    """Which rank has read which row, by hashes.

    Data may hold equal rows, and samplers fill up the last step of an epoch with rows of its
    beginning. Equal rows that one rank has read show how many there are; rows on several ranks are
    judged as dealt more than once where they are far more than these explain, and an eighth or more
    of all.
    """

    SHARE, SLACK = 1 / 8, 4

    def __init__(self, world_size: int):
        self.world_size, self.judged = world_size, False
        self.why = f"fewer than {ROWS_MIN} rows that are long enough were drawn by each rank"
        self._window = [0] * world_size
        self._shared = self._twice = 0  # of the window, within a step
        self._epoch: int | None = None
        self._reader: dict[int, int] = {}  # of rows of the epoch
        self._epoch_shared = self._epoch_rows = self._epoch_least = 0

    def dealt(
        self, step: int, rows: Sequence[Sequence[int]], epoch: int | None
    ) -> RowsDealt | None:
        """The event of a step, whose `rows` were read by each rank; None until enough were."""
        counts = [Counter(own) for own in rows]
        holders = Counter(row for own in counts for row in own)
        self._shared += sum(n - 1 for n in holders.values())
        self._twice += sum(own.total() - len(own) for own in counts)
        self._window = [n + len(own) for n, own in zip(self._window, rows)]
        in_epoch = self._in_epoch(rows, epoch, max(map(len, rows), default=0))
        n_rows = sum(self._window)
        if min(self._window) < ROWS_MIN and not in_epoch:
            return None
        self.judged = True
        repeated = max(self._excess(self._shared, self._twice, n_rows, 0), in_epoch)
        if min(self._window) >= ROWS_MIN:
            self._window, self._shared, self._twice = [0] * self.world_size, 0, 0
        return RowsDealt(step, n_rows, 0, repeated, 0, 0)

    def _in_epoch(self, rows: Sequence[Sequence[int]], epoch: int | None, largest: int) -> int:
        """Rows of the epoch that were dealt to several ranks, beyond those of its last step."""
        if epoch is None:
            return 0
        if epoch != self._epoch:
            self._epoch, self._reader = epoch, {}
            self._epoch_shared = self._epoch_rows = self._epoch_least = 0
        if self._epoch_rows > KEPT_ROWS:
            return 0
        for rank, own in enumerate(rows):
            self._epoch_rows += len(own)
            self._epoch_shared += sum(self._reader.setdefault(row, rank) != rank for row in own)
        self._epoch_least += min(map(len, rows))
        if self._epoch_least < ROWS_MIN:
            return 0
        twice = self._epoch_rows - len(self._reader) - self._epoch_shared
        filled = largest * self.world_size
        return self._excess(self._epoch_shared, twice, self._epoch_rows, filled)

    def _excess(self, shared: int, twice: int, n_rows: int, filled: int) -> int:
        """Rows on several ranks, or 0 where the data themselves explain them."""
        explained = self.SLACK * (self.world_size - 1) * twice + filled
        return shared if shared - explained >= self.SHARE * n_rows > 0 else 0
