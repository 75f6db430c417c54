"""Gates of evaluation: bytes are conserved, a score does not depend on how it was computed, and decisions beat the noise."""

import hashlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contracts.events import Evaluated, Event, Started
from contracts.gate import Stateless, Verdict, decide, decides, failed, passed

# --- conservation of bytes ------------------------------------------------------------------------------------------

KNOWN = "The quick brown fox jumps over the lazy dog; 0123456789 times it did, and then it slept. " * 3
UNKNOWN_CHARS = 7


@decides("evaluation.byte-conservation")
def byte_conservation(
    limits: SimpleNamespace,
    *,
    evaluate_known: Callable[[str], Any],
    known_text: str,
    evaluate_with_unknown: Callable[[str], Any],
    evaluate_uniform: Callable[[str], Any],
    uniform_vocab_size: int,
    unknown_char: str,
) -> Verdict:
    """Each byte of a text is scored once; characters outside the vocabulary are counted and change no score; guessing costs log2 V.

    `evaluate_known(text)` uses the run's own model and tokenizer, which knows every character of `known_text`;
    `evaluate_with_unknown` a tokenizer that has ASCII but lacks `unknown_char`; `evaluate_uniform` a model that gives every token
    the same logit and one token per character. All go through the stack's own evaluation and return bits_per_byte, bits_per_char,
    total_nats, bytes, chars, dropped_chars and dropped_bytes.
    """
    own = evaluate_known(known_text)
    lost_bytes = abs(own.bytes - len(known_text.encode())) + own.dropped_chars + abs(own.dropped_bytes)
    own_error = abs(own.bits_per_byte - own.total_nats / math.log(2) / own.bytes) / own.bits_per_byte

    clean, dirty = evaluate_with_unknown(KNOWN), evaluate_with_unknown(_with_unknown(KNOWN, unknown_char))
    counted = dirty.dropped_chars == UNKNOWN_CHARS and dirty.dropped_bytes == UNKNOWN_CHARS * len(unknown_char.encode())
    counted = counted and clean.dropped_chars == 0 and clean.bytes == len(KNOWN.encode()) and clean.chars == len(KNOWN)
    flattery = max(_rel(dirty.bits_per_byte, clean.bits_per_byte), _rel(dirty.bits_per_char, clean.bits_per_char))

    uniform = evaluate_uniform(KNOWN)
    uniform_error = abs(uniform.bits_per_char - math.log2(uniform_vocab_size))
    worst = max(own_error, flattery, uniform_error)
    ok = worst <= limits.rel_error_max and lost_bytes <= limits.lost_bytes_max and counted
    return decide(
        ok,
        "bytes are not conserved between text and score, or characters outside the vocabulary change it",
        lost_bytes=lost_bytes,
        flattery=flattery,
        uniform_error_bits=uniform_error,
        dropped_chars=dirty.dropped_chars,
        expected_dropped_chars=UNKNOWN_CHARS,
    )


def _with_unknown(text: str, char: str) -> str:
    """The text with UNKNOWN_CHARS characters put in at even distances."""
    step = len(text) // UNKNOWN_CHARS
    return "".join(c + (char if i % step == step - 1 and i // step < UNKNOWN_CHARS else "") for i, c in enumerate(text))


def _rel(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


# --- invariance -----------------------------------------------------------------------------------------------------


@decides("evaluation.invariance")
def invariance(
    limits: SimpleNamespace,
    *,
    evaluated_model: nn.Module,
    evaluate_rows: Callable[[int], Any],
    evaluated_rows: tuple[Tensor, Tensor],
    token_bytes: np.ndarray,
) -> Verdict:
    """One score at batch size 1 and 8 with a ragged end, bit-equal when repeated, and nothing about the model or torch has changed.

    `evaluated_model` has dropout above 0. `evaluate_rows(batch_size)` scores the same held-out rows, the last one partly
    masked, with the stack's own evaluation and returns loss_nats, bits_per_byte and n_bytes. `evaluated_rows` are their input_ids and
    labels (R, T), from which the score is also worked out here, in float64 on the model's own logits; `token_bytes[id]` is how many
    bytes an id stands for.
    """
    model = evaluated_model.train()
    if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return failed("the model given to the gate has no dropout, so an evaluation in training mode would not show")
    still = next(m for m in reversed(list(model.modules())) if not isinstance(m, nn.Dropout))
    still.eval()
    before = _state(model)
    one, again, eight = evaluate_rows(1), evaluate_rows(1), evaluate_rows(8)
    after = _state(model)
    changed = [name for name in before if before[name] != after[name]]
    repeat = max(abs(one.loss_nats - again.loss_nats), abs(one.bits_per_byte - again.bits_per_byte))
    batch_error = max(_rel(eight.loss_nats, one.loss_nats), _rel(eight.bits_per_byte, one.bits_per_byte))
    nats, n_bytes = _worked_out(model, *evaluated_rows, token_bytes)
    own_error = max(_rel(one.loss_nats, nats), _rel(one.n_bytes, n_bytes), _rel(one.bits_per_byte * n_bytes, one.total_nats / math.log(2)))
    text = (
        f"an evaluation changed {', '.join(changed)}"
        if changed
        else f"the score is not what follows from the logits: {one.loss_nats:.6g} nats for {nats:.6g}, {one.n_bytes} bytes for {n_bytes}"
        if own_error > limits.own_rel_error_max
        else "the score depends on how it was computed: batch size, or the same call again"
    )
    ok = repeat <= limits.repeat_abs_max and batch_error <= limits.batch_rel_error_max and own_error <= limits.own_rel_error_max
    ok = ok and not changed
    return decide(ok, text, repeat_abs=repeat, batch_rel_error=batch_error, own_rel_error=own_error, changed=len(changed))


def _worked_out(model: nn.Module, ids_RT: Tensor, labels_RT: Tensor, token_bytes: np.ndarray) -> tuple[float, int]:
    """(mean nats of the labels that are scored, bytes they stand for), row by row in float64."""
    model.eval()
    scored, nats = labels_RT >= 0, []
    with torch.no_grad():
        for ids_T, labels_T, scored_T in zip(ids_RT, labels_RT, scored):
            log_probs_TV = model(ids_T[None].to(next(model.parameters()).device))[0].cpu().double().log_softmax(-1)
            nats.append(-log_probs_TV[scored_T].gather(1, labels_T[scored_T, None]))
    return float(torch.cat(nats).mean()), int(np.asarray(token_bytes)[labels_RT[scored].numpy()].sum())


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything an evaluation must leave alone: weights, buffers, each module's mode and drop rate, gradients, random numbers."""
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "the weights": digest.hexdigest(),
        "a module's mode": [m.training for m in model.modules()],
        "a drop rate": [m.p for m in model.modules() if isinstance(m, nn.Dropout)],
        "what is trained": [p.requires_grad for p in model.parameters()],
        "torch's gradient mode": torch.is_grad_enabled(),
        "the random state": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }


# --- the stop rule --------------------------------------------------------------------------------------------------

NOISE_OVER_GAIN, TREND_ROUNDS, SIMULATIONS = 0.04 / 0.03, 24, 200
CLIFF_NATS, CLIFF_ROUNDS = 0.5, 4


@decides("evaluation.stop-rule")
def stop_rule(
    limits: SimpleNamespace,
    *,
    make_stop_rule: Callable[[], Any],
    stop_declared: dict[str, Any],
    paired_difference_std: float,
    n_eval_batches: int,
    expected_gain_nats: float | None,
) -> Verdict:
    """The run's own rule does not stop on noise around a falling trend, stops on a plateau exactly when declared, and sees the gain
    it waits for: 2 standard errors of the paired difference at the run's own number of held-out batches are below it. Where the rule
    has a least improvement that counts (min_delta_nats), that must stand out as well: its standard error is at most half of it.

    `make_stop_rule()` gives a fresh rule with `update(batch_nats)`, whose result has `stop` and `wait`. `stop_declared` holds kind,
    patience and min_epochs.
    """
    if stop_declared["kind"] == "never":
        stopped = sum(d.stop for d in map(make_stop_rule().update, [[1.0, 1.1]] * 64))
        return passed("the run trains all its steps", false_stops=0) if not stopped else failed("a rule that never stops stopped")
    simulated = (
        _stops_on_noise(make_stop_rule(), s, n_eval_batches, paired_difference_std, expected_gain_nats) for s in range(SIMULATIONS)
    )
    false_stops = sum(simulated)
    late = _plateau_delay(make_stop_rule(), CLIFF_ROUNDS, stop_declared)
    early = _plateau_delay(make_stop_rule(), 1, stop_declared)
    detectable = 2 * paired_difference_std / math.sqrt(n_eval_batches)
    to_see = min(x for x in (expected_gain_nats, stop_declared["min_delta_nats"]) if x > 0)
    rate = false_stops / SIMULATIONS
    wrong = [
        text
        for ok, text in (
            (rate <= limits.false_stop_rate_max, f"{false_stops} of {SIMULATIONS} simulated runs stop on noise"),
            (late == 0 and early == 0, "a plateau does not stop the run exactly at best + patience"),
            (
                detectable <= to_see,
                f"{n_eval_batches} held-out batches can see a gain of {detectable:.3g} nats, one of {to_see:g} is to be seen",
            ),
        )
        if not ok
    ]
    return decide(
        not wrong,
        "; ".join(wrong),
        false_stop_rate=rate,
        plateau_delay_rounds=max(abs(late), abs(early)),
        detectable_gain_nats=detectable,
        expected_gain_nats=expected_gain_nats,
        n_eval_batches=n_eval_batches,
    )


def _stops_on_noise(rule: Any, seed: int, n_batches: int, paired_std: float, gain: float) -> bool:
    """Whether the rule ends a run whose loss falls by `gain` a round under noise 4/3 as wide.

    The founding note ship-two-001 saw a band of ±0.04 on a gain of 0.03.

    Each batch keeps its own difficulty over the rounds, and adds noise whose paired differences have the measured spread.
    """
    draw = np.random.default_rng(seed)
    difficulty = draw.normal(0, 0.5, n_batches)
    for r in range(TREND_ROUNDS):
        level = 10.0 - gain * r + draw.uniform(-1, 1) * NOISE_OVER_GAIN * gain
        noise = draw.normal(0, paired_std / math.sqrt(2), n_batches)
        if rule.update((level + difficulty + noise - noise.mean()).tolist()).stop:
            return True
    return False


def _plateau_delay(rule: Any, falling_rounds: int, declared: dict[str, Any]) -> int:
    """Rounds by which the stop misses its declared place on a curve that falls steeply, then stays level. −1 if there is no stop."""
    due = max(falling_rounds - 1 + declared["patience"], declared["min_epochs"] - 1)
    for r in range(due + 64):
        level = 10.0 - CLIFF_NATS * min(r, falling_rounds - 1)
        if rule.update([level, level + 0.3, level - 0.2]).stop:
            return r - due
    return -1


# --- inside the run -------------------------------------------------------------------------------------------------


@decides("evaluation.divergence")
class Divergence(Stateless):
    """Held-out loss is finite, at first not far above guessing, and never a multiple of the evaluation before.

    Weights that were trained elsewhere begin far below guessing, whatever the vocabulary: their first loss has a bound of its own.
    """

    events = (Evaluated,)

    def observe(self, event: Event) -> Verdict:
        first = event.previous_loss_nats is None
        base = event.random_loss_nats if first else event.previous_loss_nats
        allowed = self.limits.over_random_max if first else self.limits.over_previous_max
        ratio = event.loss_nats / base
        known = not first or not event.pretrained or event.loss_nats <= self.limits.pretrained_nats_max
        return decide(
            ratio <= allowed and known,
            f"step {event.step}: held-out loss {event.loss_nats:.4g} nats is {ratio:.3g} × {'ln V' if first else 'the evaluation before'}"
            + ("" if known else f"; weights trained before begin at {self.limits.pretrained_nats_max:g} at most"),
            ratio=ratio,
            loss_nats=event.loss_nats,
        )


@decides("evaluation.held-out")
class HeldOut:
    """What is scored is as many different rows as declared, not read in training; and the best evaluation is the lowest there was."""

    events = (Started, Evaluated)

    def __init__(self, limits: SimpleNamespace):
        self.limits, self.n_batches, self.best, self.rows, self.begun_at = limits, None, None, None, 0

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.n_batches, self.rows, self.begun_at = event.plan.get("n_eval_batches"), None, event.step
            return None
        if self.rows is None and event.rows is not None:
            self.rows = event.rows()
        problem = self._problem(event)
        self.best = [event.best_step, event.best_loss_nats]
        found = 0.0 if self.rows is None else self.rows.found_in_training_frac
        repeated = 0 if self.rows is None else self.rows.n_rows - self.rows.n_distinct
        return decide(
            not problem,
            f"step {event.step}: {problem}",
            found_in_training_frac=found,
            repeated_rows=repeated,
            n_batches=len(event.batch_nats),
        )

    def _problem(self, event: Evaluated) -> str:
        """What is wrong; empty if nothing is."""
        if self.rows is None:
            return "nobody says which rows were scored"
        if self.rows.n_rows - self.rows.n_distinct > self.limits.repeated_rows_max * self.rows.n_rows:
            return f"only {self.rows.n_distinct} of {self.rows.n_rows} held-out rows are different ones"
        if self.rows.found_in_training_frac > self.limits.found_in_training_frac_max:
            return f"{self.rows.found_in_training_frac:.0%} of what is scored is in the training split"
        if self.n_batches is not None and len(event.batch_nats) != self.n_batches:
            return f"{len(event.batch_nats)} batches were scored, {self.n_batches} were declared"
        step, loss = self.best or (None, math.inf)
        expected = [event.step, event.loss_nats] if loss is None or event.loss_nats < loss else [step, loss]
        if self.best is None and self.begun_at and event.best_loss_nats is not None and event.best_loss_nats < event.loss_nats:
            return ""  # a run that goes on may know of evaluations this gate has not seen
        if [event.best_step, event.best_loss_nats] != expected:
            return (
                f"the best evaluation is said to be {event.best_loss_nats} at step {event.best_step}, it is {expected[1]} at {expected[0]}"
            )
        return ""

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]


@decides("evaluation.same-batches")
class SameBatches:
    """Every evaluation of a run scores the same batches; otherwise its differences say nothing about the model."""

    events = (Evaluated,)

    def __init__(self, limits: SimpleNamespace):
        self.limits, self.batch_hash, self.n_batches, self.changes = limits, None, 0, 0

    def observe(self, event: Event) -> Verdict:
        if self.batch_hash is None:
            self.batch_hash, self.n_batches = event.batch_hash, len(event.batch_nats)
        differs = event.batch_hash != self.batch_hash or len(event.batch_nats) != self.n_batches
        self.changes += differs
        return decide(
            self.changes <= self.limits.changes_max,
            f"step {event.step}: the held-out batches are not those of the first evaluation",
            changes=self.changes,
            n_batches=len(event.batch_nats),
        )

    def state_dict(self) -> dict:
        return {"batch_hash": self.batch_hash, "n_batches": self.n_batches, "changes": self.changes}

    def load_state_dict(self, state: dict) -> None:
        self.batch_hash, self.n_batches, self.changes = state["batch_hash"], state["n_batches"], state["changes"]


@decides("evaluation.overfit-onset")
class OverfitOnset:
    """Training loss falls while held-out loss rises out of its noise.

    Both slopes are those of the last `rounds` evaluations. The rise from the first to the last of them must exceed `rise_z_min`
    standard errors of the paired difference over the held-out batches. The gap is held-out minus training loss.
    """

    events = (Evaluated,)

    def __init__(self, limits: SimpleNamespace):
        self.limits, self.rounds = limits, []

    def observe(self, event: Event) -> Verdict | None:
        if event.train_loss_nats is None:
            return None
        self.rounds = [*self.rounds, [event.train_loss_nats, event.loss_nats, list(event.batch_nats)]][-int(self.limits.rounds) :]
        gap = event.loss_nats - event.train_loss_nats
        if len(self.rounds) < self.limits.rounds:
            return passed("", train_slope=0.0, held_out_slope=0.0, gap_nats=gap, rise_z=0.0)
        train, held_out = _slope([r[0] for r in self.rounds]), _slope([r[1] for r in self.rounds])
        z = _rise_z(self.rounds[0][2], self.rounds[-1][2])
        onset = train < 0 < held_out and gap > 0 and z > self.limits.rise_z_min
        return decide(
            not onset,
            f"step {event.step}: training loss falls by {-train:.3g} nats a round and held-out loss rises by {held_out:.3g}",
            train_slope=train,
            held_out_slope=held_out,
            gap_nats=gap,
            rise_z=min(z, 1e9),
        )

    def state_dict(self) -> dict:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict) -> None:
        self.rounds = state["rounds"]


def _slope(values: list[float]) -> float:
    """Least-squares slope over equally spaced points."""
    middle, mean = (len(values) - 1) / 2, math.fsum(values) / len(values)
    return sum((i - middle) * (v - mean) for i, v in enumerate(values)) / sum((i - middle) ** 2 for i in range(len(values)))


def _rise_z(first: list[float], last: list[float]) -> float:
    """Mean rise over batches in standard errors of the paired difference; infinite for a rise without spread."""
    rises = np.asarray(last) - np.asarray(first)
    error = float(rises.std(ddof=1)) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
    rise = float(rises.mean())
    return rise / error if error else math.copysign(math.inf, rise) if rise else 0.0
