"""Exact, cheap digests of weights, optimizer state, random state and batches."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks.probe import embedding_of, head_of, is_ids
from stackproof.contracts.callbacks.subject import ComparedReplicas, ComparedWeights
from stackproof.contracts.events import StateRestored
from stackproof.contracts.subject import Subject

FILE = "stack_gates.json"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """(N,) int64: the sum of each tensor's bits read as integers; any single changed entry changes
    it. Computed on the tensor's device.
    """
    return gathered([_checksum(t.detach()) for t in tensors], torch.int64)


def _checksum(tensor: Tensor) -> Tensor:
    """Entries are added eight bytes at a time where the alignment allows it: on a CPU 0.5 ms for 4M
    floats, and 3.1 ms one by one.
    """
    flat = tensor.contiguous().reshape(-1)
    together = 8 // flat.element_size()
    if together > 1 and not flat.numel() % together and not flat.storage_offset() % together:
        return flat.view(torch.int64).sum()
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def gathered(scalars: list[Tensor], dtype: torch.dtype) -> Tensor:
    """(N,) on the CPU, with one copy for each device."""
    out = torch.zeros(len(scalars), dtype=dtype)
    for device in {s.device for s in scalars}:
        places = [i for i, s in enumerate(scalars) if s.device == device]
        out[places] = torch.stack([scalars[i].to(dtype) for i in places]).cpu()
    return out


def of_tensors(named: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of every tensor's bytes in memory, by name."""
    return {
        n: hashlib.sha256(
            t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for n, t in named.items()
    }


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Hashes of an optimizer's state by place, and each group's rate and decay."""
    document = optimizer.state_dict()
    tensors = {
        f"optimizer.{i}.{k}": v
        for i, state in document["state"].items()
        for k, v in state.items()
        if isinstance(v, Tensor)
    }
    rates = {
        f"group.{i}.{k}": g[k]
        for i, g in enumerate(document["param_groups"])
        for k in ("lr", "weight_decay")
        if k in g
    }
    return of_tensors(tensors) | {k: float(v) for k, v in rates.items()}


def of_run(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, step: int
) -> dict[str, Any]:
    """Everything that a checkpoint restores but random state and data, which are compared at the
    next batch.
    """
    parts = {f"weights.{n}": h for n, h in of_tensors(dict(model.named_parameters())).items()}
    parts |= of_optimizer(optimizer) | {"step": step}
    return parts | (
        {"schedule.last_epoch": scheduler.last_epoch} if hasattr(scheduler, "last_epoch") else {}
    )


def reloaded(model: nn.Module, other: nn.Module) -> Subject:
    """A live model and one that was made from a checkpoint."""
    return Subject(
        saved=ComparedWeights(
            of_tensors(model.state_dict()),
            of_tensors(other.state_dict()),
            (is_tied(model), is_tied(other)),
        )
    )


def replicas(model: nn.Module) -> Subject | None:
    """The tensors of this process and those of another that differs, if several processes hold one
    model; None for one process.

    All processes must call this together, and reach the same verdict.
    """
    group = torch.distributed
    if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return None
    names, tensors = zip(*model.named_parameters())
    own = checksums(tensors).to(tensors[0].device)
    held = [torch.empty_like(own) for _ in range(group.get_world_size())]
    group.all_gather(held, own)
    live, *others = ([int(x) for x in sums] for sums in (own, *held))
    other = next((sums for sums in others if sums != live), live)
    return Subject(saved=ComparedReplicas(dict(zip(names, live)), dict(zip(names, other))))


def is_tied(model: nn.Module) -> bool:
    """Whether embedding and head are one tensor."""
    pair = [getattr(m, "weight", None) for m in (embedding_of(model), head_of(model))]
    return all(w is not None for w in pair) and pair[0].data_ptr() == pair[1].data_ptr()


def of_batch(batch: Any) -> str:
    """sha256 over the integer tensors of a batch, by name; empty if there is none."""
    named = (
        batch
        if isinstance(batch, Mapping)
        else {
            str(i): t for i, t in enumerate(batch if isinstance(batch, (list, tuple)) else [batch])
        }
    )
    found = {
        str(k): t
        for k, t in named.items()
        if isinstance(t, Tensor) and (is_ids(t) or not t.is_floating_point())
    }
    return (
        hashlib.sha256(json.dumps(of_tensors(dict(sorted(found.items())))).encode()).hexdigest()
        if found
        else ""
    )


def of_random() -> str:
    """sha256 of torch's random state on the CPU."""
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()


class Memory:
    """Keeps the state of a run at each save, and the batch that followed; compares both when a run
    is resumed from there.
    """

    def __init__(self):
        self.epoch_batches: list[str] = []
        self.epoch = 0
        self._open: list[dict] = []
        self._due: dict | None = None

    def saved(self, parts: dict[str, Any]) -> dict:
        """The document to write beside the checkpoint. The next call of `drawn` completes it."""
        document = {
            "parts": parts,
            "epoch": self.epoch,
            "epoch_batches": list(self.epoch_batches),
            "next": None,
        }
        self._open.append(document)
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

    def drawn(self, batch: Any, epoch: int, step: int) -> tuple[StateRestored | None, list[dict]]:
        """Called for every batch. Returns the comparison with the batch that followed the save, if
        it is due, and the documents that are now complete.
        """
        if (
            not (self._open or self._due)
            and epoch == self.epoch
            and len(self.epoch_batches) >= 4096
        ):
            return None, []
        came = {"batch": of_batch(batch), "random": of_random()}
        verdict = self._compare(came, epoch, step) if self._due else None
        self._due = None
        complete, self._open = self._open, []
        for document in complete:
            document["next"] = came
        if epoch != self.epoch:
            self.epoch, self.epoch_batches = epoch, []
        self.epoch_batches.append(came["batch"])
        return verdict, complete

    def _compare(self, came: dict, epoch: int, step: int) -> StateRestored | None:
        """Exact if the saved run continued after the save. Otherwise a batch must not come twice in
        an epoch of distinct ones.
        """
        if wanted := self._due["next"]:
            differing = tuple(
                name
                for key, name in (("batch", "the next batch"), ("random", "random state"))
                if wanted[key] != came[key]
            )
            return StateRestored(step, differing, 2)
        seen = self._due["epoch_batches"]
        if epoch != self._due["epoch"] or len(set(seen)) < max(2, len(seen)):
            return None
        return StateRestored(
            step,
            ("the next batch (it came before in this epoch)",) if came["batch"] in seen else (),
            1,
        )


def write(folder: Path, document: dict) -> None:
    """Write a document beside a checkpoint."""
    (folder / FILE).write_text(json.dumps(document), encoding="utf-8")


def read(folder: Path) -> dict | None:
    """The document beside a checkpoint, or None if there is none."""
    path = folder / FILE
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
