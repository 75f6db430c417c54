"""Replays logged lines of any run through a runtime gate, and computes what stopping there would
have saved.
"""

import json
import math
from pathlib import Path

from stackproof.contracts.events import Evaluated, Event, Sampled, Started, StepTaken
from stackproof.contracts.gate import limits_of, resolve
from stackproof.spec.errors import ConfigError, DataError
from stackproof.spec.files import lines_of
from stackproof.spec.gates import load_spec

MAX_LOG_BYTES, MAX_LINE_BYTES = 2**29, 2**20  # a log of a million steps has about 2**28
# Gates whose events a log line holds completely; the others watch things no log keeps.
# Each with the key its lines must have.
REPLAYABLE = {
    "sampling.coherence": "text",
    "sampling.dominance": "text",
    "sampling.loops": "text",
    "runtime.loss-not-constant": "loss_nats",
    "runtime.loss-spike": "loss_nats",
    "runtime.finite": "loss_nats",
    "runtime.trend": "loss_nats",
    "runtime.step-time": "tokens_per_s",
    "evaluation.divergence": "val_loss_nats",
    "evaluation.overfit-onset": "val_loss_nats",
}


def replay(gate_id: str, log: Path, seconds_per_step: float | None = None) -> dict:
    """{"gate", "first_fire_step", "fires", "records", "last_step", "saved_steps", "saved_frac",
    "saved_s"} of a JSON-lines log.

    Saved is what came after the first red line: steps, their share of all, and seconds, by
    `seconds_per_step` or by the speed in the lines, else None. Raises ConfigError or DataError
    for what cannot be replayed.
    """
    if gate_id not in REPLAYABLE:
        raise ConfigError(
            f"{gate_id} cannot be replayed from a log",
            allowed=", ".join(REPLAYABLE),
            next_step="choose one with --gate",
        )
    gate, key = load_spec().gates[gate_id], REPLAYABLE[gate_id]
    watcher = resolve(gate)(limits_of(gate))
    lines = _read(log)
    asked = [line for line in lines if key in line]
    if not asked or (key in ("text", "loss_nats") and len(asked) < len(lines)):
        number = next(i for i, line in enumerate(lines, 1) if key not in line)
        raise DataError(
            f"{log} line {number} has no {key}",
            value=", ".join(sorted(lines[number - 1])),
            next_step="replay a log of the right kind",
        )
    fires, previous = [], None
    for number, line in enumerate(asked):
        event = _event(line, number, key, previous)
        if number == 0 and Started in watcher.events:
            warmup_steps = 0 if key == "text" else event.step
            watcher.observe(
                Started(
                    event.step - 1,
                    {"random_loss_nats": line.get("loss_nats", 0.0), "warmup_steps": warmup_steps},
                )
            )
        verdict = watcher.observe(event)
        if verdict is not None and verdict.outcome == "fail":
            fires.append(event.step)
        previous = line.get("val_loss_nats")
    return {
        "gate": gate_id,
        "first_fire_step": fires[0] if fires else None,
        "fires": len(fires),
        "records": len(asked),
    } | _saved(lines, fires, seconds_per_step)


def _saved(lines: list[dict], fires: list[int], seconds_per_step: float | None) -> dict:
    """What came after the first red line."""
    last = max(line.get("step", number) for number, line in enumerate(lines))
    steps = last - fires[0] if fires else 0
    seconds = None if seconds_per_step is None else steps * seconds_per_step
    if (
        fires
        and seconds is None
        and all(line.get("tokens_per_s") and "tokens_seen" in line for line in lines)
    ):
        gone = [
            (b["tokens_seen"] - a["tokens_seen"]) / b["tokens_per_s"]
            for a, b in zip(lines, lines[1:])
            if b["step"] > fires[0]
        ]
        seconds = math.fsum(gone)
    return {
        "last_step": last,
        "saved_steps": steps,
        "saved_frac": steps / last if last else 0.0,
        "saved_s": seconds,
    }


def _read(log: Path) -> list[dict]:
    try:
        found = lines_of(log, MAX_LOG_BYTES, MAX_LINE_BYTES)
        lines = [json.loads(line) for _, line in found if line.strip()]
        if odd := [x for x in lines if not isinstance(x, dict)]:
            raise ValueError(f"a line is not an object: {odd[0]!r:.100}")
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(
            f"cannot read the log {log}: {e}",
            allowed="JSON lines",
            next_step="give samples.jsonl or metrics.jsonl",
        ) from e
    if not lines:
        raise DataError(
            f"the log {log} is empty, so nothing was replayed",
            next_step="give a log with at least one line",
        )
    return lines


def _event(line: dict, number: int, key: str, previous: float | None) -> Event:
    step = line.get("step", number)
    if key == "text":
        return Sampled(step=step, text=line["text"], language=line.get("language", "en"))
    if key == "val_loss_nats":
        loss = float(line[key])
        # A log holds neither batches nor the vocabulary: a rise counts whatever its noise, and the
        # first loss is its own measure.
        return Evaluated(
            step,
            loss,
            0.0,
            (loss,),
            "",
            previous,
            loss,
            line.get("ema_loss_nats", line.get("loss_nats")),
        )
    rate = line.get("tokens_per_s")
    return StepTaken(
        step=step,
        loss_nats=float(line.get("loss_nats", 0.0)),
        grad_norm=float(line.get("grad_norm", 0.0)),
        clipped_grad_norm=0.0,
        max_grad_norm=0.0,
        lr=0.0,
        n_valid_tokens=0,
        n_expected_tokens=0,
        tokens_seen=0,
        wall_s=1 / rate if rate else 0.0,
        flops=0.0,
        peak_flops=0.0,
    )
