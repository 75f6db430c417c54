"""The processes of a run: one process, or a process group with a mesh.

A rank is a process. The ranks of one tensor group hold parts of each matrix and read the same rows;
data ranks read different rows.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stackproof.distributed import failure
from stackproof.distributed.mesh import ONE_RANK, MeshSizes
from stackproof.distributed.starts import NO_STORE, Launcher

POLL_S = 0.05
BEAT_S = 0.5  # between two signs of life of rank 0 while the others wait
BEATS = "stackproof/beats"
Item = TypeVar("Item")


class Ranks(Protocol):
    """What a trainer needs from the processes of its run."""

    rank: int
    data_rank: int
    sizes: MeshSizes
    control: dist.ProcessGroup | None  # of small messages; None in one process
    restarted: bool  # whether the launcher has started this run before, on any machine
    launcher: Launcher

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run directory and shows progress."""

    def total(self, *counts: int) -> list[int]:
        """Sums of counts over the data ranks."""

    def highest(self, *numbers: int) -> list[int]:
        """Maxima over all ranks."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over the data ranks, on its device, in place."""

    def maximum(self, tensor: Tensor) -> Tensor:
        """Maximum of each entry over all ranks, on its device, in place."""

    def reduce_gradients(self, model: nn.Module, *, now: bool) -> None:
        """Whether the next backward sums gradients over the data ranks. Only that of the last
        micro-step does; the others add to the gradients of their rank.
        """

    def gathered(self, document: Any) -> list[Any]:
        """The documents of all ranks, in order of rank."""

    def rows(self, numbers: Sequence[int]) -> list[list[int]]:
        """Numbers of each data rank, of which all have as many, in order of data rank."""

    def dealt(self, items: Sequence[Item], compute: Callable[[Item], Any]) -> list[Any]:
        """`compute(item)` of every item, in order, on every rank. Each data rank computes its share
        of the items; all call `compute` equally often, since it may hold collective operations.
        """

    def ahead(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """A function with the same result that rank 0 may call alone."""

    def of_data_ranks(self, document: Any) -> list[Any]:
        """The documents of the data ranks, in order: of one rank in each tensor group."""

    def names_of_all(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of all ranks, sorted; those of other ranks with their rank before it."""

    def from_main(self, document: Any) -> Any:
        """The document of rank 0. Those of the others are not looked at."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks leave alike: if it fails on one, that one raises its error, and
        the others RankLost, which names it.
        """

    def behind(self) -> "Ranks":
        """The same ranks, for operations of a thread beside training."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that rank 0 ends before the others begin it.
        If it fails on rank 0, the others raise RankLost.
        """

    def at(self, step: int, operation: str) -> None:
        """State where this rank is, for the message if it does not return."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A block in which an error of this rank is announced to the others, and one of a
        collective operation is raised as RankLost, which names the rank that is gone.
        """


@dataclass(frozen=True)
class OneProcess:
    """A run in one process: every sum is its own number."""

    rank: int = 0
    data_rank: int = 0
    sizes: MeshSizes = ONE_RANK
    is_main: bool = True
    control: None = None
    restarted: bool = False
    launcher: Launcher = NO_STORE

    def total(self, *counts: int) -> list[int]:
        return list(counts)

    def highest(self, *numbers: int) -> list[int]:
        return list(numbers)

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce_gradients(self, model: nn.Module, *, now: bool) -> None:
        return None

    def gathered(self, document: Any) -> list[Any]:
        return [document]

    def rows(self, numbers: Sequence[int]) -> list[list[int]]:
        return [list(numbers)]

    def dealt(self, items: Sequence[Item], compute: Callable[[Item], Any]) -> list[Any]:
        return [compute(item) for item in items]

    def ahead(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        return compute

    def of_data_ranks(self, document: Any) -> list[Any]:
        return [document]

    def names_of_all(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names

    def from_main(self, document: Any) -> Any:
        return document

    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    def behind(self) -> "OneProcess":
        return self

    @contextmanager
    def main_first(self) -> Iterator[None]:
        yield

    def at(self, step: int, operation: str) -> None:
        return None

    @contextmanager
    def watched(self) -> Iterator[None]:
        yield


ONE_PROCESS = OneProcess()


class ProcessGroup:
    """The ranks of a process group, with its mesh (replicate, shard, tensor).

    Control messages are small and take a gloo group of their own, so that they never mix with the
    collective operations of training, and never wait for a GPU.
    """

    def __init__(
        self,
        store: dist.PrefixStore,
        sizes: MeshSizes,
        device: torch.device,
        timeout: timedelta,
        run_dir: Path,
    ):
        self.store, self.sizes, self.device, self.timeout = store, sizes, device, timeout
        self.run_dir = run_dir
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.mesh = sizes.device_mesh(device.type)
        self.data_rank = self.rank // sizes.tensor
        self.data_group = self.mesh["replicate", "shard"]._flatten("data").get_group()
        self.control = dist.new_group(backend="gloo", timeout=timeout)
        # for the collective operations of a save behind training
        self.checkpoint_group = dist.new_group(backend="gloo", timeout=timeout)
        self.restarted, self.launcher = False, NO_STORE
        self._turns = 0

    def close(self) -> None:
        """Leave the groups. One that is held until the interpreter ends can abort the process:
        its threads then wait for an interpreter that is gone.
        """
        del self.data_group, self.control, self.checkpoint_group, self.mesh
        dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, *counts: int) -> list[int]:
        # every tensor rank holds the same number, which counts once
        parts = torch.tensor(counts, dtype=torch.int64)
        if self.rank % self.sizes.tensor:
            parts.zero_()
        dist.all_reduce(parts, group=self.control)
        return parts.tolist()

    def highest(self, *numbers: int) -> list[int]:
        parts = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(parts, dist.ReduceOp.MAX, group=self.control)
        return parts.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.sizes.n_data_ranks > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def reduce_gradients(self, model: nn.Module, *, now: bool) -> None:
        model.set_requires_gradient_sync(now)
        model.set_is_last_backward(now)

    def rows(self, numbers: Sequence[int]) -> list[list[int]]:
        own = torch.tensor(numbers, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(found, own, group=self.control)
        return [row.tolist() for row in found[:: self.sizes.tensor]]

    def dealt(self, items: Sequence[Item], compute: Callable[[Item], Any]) -> list[Any]:
        n = self.sizes.n_data_ranks
        # Without an item of its own a rank takes part with the first one.
        own = [compute(items[i] if i < len(items) else items[0]) for i in self._own(len(items), n)]
        found = self.of_data_ranks(own)
        return [found[i % n][i // n] for i in range(len(items))]

    def _own(self, n_items: int, n_ranks: int) -> range:
        n_rounds = -(-n_items // n_ranks)
        return range(self.data_rank, n_rounds * n_ranks, n_ranks)

    def ahead(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        result = compute()
        return lambda: result

    def gathered(self, document: Any) -> list[Any]:
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, document, group=self.control)
        return found

    def of_data_ranks(self, document: Any) -> list[Any]:
        return self.gathered(document)[:: self.sizes.tensor]

    def names_of_all(self, names: tuple[str, ...]) -> tuple[str, ...]:
        # One number first: almost always there is no name anywhere.
        if not self.highest(len(names))[0]:
            return ()
        found = self.gathered(names)
        return tuple(sorted(f"rank {r}: {n}" for r, own in enumerate(found) for n in own))

    def from_main(self, document: Any) -> Any:
        found = [document]
        dist.broadcast_object_list(found, src=0, group=self.control)
        return found[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        error = None
        try:
            yield
        except Exception as e:
            if failure.of_a_collective(e):
                raise
            error = e
        ends = self.gathered(error and failure.document(error))
        if error is not None:
            raise error
        for rank, end in enumerate(ends):
            if end is not None:
                raise failure.lost(self, rank, end)

    def behind(self) -> "ProcessGroup":
        other = copy(self)
        other.control = self.checkpoint_group
        return other

    @contextmanager
    def main_first(self) -> Iterator[None]:
        self._turns += 1
        done = f"main/{self._turns}"
        if not self.is_main:
            self._wait_for(done)
            yield
            return
        ended = Event()
        beating = Thread(target=self._beat, args=(ended,), daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
        self.store.set(done, b"1")

    def _beat(self, ended: Event) -> None:
        with suppress(dist.DistError):  # without the store, the next operation of rank 0 fails
            while not ended.wait(BEAT_S):
                self.store.add(BEATS, 1)

    def _wait_for(self, done: str) -> None:
        """Wait until rank 0 has set a key, for longer than a collective operation may take. Raises
        RankLost if it has ended, or gives no sign of life.
        """
        beats, since = -1, time.monotonic()
        while not self.store.check([done]):
            if ended := failure.ended(self.store, 0):
                raise failure.lost(self, 0, ended)
            if (latest := self.store.add(BEATS, 0)) != beats:
                beats, since = latest, time.monotonic()
            elif time.monotonic() - since > self.timeout.total_seconds():
                raise failure.silent(self, [0], "waiting for rank 0")
            time.sleep(POLL_S)

    def at(self, step: int, operation: str) -> None:
        self.store.set(failure.place_of(self.rank), f"step {step}, {operation}")

    @contextmanager
    def watched(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if failure.of_a_collective(error) and (lost := failure.find(self)):
                raise lost from error
            failure.announce(self.store, self.rank, error)
            raise
