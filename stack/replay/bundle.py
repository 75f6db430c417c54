"""The repro recorder: when a runtime gate fails, it writes the data since the last state on disk,
and that state.
"""

import os
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from stackproof.contracts.events import Evaluated
from stackproof.contracts.gate import Verdict, limits_of
from stackproof.data.data_loader import Batch
from stackproof.evidence import repro
from stackproof.spec.canonical import canonical_json, canonical_lines, sha256_file
from stackproof.spec.errors import StackproofError
from stackproof.trace.points_log import points_lines
from stackproof.train.rng import default_rng_state
from stackproof.train.step import nonfinite_parts
from stackproof.train.trainer import Callback, RestartPoint, Trainer

ROWS_BYTES_MAX = 256 * 2**20  # rows kept in memory, and in a bundle
CHECKPOINT_BYTES_MAX = (
    2**30
)  # size of a copied state; for a larger one the bundle holds only the path
NAMES_MAX = 16


@dataclass
class Recent:
    """The data drawn since `point`, the latest state that a replay can start from.

    Rows are kept as int32, the oldest dropped beyond ROWS_BYTES_MAX; `rng` is torch's random state
    before the latest step, and `batch` its first micro-batch.
    """

    point: RestartPoint | None = None
    steps: deque[tuple[repro.Step, dict[str, Tensor]]] = field(default_factory=deque)
    rng: dict[str, Tensor] = field(default_factory=dict)
    batch: Batch | None = None
    n_bytes: int = 0
    dropped: int = 0

    def begin(self, point: RestartPoint) -> None:
        """Drop the rows before `point`. Rows of later steps may have been drawn already."""
        self.point = point
        while self.steps and self.steps[0][0].step <= point.step:
            self.n_bytes -= size_of(self.steps.popleft()[1])
        self.dropped = self.steps[0][0].step - point.step - 1 if self.steps else 0

    def draw(self, step: int, batches: Sequence[Batch], cursor: int) -> None:
        """Keep the rows of a step and the position of the data loader after it."""
        self.rng, self.batch = default_rng_state(), batches[0]
        tensors = {
            f"step-{step:08d}.{i}.{name}": t
            for i, batch in enumerate(batches)
            for name, t in rows_of(batch).items()
        }
        self.steps.append(
            (repro.Step(step=step, cursor=cursor, batches=without_rows(batches)), tensors)
        )
        self.n_bytes += size_of(tensors)
        while self.n_bytes > ROWS_BYTES_MAX and len(self.steps) > 1:
            self.n_bytes -= size_of(self.steps.popleft()[1])
            self.dropped += 1


def rows_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name, int32."""
    named = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "document_ids": batch.document_ids,
    }
    return {name: t.to(torch.int32) for name, t in named.items() if t is not None}


def size_of(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def without_rows(batches: Sequence[Batch]) -> tuple[repro.MicroBatch, ...]:
    """The entries of batches in the document."""
    return tuple(
        repro.MicroBatch(**{name: getattr(b, name) for name in repro.MicroBatch.model_fields})
        for b in batches
    )


class ReproRecorder(Callback):
    """Writes `repro/<gate>-step-<step>` of a run when a runtime gate fails, once per gate.

    At most ROWS_BYTES_MAX of rows, CHECKPOINT_BYTES_MAX of state, the held-out rows if the gate
    judges them, and the tokenizer. A bundle that cannot be written, on a full disk, is only logged.
    """

    def __init__(self) -> None:
        self.recent = Recent()

    def on_train_start(self, trainer: Trainer, start: RestartPoint) -> None:
        self.recent.begin(start)

    def on_batch(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        self.recent.draw(trainer.state.step + 1, batches, trainer.state.data_loader.cursor)

    def on_saved(self, trainer: Trainer, point: RestartPoint) -> None:
        self.recent.begin(point)

    def on_gate_failure(self, trainer: Trainer, gate_id: str, step: int, verdict: Verdict) -> None:
        if trainer.keeper.states[gate_id].first_failure_step is not None:
            return
        run_dir = trainer.output.dir
        folder = run_dir.path / "repro" / f"{gate_id}-step-{step}"
        temporary = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_bundle(temporary, trainer, self.recent, gate_id, step, verdict)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except (OSError, StackproofError) as e:
            shutil.rmtree(temporary, ignore_errors=True)
            run_dir.log(
                "events.jsonl", event="repro_failed", step=step, gate=gate_id, message=str(e)
            )
            trainer.callbacks.on_message(f"the repro bundle of {gate_id} could not be written: {e}")
            return
        cause = (
            f"; to find its origin: stack trace --repro {folder}"
            if gate_id == "runtime.finite"
            else ""
        )
        message = (
            f"gate {gate_id} failed at step {step}; to reproduce it: stack gates repro "
            f"{folder}{cause}"
        )
        trainer.callbacks.on_message(message)


def write_bundle(
    folder: Path, trainer: Trainer, recent: Recent, gate_id: str, step: int, verdict: Verdict
) -> None:
    """Write the files of a bundle and its document.
    Raises StackproofError before the run has begun.
    """
    point, keeper, record = recent.point, trainer.keeper, trainer.output.record
    gate, tokenizer = keeper.spec.gates[gate_id], trainer.dataset.tokenizer
    if point is None or gate_id not in point.gates:
        raise StackproofError("the run has not begun, so a replay has no state to start from")
    held_out = trainer.held_out if Evaluated in keeper.states[gate_id].watcher.events else []
    tensors = {name: t for _, rows in recent.steps for name, t in rows.items()} | recent.rng
    tensors |= {
        f"held_out.{i}.{name}": t for i, b in enumerate(held_out) for name, t in rows_of(b).items()
    }
    safetensors.torch.save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / repro.TENSORS
    )
    tokenizer.save(folder / repro.TOKENIZER)
    base, no_points = (
        _base(folder, point),
        _write_points(folder / repro.POINTS, trainer, recent.batch, step),
    )
    lacking = (
        "the initial state of the replay was too large to copy" if base.kind == "elsewhere" else ""
    )
    if trainer.output.ranks.sizes.world_size > 1:
        lacking = "the rows of the other ranks"
    elif recent.dropped:
        first = f"the rows of the first {recent.dropped} steps since step {point.step}"
        lacking = f"{first} were too many to keep; save more often"
    finite = gate_id != "runtime.finite"
    nonfinite = (
        {}
        if finite
        else {k: tuple(v[:NAMES_MAX]) for k, v in nonfinite_parts(trainer.state.model).items()}
    )
    bundle = repro.Bundle(
        schema=repro.SCHEMA,
        gate=gate_id,
        fingerprint=keeper.spec.fingerprint(gate_id),
        spec_version=keeper.spec.version,
        severity=gate.severity,
        event=type(keeper.event).__name__,
        step=step,
        message=verdict.message,
        measured={
            k: str(v) if isinstance(v, float) and v - v != 0 else v
            for k, v in verdict.measured.items()
        },
        limits=vars(limits_of(gate)),
        nonfinite=nonfinite,
        record=record.id,
        config=trainer.cfg.to_dict(),
        code=record.code,
        environment=record.environment,
        device=trainer.state.device.type,
        threads=torch.get_num_threads(),
        vocab_size=tokenizer.vocab_size,
        peak_flops=trainer.peak_flops,
        flops_per_step=trainer.flops_per_step,
        base=base,
        continued=point.folder is not None,
        plan=point.plan,
        gates={gate_id: point.gates[gate_id]},
        steps=tuple(step for step, _ in recent.steps),
        n_held_out=len(held_out),
        lacking=lacking,
        no_points=no_points,
        command=("stack", "gates", "repro", "."),
        files={
            p.relative_to(folder).as_posix(): repro.File(
                sha256=sha256_file(p), bytes=p.stat().st_size
            )
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        },
    )
    (folder / repro.DOCUMENT).write_bytes(canonical_json(bundle.model_dump(by_alias=True)))


def _write_points(path: Path, trainer: Trainer, batch: Batch | None, step: int) -> str:
    """Write the activation statistics of the latest batch.
    Returns the reason if that was impossible, else an empty text.
    """
    if batch is None:
        return "no step had been drawn"
    if trainer.state.ranks.sizes.world_size > 1:
        return "the model is divided: a forward needs all ranks, and rank 0 alone writes a bundle"
    try:
        lines = points_lines(trainer.state, batch)
    except (
        RuntimeError,
        StackproofError,
    ) as e:  # a failed device, or no memory left: the verdict has priority
        return f"the model could not be traced: {e}"
    path.write_bytes(canonical_lines({"step": step} | line for line in lines))
    return ""


def _base(folder: Path, point: RestartPoint) -> repro.Base:
    """Copy the initial state of the replay, or store its path."""
    if point.folder is None:
        return repro.Base(kind="seed", step=point.step)
    path = point.folder.resolve()
    if sum(p.stat().st_size for p in path.iterdir()) > CHECKPOINT_BYTES_MAX:
        return repro.Base(kind="elsewhere", step=point.step, path=str(path))
    shutil.copytree(path, folder / repro.CHECKPOINT)
    return repro.Base(kind="checkpoint", step=point.step, path=str(path))
