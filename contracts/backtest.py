"""Replays logged lines of any run through a runtime gate, and computes what stopping there would
have saved.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator
from pydantic_core import from_json

from stackproof.contracts.coherence import WORDLIKE
from stackproof.contracts.events import Evaluated, Event, Sampled, Started, StepTaken
from stackproof.contracts.gate import RuntimeCheck, Verdict, limits_of, resolve
from stackproof.spec.errors import ConfigError, DataError, IntegrityError
from stackproof.spec.files import lines_of
from stackproof.spec.gates import load_spec
from stackproof.spec.series import Count, Figure, Line
from stackproof.spec.tables import validated

MAX_LOG_BYTES, MAX_LINE_BYTES = 2**29, 2**20  # a log of a million steps has about 2**28
MAX_TEXT_CHARS = 2**14  # the time to score a text can grow with the square of its length
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


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _finite(speed: float) -> float | None:
    if speed < 0:
        raise ValueError("a speed is not negative")
    return speed if math.isfinite(speed) else None


def _judged(text: str) -> str:
    return text[:MAX_TEXT_CHARS]


def _known(language: str) -> str:
    return language if language in WORDLIKE else "any"


Whole = Annotated[Count, BeforeValidator(_whole)]


class LogLine(Line):
    """What gates read of a line of samples.jsonl or metrics.jsonl, of any trainer. Null is as good
    as absent, and so is a speed that is not finite. A count may be written as a float. Of a text,
    the first MAX_TEXT_CHARS characters are judged; a language other than en and code is any.
    """

    step: Whole | None = None
    text: Annotated[str, AfterValidator(_judged)] | None = None
    language: Annotated[str, AfterValidator(_known)] | None = None
    loss_nats: Figure | None = None
    val_loss_nats: Figure | None = None
    ema_loss_nats: Figure | None = None
    grad_norm: Figure | None = None
    tokens_seen: Whole | None = None
    tokens_per_s: Annotated[Figure, AfterValidator(_finite)] | None = None


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
    replayed = [line for line in lines if key in line]
    if not replayed or (key in ("text", "loss_nats") and len(replayed) < len(lines)):
        number = next(i for i, line in enumerate(lines, 1) if key not in line)
        raise DataError(
            f"{log} line {number} has no {key}",
            value=", ".join(sorted(lines[number - 1])),
            next_step="replay a log of the right kind",
        )
    fires, previous = [], None
    for line in replayed:
        event = _event(line, key, previous)
        if line is replayed[0] and Started in watcher.events:
            warmup_steps = 0 if key == "text" else event.step
            watcher.observe(
                Started(
                    event.step - 1,
                    {"random_loss_nats": line.get("loss_nats", 0.0), "warmup_steps": warmup_steps},
                )
            )
        verdict = _observed(watcher, event)
        if verdict is not None and verdict.outcome == "fail":
            fires.append(event.step)
        previous = line.get("val_loss_nats")
    return {
        "gate": gate_id,
        "first_fire_step": fires[0] if fires else None,
        "fires": len(fires),
        "records": len(replayed),
    } | _saved(lines, fires, seconds_per_step)


def _observed(watcher: RuntimeCheck, event: Event) -> Verdict | None:
    """The verdict of a gate. Raises DataError for figures that it cannot be computed from, such as
    a held-out loss of 0, or one beyond the range of floats.
    """
    try:
        with np.errstate(all="ignore"):
            return watcher.observe(event)
    except (ArithmeticError, ValueError) as e:
        raise DataError(
            f"{watcher.gate_id} cannot be computed at step {event.step}: {e}",
            next_step="correct the figures of the log, or leave the lines out",
        ) from e


def _saved(lines: list[dict], fires: list[int], seconds_per_step: float | None) -> dict:
    """What came after the first red line."""
    last = max(line["step"] for line in lines)
    steps = last - fires[0] if fires else 0
    seconds = None if seconds_per_step is None else steps * seconds_per_step
    if (
        fires
        and seconds is None
        and all(line.get("tokens_per_s") and "tokens_seen" in line for line in lines)
    ):
        seconds = sum(
            (b["tokens_seen"] - a["tokens_seen"]) / b["tokens_per_s"]
            for a, b in zip(lines, lines[1:])
            if b["step"] > fires[0]
        )
    return {
        "last_step": last,
        "saved_steps": steps,
        "saved_frac": steps / last if last else 0.0,
        "saved_s": seconds if seconds is not None and math.isfinite(seconds) else None,
    }


def _read(log: Path) -> list[dict[str, Any]]:
    """The lines of a log, validated; a line without a step has its index as step."""
    lines: list[dict[str, Any]] = []
    try:
        for number, data in lines_of(log, MAX_LOG_BYTES, MAX_LINE_BYTES):
            if data.strip():
                line = _parsed(data, origin=f"line {number}")
                lines.append({"step": len(lines)} | line.model_dump(exclude_none=True))
    except (OSError, IntegrityError) as e:
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


def _parsed(data: bytes, *, origin: str) -> LogLine:
    """A line as a model. Unlike in strict JSON, numbers may be NaN or infinite, as other trainers
    write them.
    """
    try:
        value = from_json(data)
    except ValueError as e:
        raise IntegrityError(f"{origin}: {e}") from e
    return validated(LogLine, value, origin=origin)


def _event(line: dict[str, Any], key: str, previous: float | None) -> Event:
    step = line["step"]
    if key == "text":
        return Sampled(step=step, text=line["text"], language=line.get("language", "en"))
    if key == "val_loss_nats":
        loss = line[key]
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
        loss_nats=line.get("loss_nats", 0.0),
        grad_norm=line.get("grad_norm", 0.0),
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
