"""The record of a run of another trainer: trainer, model, environment and the results of all gates,
in the `metadata.json` of any run.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from stackproof.contracts.callbacks.digest import of_tensors, world_size
from stackproof.contracts.callbacks.settings import Trained
from stackproof.contracts.events import StepTaken
from stackproof.spec.building import RecordBuilder, artefact
from stackproof.spec.canonical import sha256_json
from stackproof.spec.errors import ConfigError, GateFailed
from stackproof.spec.files import open_to_append
from stackproof.spec.gates import Spec
from stackproof.spec.provenance import environment
from stackproof.spec.records import GateResult

LOG, STEPS, RECORD = "gates.jsonl", "metrics.jsonl", "metadata.json"
LIBRARIES = ("transformers", "accelerate", "trl", "peft", "lightning")
OUTSIDE = (
    (
        "the trainer's own code and the data it drew, of which the record holds no hash; the "
        "commit is that of the gates"
    ),
    "the quality of the trained model",
)


class Cost(NamedTuple):
    """Time spent on gates: seconds before step 1, seconds after it, and the number of optimizer
    steps.
    """

    preflight_s: float
    watching_s: float
    steps: int

    @property
    def per_step_s(self) -> float:
        return self.watching_s / max(1, self.steps)


class End(NamedTuple):
    """How a run ended."""

    status: str
    reason: str
    exit_code: int = 0

    @classmethod
    def of(cls, error: BaseException | None) -> "End":
        """The end of a run with an error, or without."""
        first_line = next(iter(str(error).splitlines()), "")
        match error:
            case None:
                return cls("completed", "the trainer came to its end")
            case GateFailed():
                return cls("halted", first_line, GateFailed.exit_code)
            case KeyboardInterrupt():
                return cls("interrupted", "interrupted from outside", 130)
        return cls("failed", f"{type(error).__name__}: {first_line}", 1)


class RunRecord:
    """Opened before step 1; writes a line for every step, and `metadata.json` when the run ends.

    `trainer` holds the name, package and version of the trainer, `configured` its own settings.
    Raises ConfigError if the folder holds a record already.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: Spec,
        trained: Trained,
        trainer: Mapping[str, Any],
        configured: Mapping[str, Any],
        gates: Mapping[str, Any],
    ):
        self.folder, self.trainer = Path(folder), trainer
        self._first = self._last = trained.first_step
        self._last_loss: float | None = None
        if (self.folder / RECORD).exists() or (self.folder / STEPS).exists():
            raise ConfigError(
                f"{self.folder} holds the record of a run already",
                allowed="a folder without one",
                next_step="name another folder as record",
            )
        config = {
            "trainer": trainer,
            "told": configured,
            "first_step": trained.first_step,
            "model": _of_model(trained.model),
            "optimizer": _of_optimizer(trained.optimizer),
            "scheduler": None if trained.scheduler is None else type(trained.scheduler).__name__,
            "gates": gates,
        }
        self.builder = RecordBuilder(
            kind="foreign",
            spec=spec,
            config=_plain(config),
            claim="",
            not_covered=OUTSIDE,
            command=["python", *sys.argv] if sys.argv[0] else ["python"],
        )
        versions = {n: metadata.version(n) for n in LIBRARIES if n in sys.modules}
        versions[trainer["package"]] = trainer["version"]
        device = str(next(trained.model.parameters()).device)
        self.builder.environment = environment(device, world_size=world_size(), **versions)
        script = Path(sys.argv[0] or ".")
        if script.is_file():
            self.builder.inputs.append(artefact(script.resolve(), root=Path.cwd(), name="script"))

    def step(self, event: StepTaken) -> None:
        """One line of the step log."""
        names = ("step", "loss_nats", "grad_norm", "clipped_grad_norm", "lr")
        append_line(self.folder / STEPS, {name: getattr(event, name) for name in names})
        self._last, self._last_loss = event.step, event.loss_nats

    def close(self, end: End, results: Sequence[GateResult], cost: Cost) -> None:
        """Write the record."""
        builder, trainer = self.builder, self.trainer
        red = [g.id for g in results if g.verdict == "fail"]
        if red and end.status == "completed":
            reason = f"{', '.join(red)} red, and nothing was raised"
            end = End("failed", reason, GateFailed.exit_code)
        held = sum(g.verdict == "pass" for g in results)
        builder.claim = (
            f"{trainer['name']} of {trainer['package']} {trainer['version']} trained "
            f"{builder.config['model']['class']} for {self._last - self._first} step(s); {held} of "
            f"{len(results)} gates held, {len(red)} were red."
        )
        unjudged = [f"{g.id}: {g.message}" for g in results if g.verdict == "not_run"]
        builder.not_covered = (*OUTSIDE, *unjudged)
        builder.metric("steps", self._last, "1")
        builder.metric("gate_s_before_step_1", cost.preflight_s, "s", better="lower")
        builder.metric("gate_s_per_step", cost.per_step_s, "s", n=cost.steps, better="lower")
        if isinstance(loss := _plain(self._last_loss), float):
            builder.metric("train_loss_nats", loss, "nats/token", better="lower")
        builder.finish(
            self.folder,
            status=end.status,
            end_reason=end.reason,
            exit_code=end.exit_code,
            gates=results,
            series=(STEPS, LOG),
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


def append_line(path: Path, document: Mapping[str, Any]) -> None:
    """Append a document to a file of JSON lines. Figures that are not finite become strings.
    Raises FileRefused for a link or a file of another kind, OSError if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_to_append(path) as file:
        file.write(json.dumps(_plain(document)).encode() + b"\n")


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
