"""Writes a repro bundle when a runtime gate turns red: what was drawn since the last state on disk,
and that state.
"""

import os
import shutil
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from stackproof.contracts.events import Evaluated
from stackproof.contracts.gate import Verdict, limits_of
from stackproof.data.reader import Batch
from stackproof.evidence import repro
from stackproof.spec.canonical import canonical_json, sha256_file
from stackproof.spec.errors import StackproofError
from stackproof.train.points import points_lines
from stackproof.train.randomness import default_rng_state
from stackproof.train.step import nonfinite_parts

ROWS_BYTES_MAX = 256 * 2**20  # of rows that a run remembers, and so of those in a bundle
CHECKPOINT_BYTES_MAX = 2**30  # of a state that is copied; of a larger one the place is named
NAMES_MAX = 16


@dataclass
class Recent:
    """What a run drew since the state it could begin again from: `base` is a step folder,
    or None for the seed.

    Rows are kept as int32, the oldest dropped beyond ROWS_BYTES_MAX; `rng` is torch's random state
    before the latest step, and `batch` its first micro-batch.
    """

    base: Path | None = None
    base_step: int = 0
    continued: bool = False
    plan: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    steps: deque[tuple[repro.Step, dict[str, Tensor]]] = field(default_factory=deque)
    rng: dict[str, Tensor] = field(default_factory=dict)
    batch: Batch | None = None
    n_bytes: int = 0
    dropped: int = 0

    def begin(
        self,
        base: Path | None,
        step: int,
        plan: dict[str, Any],
        gates: dict[str, Any],
        *,
        continued: bool,
    ) -> None:
        """From here on a replay begins at `base`, the state after `step`.
        Later steps may have been drawn already.
        """
        self.base, self.base_step, self.plan, self.gates, self.continued = (
            base,
            step,
            plan,
            gates,
            continued,
        )
        while self.steps and self.steps[0][0].step <= step:
            self.n_bytes -= size_of(self.steps.popleft()[1])
        self.dropped = self.steps[0][0].step - step - 1 if self.steps else 0

    def draw(self, step: int, batches: list[Batch], cursor: int) -> None:
        """Remember the rows of a step, and where the reader stands after it."""
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


def without_rows(batches: list[Batch]) -> tuple[repro.MicroBatch, ...]:
    """What a document holds of batches."""
    return tuple(
        repro.MicroBatch(**{name: getattr(b, name) for name in repro.MicroBatch.model_fields})
        for b in batches
    )


def write_bundle(run: Any, gate_id: str, step: int, verdict: Verdict) -> None:
    """Write `repro/<gate>-step-<step>` of a run, once per gate.
    A disk that is full spoils no run: then it is only said.

    At most ROWS_BYTES_MAX of rows, CHECKPOINT_BYTES_MAX of state, the held-out rows where the gate
    judges them, and the tokenizer.
    """
    if run.keeper.seats[gate_id].first_failure_step is not None:
        return
    folder = run.dir.path / "repro" / f"{gate_id}-step-{step}"
    temporary = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary, run, gate_id, step, verdict)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        made = (
            f"; what made it: stack trace --repro {folder}" if gate_id == "runtime.finite" else ""
        )
        run.listener.on_event(
            f"gate {gate_id} is red at step {step}; to see it again: stack gates repro "
            f"{folder}{made}"
        )
    except (OSError, StackproofError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        run.dir.log("events.jsonl", event="repro_failed", step=step, gate=gate_id, message=str(e))
        run.listener.on_event(f"the repro bundle of {gate_id} could not be written: {e}")


def _write(folder: Path, run: Any, gate_id: str, step: int, verdict: Verdict) -> None:
    recent, gate = run.recent, run.keeper.spec.gates[gate_id]
    if gate_id not in recent.gates:
        raise StackproofError("the run had not begun, so there is nothing to begin again from")
    held_out = run.held_out if Evaluated in run.keeper.seats[gate_id].watcher.events else []
    tensors = {name: t for _, rows in recent.steps for name, t in rows.items()} | recent.rng
    tensors |= {
        f"held_out.{i}.{name}": t for i, b in enumerate(held_out) for name, t in rows_of(b).items()
    }
    safetensors.torch.save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / repro.TENSORS
    )
    run.dataset.tokenizer.save(folder / repro.TOKENIZER)
    base, no_points = _base(folder, recent), _write_points(folder / repro.POINTS, run, step)
    lacking = (
        "the state the replay begins from was too large to copy" if base.kind == "elsewhere" else ""
    )
    if recent.dropped:
        lacking = (
            f"the rows of the first {recent.dropped} steps since step {recent.base_step} were too "
            "many to keep; save more often"
        )
    bundle = repro.Bundle(
        schema=repro.SCHEMA,
        gate=gate_id,
        fingerprint=run.keeper.spec.fingerprint(gate_id),
        spec_version=run.keeper.spec.version,
        severity=gate.severity,
        event=type(run.keeper.shown).__name__,
        step=step,
        message=verdict.message,
        measured={
            k: str(v) if isinstance(v, float) and v - v != 0 else v
            for k, v in verdict.measured.items()
        },
        limits=vars(limits_of(gate)),
        nonfinite={k: tuple(v[:NAMES_MAX]) for k, v in nonfinite_parts(run.state.model).items()}
        if gate_id == "runtime.finite"
        else {},
        record=run.builder.id,
        config=run.cfg.to_dict(),
        code=run.builder.code,
        environment=run.builder.environment,
        device=run.device.type,
        threads=torch.get_num_threads(),
        vocab_size=run.dataset.tokenizer.vocab_size,
        peak_flops=run.peak_flops,
        flops_per_step=run.flops_per_step,
        base=base,
        continued=recent.continued,
        plan=recent.plan,
        gates={gate_id: recent.gates[gate_id]},
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


def _write_points(path: Path, run: Any, step: int) -> str:
    """Write what every point of the model now holds on the latest rows; where that cannot be had,
    say why. The verdict comes first.
    """
    if run.recent.batch is None:
        return "no step had been drawn"
    try:
        lines = points_lines(run.state, run.recent.batch)
    except (RuntimeError, StackproofError) as e:  # a device that is broken, or has no room left
        return f"the model could not be traced: {e}"
    path.write_bytes(b"".join(canonical_json({"step": step} | line) + b"\n" for line in lines))
    return ""


def _base(folder: Path, recent: Recent) -> repro.Base:
    """Copy the state that the replay begins from, or say where it lies."""
    if recent.base is None:
        return repro.Base(kind="seed", step=recent.base_step)
    path = recent.base.resolve()
    if sum(p.stat().st_size for p in path.iterdir()) > CHECKPOINT_BYTES_MAX:
        return repro.Base(kind="elsewhere", step=recent.base_step, path=str(path))
    shutil.copytree(path, folder / repro.CHECKPOINT)
    return repro.Base(kind="checkpoint", step=recent.base_step, path=str(path))
