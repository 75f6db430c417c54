"""Replays logged lines of any run through a runtime gate."""

import json
from pathlib import Path

from contracts.events import Sampled, Started, StepTaken
from contracts.gate import limits_of, resolve
from spec.errors import ConfigError, DataError
from spec.gates import load_spec

# Gates whose events a log line holds completely; the others watch things no log keeps.
REPLAYABLE = ("sampling.coherence", "runtime.loss-not-constant", "runtime.loss-spike", "runtime.finite")


def replay(gate_id: str, log: Path) -> dict:
    """{"gate", "first_fire_step", "fires", "records"} of a JSON-lines log. Raises ConfigError or DataError for what cannot be replayed."""
    if gate_id not in REPLAYABLE:
        raise ConfigError(f"{gate_id} cannot be replayed from a log", allowed=", ".join(REPLAYABLE), next_step="choose one with --gate")
    gate = load_spec().gates[gate_id]
    watcher = resolve(gate)(limits_of(gate))
    lines = _read(log)
    fires = []
    for number, line in enumerate(lines):
        event = _event(line, number, watcher.events, log)
        if isinstance(event, StepTaken) and number == 0 and Started in watcher.events:
            watcher.observe(Started(event.step - 1, {"random_loss_nats": line["loss_nats"], "warmup_steps": event.step}))
        if watcher.observe(event).outcome == "fail":
            fires.append(event.step)
    return {"gate": gate_id, "first_fire_step": fires[0] if fires else None, "fires": len(fires), "records": len(lines)}


def _read(log: Path) -> list[dict]:
    try:
        lines = [json.loads(line) for line in log.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise DataError(f"cannot read the log {log}: {e}", allowed="JSON lines", next_step="give samples.jsonl or metrics.jsonl") from e
    if not lines:
        raise DataError(f"the log {log} is empty, so nothing was replayed", next_step="give a log with at least one line")
    return lines


def _event(line: dict, number: int, wanted: tuple[type, ...], log: Path) -> Sampled | StepTaken:
    if Sampled in wanted and "text" in line:
        return Sampled(step=line.get("step", number), text=line["text"], language=line.get("language", "en"))
    if StepTaken in wanted and "loss_nats" in line:
        return StepTaken(
            step=line.get("step", number),
            loss_nats=float(line["loss_nats"]),
            grad_norm=float(line.get("grad_norm", 0.0)),
            clipped_grad_norm=0.0,
            max_grad_norm=0.0,
            lr=0.0,
            n_valid_tokens=0,
            n_expected_tokens=0,
            tokens_seen=0,
            wall_s=0.0,
            flops=0.0,
            peak_flops=0.0,
            changed_tensor_frac=1.0,
        )
    needed = "text" if Sampled in wanted else "loss_nats"
    raise DataError(f"{log} line {number + 1} has no {needed}", value=", ".join(sorted(line)), next_step="replay a log of the right kind")
