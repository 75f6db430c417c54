"""Exact, cheap digests of weights, optimizer state, random state and batches, and what they show
about saves and resumes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json
from torch import Tensor, nn

from stackproof.contracts.callbacks.probe import embedding_of, head_of, world_size
from stackproof.contracts.callbacks.settings import Trained
from stackproof.contracts.callbacks.subject import ComparedReplicas, ComparedWeights
from stackproof.contracts.checksums import checksums
from stackproof.contracts.events import StateRestored
from stackproof.contracts.subject import NotOffered, SavedCheckpoint
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import read_bytes, write_atomically
from stackproof.spec.series import Line
from stackproof.spec.tables import validated

FILE = "stack_gates.json"
REMOVE = "restore the file, or remove it to continue without a comparison"
KEPT_BATCHES = 4096  # hashes of one epoch


def of_tensors(named: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of every tensor's bytes in memory, by name."""
    return {
        n: hashlib.sha256(
            t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for n, t in named.items()
    }


def of_run(trained: Trained, step: int) -> dict[str, Any]:
    """Everything that a checkpoint restores but random state and data, which are compared at the
    next batch: hashes of weights and of the optimizer's state by place, each group's rate and
    decay, the step, and that of the schedule.
    """
    optimizer, scheduler = trained.optimizer, trained.scheduler
    tensors = {f"weights.{n}": p for n, p in trained.model.named_parameters()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    parts = of_tensors(tensors) | {"step": step}
    for i, group in enumerate(optimizer.param_groups):
        rates = {k: float(group[k]) for k in ("lr", "weight_decay") if k in group}
        parts |= {f"group.{i}.{k}": rate for k, rate in rates.items()}
    if hasattr(scheduler, "last_epoch"):
        parts["schedule.last_epoch"] = scheduler.last_epoch
    return parts


def is_tied(model: nn.Module) -> bool:
    """Whether embedding and head are one tensor."""
    pair = [getattr(m, "weight", None) for m in (embedding_of(model), head_of(model))]
    return all(w is not None for w in pair) and pair[0].data_ptr() == pair[1].data_ptr()


# --- a checkpoint that was loaded again, and other processes --------------------------------------


class NotReloaded(SavedCheckpoint):
    """A checkpoint that was not loaded again, for the reason `why`."""

    def __init__(self, model: nn.Module, why: str):
        names, tensors = zip(*model.named_parameters())
        self.live_checksums, self.why = dict(zip(names, checksums(tensors).tolist())), why

    @property
    def reloaded_checksums(self) -> Mapping[str, int]:
        raise NotOffered(f"SavedCheckpoint.reloaded_checksums: {self.why}")


def reloaded(model: nn.Module, other: nn.Module) -> SavedCheckpoint:
    """A live model and one that was made from a checkpoint."""
    live, loaded = of_tensors(model.state_dict()), of_tensors(other.state_dict())
    return ComparedWeights(live, loaded, (is_tied(model), is_tied(other)))


def other_replica(model: nn.Module) -> SavedCheckpoint | None:
    """The tensors of this process and those of one that differs, if several processes hold one
    model; None if all are equal. Equal replicas do not show that a checkpoint can be loaded.

    All processes must call this together, and reach the same verdict.
    """
    if (n := world_size()) == 1:
        return None
    names, tensors = zip(*model.named_parameters())
    own = checksums(tensors).to(tensors[0].device)
    held = [torch.empty_like(own) for _ in range(n)]
    torch.distributed.all_gather(held, own)
    other = next((sums for sums in held if not torch.equal(sums, own)), None)
    if other is None:
        return None
    live, differing = (dict(zip(names, sums.tolist())) for sums in (own, other))
    return ComparedReplicas(live, differing)


# --- saves, and the batches between them ----------------------------------------------------------


def of_batch(batch: Any) -> str:
    """sha256 over the integer tensors of a batch, by name; empty for a batch without any."""
    if not isinstance(batch, Mapping):
        batch = dict(enumerate(batch if isinstance(batch, (list, tuple)) else [batch]))
    found = {
        str(k): t for k, t in batch.items() if isinstance(t, Tensor) and not t.is_floating_point()
    }
    hashes = json.dumps(of_tensors(dict(sorted(found.items()))))
    return hashlib.sha256(hashes.encode()).hexdigest() if found else ""


class SaveHistory:
    """Keeps the state of a run at each save, and the batch that followed; compares both when a run
    is resumed from there.
    """

    def __init__(self):
        self.epoch_batches: list[str] = []
        self.epoch = 0
        self._open: list[tuple[dict, Path | None]] = []
        self._due: dict | None = None

    def saved(self, parts: dict[str, Any], folder: Path | None = None) -> dict:
        """The document to keep with a checkpoint, written to `folder`. The next call of `drawn`
        completes it.
        """
        document = {
            "parts": parts,
            "epoch": self.epoch,
            "epoch_batches": list(self.epoch_batches),
            "next": None,
        }
        self._open.append((document, folder))
        _write(document, folder)
        return document

    def restored(self, document: dict, parts: dict[str, Any]) -> StateRestored:
        """The differences between a saved document and the run now. The next batch is compared when
        it comes.
        """
        kept = document["parts"]
        self._due = document
        self.epoch, self.epoch_batches = document["epoch"], list(document["epoch_batches"])
        differing = sorted(k for k in kept.keys() | parts.keys() if kept.get(k) != parts.get(k))
        return StateRestored(parts["step"], tuple(differing), len(kept))

    def drawn(self, batch: Any, epoch: int, step: int) -> StateRestored | None:
        """Called for every batch; completes the documents of the saves before it. Returns the
        comparison with the batch that followed the restored save, once.
        """
        waiting = self._open or self._due
        if not waiting and epoch == self.epoch and len(self.epoch_batches) >= KEPT_BATCHES:
            return None
        random = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        came = {"batch": of_batch(batch), "random": random}
        event = self._compare(came, epoch, step) if self._due else None
        self._due = None
        for document, folder in self._open:
            document["next"] = came
            _write(document, folder)
        self._open = []
        if epoch != self.epoch:
            self.epoch, self.epoch_batches = epoch, []
        self.epoch_batches.append(came["batch"])
        return event

    def _compare(self, came: dict, epoch: int, step: int) -> StateRestored | None:
        """Exact if the saved run continued after the save. Otherwise a batch must not come twice in
        an epoch of distinct ones.
        """
        if expected := self._due["next"]:
            names = {"batch": "the next batch", "random": "random state"}
            differing = tuple(names[k] for k in names if expected[k] != came[k])
            return StateRestored(step, differing, 2)
        before = self._due["epoch_batches"]
        if epoch != self._due["epoch"] or len(set(before)) < max(2, len(before)):
            return None
        repeated = ("the next batch (it came before in this epoch)",)
        return StateRestored(step, repeated if came["batch"] in before else (), 1)


def _write(document: dict, folder: Path | None) -> None:
    if folder:
        write_atomically(folder / FILE, json.dumps(document).encode())


class _Drawn(Line):
    batch: str
    random: str


class _Saved(Line):
    """The document of a save; `next` is None if no batch followed it."""

    parts: dict[str, Any]
    epoch: int
    epoch_batches: list[str]
    next: _Drawn | None


def read(folder: Path) -> dict | None:
    """The document in the folder of a checkpoint, or None. Raises FileRefused for a larger file
    than any that is written, IntegrityError for one of another form.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        document = from_json(read_bytes(path))
    except ValueError as e:
        raise IntegrityError(f"{path} is not JSON: {e}", next_step=REMOVE) from e
    validated(_Saved, document, origin=str(path), next_step=REMOVE)
    return document
