"""The record of a run of another trainer: trainer, model, environment and the results of all gates,
in the `metadata.json` of any run.
"""

import json
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stackproof.contracts.callbacks.digest import of_tensors
from stackproof.contracts.callbacks.session import Session
from stackproof.contracts.events import StepTaken
from stackproof.contracts.gate import Verdict
from stackproof.spec.building import RecordBuilder, artefact
from stackproof.spec.canonical import sha256_json
from stackproof.spec.errors import ConfigError, GateFailed
from stackproof.spec.provenance import environment
from stackproof.spec.records import GateResult

LOG, STEPS, RECORD = "gates.jsonl", "metrics.jsonl", "metadata.json"
OUTSIDE = (
    (
        "the trainer's own code and the data it drew, of which the record holds no hash; the "
        "commit is that of the gates"
    ),
    "the quality of the trained model",
)


class RunRecord:
    """Opened before step 1; writes a line for every step, and `metadata.json` when the run ends.

    `trainer` holds its name, package and version. Raises ConfigError if the folder holds a record
    already.
    """

    def __init__(
        self,
        folder: str | Path,
        session: Session,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        trainer: Mapping[str, Any],
        told: Mapping[str, Any],
        first_step: int = 0,
    ):
        self.folder, self.session, self._first, self._last, self._closed = (
            Path(folder),
            session,
            first_step,
            None,
            False,
        )
        if (self.folder / RECORD).exists() or (self.folder / STEPS).exists():
            raise ConfigError(
                f"{self.folder} holds the record of a run already",
                allowed="a folder without one",
                next_step="name another folder as record",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        config = {
            "trainer": dict(trainer),
            "told": dict(told),
            "first_step": first_step,
            "model": _of_model(model),
            "optimizer": _of_optimizer(optimizer),
            "scheduler": type(scheduler).__name__ if scheduler is not None else None,
            "gates": {"mode": session.mode, "left_out": sorted(session.left_out)},
        }
        device = next(model.parameters()).device
        self.builder = RecordBuilder(
            kind="foreign",
            spec=session.keeper.spec,
            config=_plain(config),
            claim="",
            not_covered=OUTSIDE,
        )
        self.builder.command = ["python", *sys.argv] if sys.argv[0] else ["python"]
        world = (
            torch.distributed.get_world_size()
            if torch.distributed.is_available() and torch.distributed.is_initialized()
            else 1
        )
        package = trainer["package"]
        self.builder.environment = environment(
            str(device), world_size=world, **{package: trainer["version"]} | _installed()
        )
        script = Path(sys.argv[0] or ".")
        if script.is_file():
            self.builder.inputs.append(artefact(script.resolve(), root=Path.cwd(), name="script"))
        session.on_step, session.on_end = self.step, self.close

    def step(self, event: StepTaken) -> None:
        """One line of the step log. Figures that are not finite are written as strings."""
        figures = {
            "loss_nats": event.loss_nats,
            "grad_norm": event.grad_norm,
            "clipped_grad_norm": event.clipped_grad_norm,
            "lr": event.lr,
        }
        line = {"step": event.step, **{k: v if v - v == 0 else str(v) for k, v in figures.items()}}
        with (self.folder / STEPS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._last = line

    def close(self, status: str, end_reason: str, exit_code: int) -> None:
        """Write the record. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        results, builder, trainer = self._results(), self.builder, self.builder.config["trainer"]
        red = [g.id for g in results if g.verdict == "fail"]
        if red and status == "completed":
            status, end_reason, exit_code = (
                "failed",
                f"{', '.join(red)} red, and nothing was raised",
                GateFailed.exit_code,
            )
        taken = 0 if self._last is None else self._last["step"] - self._first
        held = sum(g.verdict == "pass" for g in results)
        builder.claim = (
            f"{trainer['name']} of {trainer['package']} {trainer['version']} trained "
            f"{builder.config['model']['class']} for {taken} step(s); {held} of {len(results)} "
            f"gates held, {len(red)} were red."
        )
        unasked = [f"{g.id}: {g.message}" for g in results if g.verdict == "not_run"]
        builder.not_covered = (*OUTSIDE, *unasked)
        cost = self.session.cost()
        builder.metric("steps", self._first + taken, "1")
        builder.metric("gate_s_before_step_1", cost.preflight_s, "s", better="lower")
        builder.metric("gate_s_per_step", cost.per_step_s, "s", n=cost.steps, better="lower")
        if self._last is not None and not isinstance(self._last["loss_nats"], str):
            builder.metric("train_loss_nats", self._last["loss_nats"], "nats/token", better="lower")
        builder.finish(
            self.folder,
            status=status,
            end_reason=end_reason,
            exit_code=exit_code,
            gates=results,
            series=(STEPS, LOG),
        )

    def _results(self) -> list[GateResult]:
        """Every gate that was installed, also those without a meaning in this run; they are
        `not_run` with the reason.
        """
        spec = self.session.keeper.spec
        absent = [
            _unasked(gate_id, spec.fingerprint(gate_id), verdict)
            for gate_id, verdict in self.session.absent.items()
        ]
        return sorted([*self.session.keeper.results(), *absent], key=lambda g: g.id)


def _unasked(gate_id: str, fingerprint: str, verdict: Verdict) -> GateResult:
    return GateResult(
        id=gate_id, fingerprint=fingerprint, verdict="not_run", checks=0, message=verdict.message
    )


def how_it_ended(error: BaseException | None) -> tuple[str, str, int]:
    """(status, reason, exit code) of a run that ended with an error, or without."""
    match error:
        case None:
            return "completed", "the trainer came to its end", 0
        case GateFailed():
            return "halted", str(error).splitlines()[0], GateFailed.exit_code
        case KeyboardInterrupt():
            return "interrupted", "interrupted from outside", 130
        case _:
            return (
                "failed",
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                1,
            )


def trainer_of(kind: type, package: str) -> dict[str, Any]:
    """The description of a trainer in a record: its class, and the package and version that it is
    built on.
    """
    return {
        "name": kind.__name__,
        "module": kind.__module__,
        "package": package,
        "version": metadata.version(package),
    }


def _installed() -> dict[str, str]:
    """Versions of the imported training libraries."""
    return {
        name: metadata.version(name)
        for name in ("transformers", "accelerate", "trl", "peft", "lightning")
        if name in sys.modules
    }


def _of_model(model: nn.Module) -> dict[str, Any]:
    parameters = list(model.parameters())
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "dtypes": sorted({str(p.dtype) for p in parameters}),
        "weights_sha256": sha256_json(of_tensors(dict(model.named_parameters()))),
        "config": config.to_diff_dict() if hasattr(config, "to_diff_dict") else None,
    }


def _of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    groups = [
        {
            "lr": g["lr"],
            "weight_decay": g.get("weight_decay", 0.0),
            "parameters": sum(p.numel() for p in g["params"]),
        }
        for g in optimizer.param_groups
    ]
    return {
        "class": type(optimizer).__name__,
        "module": type(optimizer).__module__,
        "groups": groups,
    }


def _plain(value: Any) -> Any:
    """A value as canonical JSON holds it; what it cannot hold is written as text."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return value if abs(value) < 2**53 else str(value)
        case float():
            return value if value - value == 0 else str(value)
        case Mapping():
            return {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple() | set():
            return [_plain(v) for v in value]
    return str(value)
