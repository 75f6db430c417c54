"""Gates of evaluation: bytes are conserved, a score does not depend on how it was computed, and
decisions beat the noise.
"""

import hashlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stackproof.contracts.events import (
    SINCE_UPDATE,
    Evaluated,
    Event,
    Finished,
    Sampled,
    Saved,
    Started,
    StateCompared,
)
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    failed,
    first_of,
    not_run,
    passed,
    worst,
)
from stackproof.contracts.generation import contextual_model
from stackproof.contracts.loss import IGNORE
from stackproof.contracts.oracle import documents
from stackproof.contracts.subject import MicroBatch, Subject

# --- conservation of bytes ------------------------------------------------------------------------

KNOWN = (
    "The quick brown fox jumps over the lazy dog; 0123456789 times it did, and then it slept. " * 3
)
UNKNOWN, UNKNOWN_CHARS = "Ω", 7


class AsciiTokenizer:
    """One id per ASCII character, an end-of-text token, and nothing else, so that the dropped
    characters are defined.
    """

    kind, eos_id, vocab_size = "char", 0, 128

    def __init__(self) -> None:
        self.token_bytes = np.array([0] + [1] * 127, dtype=np.int32)

    def encode(self, text: str) -> SimpleNamespace:
        """Ids of the ASCII characters; the rest is dropped and counted."""
        ids = [ord(c) for c in text if 0 < ord(c) < 128]
        return SimpleNamespace(ids=ids, dropped_chars=len(text) - len(ids))


class UniformModel(nn.Module):
    """Gives each of `vocab_size` tokens the same logit, at every position."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, ids_BT: Tensor) -> Tensor:
        return torch.zeros(*ids_BT.shape, self.vocab_size, device=ids_BT.device)


class PairModel(nn.Module):
    """Logits that follow from the token before alone: a row of a fixed table (V, V)."""

    def __init__(self, vocab_size: int):
        super().__init__()
        draw = torch.Generator().manual_seed(54)
        self.logits_VV = 3 * torch.randn(vocab_size, vocab_size, generator=draw)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.logits_VV.to(ids_BT.device)[ids_BT]


@decides("evaluation.byte-conservation")
def byte_conservation(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Each byte of a text is scored once, after the token before it; characters outside the
    vocabulary are counted and change no score; guessing costs log2 V.

    Three models are scored: the run's own under its tokenizer, on a text without unknown
    characters; one that gives every token the same logit; and one whose logits follow from the
    token before alone, where a text begins after token 0.
    """
    score, tokenizer = subject.evaluation.score_text, subject.tokenizer.tokenizer
    known, ascii_only = known_text(tokenizer), AsciiTokenizer()
    own = score(subject.model.module, tokenizer, known)
    lost_bytes = abs(own.bytes - len(known.encode())) + own.dropped_chars + abs(own.dropped_bytes)
    own_error = (
        abs(own.bits_per_byte - own.total_nats / math.log(2) / own.bytes) / own.bits_per_byte
    )

    uniform = UniformModel(ascii_only.vocab_size)
    clean, dirty = (score(uniform, ascii_only, text) for text in (KNOWN, _with_unknown(KNOWN)))
    counted = (
        dirty.dropped_chars == UNKNOWN_CHARS
        and dirty.dropped_bytes == UNKNOWN_CHARS * len(UNKNOWN.encode())
        and clean.dropped_chars == 0
        and clean.bytes == len(KNOWN.encode())
        and clean.chars == len(KNOWN)
    )
    flattery = worst(
        (
            _rel(dirty.bits_per_byte, clean.bits_per_byte),
            _rel(dirty.bits_per_char, clean.bits_per_char),
        )
    )

    uniform_error = abs(clean.bits_per_char - math.log2(ascii_only.vocab_size))
    pairs = PairModel(ascii_only.vocab_size)
    paired, nats = score(pairs, ascii_only, KNOWN), _nats_of_pairs(KNOWN, pairs.logits_VV)
    pair_error = worst(
        (
            _rel(paired.total_nats, nats),
            _rel(paired.bits_per_char * paired.chars, nats / math.log(2)),
        )
    )
    rel_error = worst((own_error, flattery, uniform_error, pair_error))
    ok = rel_error <= limits.rel_error_max and lost_bytes <= limits.lost_bytes_max and counted
    return decide(
        ok,
        "bytes are not conserved between text and score, or characters outside the vocabulary "
        "change it",
        lost_bytes=lost_bytes,
        flattery=flattery,
        uniform_error_bits=uniform_error,
        pair_error=pair_error,
        dropped_chars=dirty.dropped_chars,
        expected_dropped_chars=UNKNOWN_CHARS,
    )


def known_text(tokenizer: Any) -> str:
    """A text that the tokenizer encodes without dropping a character: English prose as far as
    possible, else its own entries.
    """
    kept = {c for c in set(KNOWN) if not tokenizer.encode(c).dropped_chars}
    if kept:
        return "".join(c for c in KNOWN if c in kept)
    return tokenizer.decode([i for i in range(tokenizer.vocab_size) if i != tokenizer.eos_id])


def _nats_of_pairs(text: str, logits_VV: Tensor) -> float:
    """What a text costs if each character depends on the one before it alone,
    and the first on token 0.
    """
    ids = torch.tensor([0, *text.encode("ascii")])
    return -float(logits_VV.double().log_softmax(-1)[ids[:-1], ids[1:]].sum())


def _with_unknown(text: str) -> str:
    """The text with UNKNOWN_CHARS unknown characters put in at even distances."""
    step = len(text) // UNKNOWN_CHARS
    return "".join(
        c + (UNKNOWN if i % step == step - 1 and i // step < UNKNOWN_CHARS else "")
        for i, c in enumerate(text)
    )


def _rel(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


# --- invariance -----------------------------------------------------------------------------------


DROPOUT, ROWS, ROW_TOKENS = 0.1, 6, 48


@decides("evaluation.invariance")
def invariance(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """One score at batch size 1 and 8 with a ragged end, bit-equal when repeated, and nothing about
    the model or torch has changed.

    The model has dropout. Of the held-out rows the last one is partly masked. The score is also
    worked out here, in float64 on the model's own logits, each document as if it stood alone.
    """
    model, token_bytes = contextual_model(subject, DROPOUT), subject.tokenizer.tokenizer.token_bytes
    if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return failed(
            "the model given to the gate has no dropout, so an evaluation in training mode would "
            "not show"
        )
    seq_len = min(subject.model.max_length, ROW_TOKENS)
    rows = _held_out_rows(subject.model.vocab_size, seq_len)

    def evaluate_rows(batch_size: int) -> Any:
        batches = zip(*(part.split(batch_size) for part in rows))
        return subject.evaluation.score_batches(model, [MicroBatch(*batch) for batch in batches])

    still = next(m for m in reversed(list(model.modules())) if not isinstance(m, nn.Dropout))
    still.eval()
    before = _state(model)
    one, again, eight = evaluate_rows(1), evaluate_rows(1), evaluate_rows(8)
    after = _state(model)
    changed = [name for name in before if before[name] != after[name]]
    repeat = worst(
        (abs(one.loss_nats - again.loss_nats), abs(one.bits_per_byte - again.bits_per_byte))
    )
    batch_error = worst(
        (_rel(eight.loss_nats, one.loss_nats), _rel(eight.bits_per_byte, one.bits_per_byte))
    )
    nats, n_bytes = _worked_out(model, *rows, token_bytes)
    spread = float(np.std(one.batch_nats, ddof=1)) / math.sqrt(len(one.batch_nats))
    own_error = worst(
        (
            _rel(one.loss_nats, nats),
            _rel(one.n_bytes, n_bytes),
            _rel(one.bits_per_byte * n_bytes, one.total_nats / math.log(2)),
            _rel(one.stderr_nats, spread),
        )
    )
    text = (
        f"an evaluation changed {', '.join(changed)}"
        if changed
        else (
            f"the score is not what follows from the logits: {one.loss_nats:.6g} nats for "
            f"{nats:.6g}, {one.n_bytes} bytes for {n_bytes}"
        )
        if own_error > limits.own_rel_error_max
        else "the score depends on how it was computed: batch size, or the same call again"
    )
    ok = (
        repeat <= limits.repeat_abs_max
        and batch_error <= limits.batch_rel_error_max
        and own_error <= limits.own_rel_error_max
    )
    ok = ok and not changed
    return decide(
        ok,
        text,
        repeat_abs=repeat,
        batch_rel_error=batch_error,
        own_rel_error=own_error,
        changed=len(changed),
    )


def _held_out_rows(vocab_size: int, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, labels and document ids (R, T) of fixed rows; most labels of the last row are
    masked, and row r has r + 1 documents.
    """
    draw = torch.Generator().manual_seed(52)
    ids = torch.randint(0, vocab_size, (ROWS, seq_len + 1), generator=draw)
    labels = ids[:, 1:].clone()
    labels[-1, max(1, seq_len // 3) :] = IGNORE
    documents = torch.arange(seq_len) * torch.arange(1, ROWS + 1)[:, None] // seq_len
    return ids[:, :-1], labels, documents


def _worked_out(
    model: nn.Module,
    ids_RT: Tensor,
    labels_RT: Tensor,
    document_ids_RT: Tensor,
    token_bytes: np.ndarray,
) -> tuple[float, int]:
    """(mean nats of the labels that are scored, bytes they stand for),
    document by document in float64.
    """
    model.eval()
    scored, nats = labels_RT >= 0, []
    with torch.no_grad():
        for row, places in documents(ids_RT.shape, document_ids_RT):
            own = row, places
            log_probs_TV = (
                model(ids_RT[own][None].to(next(model.parameters()).device))[0]
                .cpu()
                .double()
                .log_softmax(-1)
            )
            nats.append(-log_probs_TV[scored[own]].gather(1, labels_RT[own][scored[own], None]))
    return float(torch.cat(nats).mean()), int(
        np.asarray(token_bytes)[labels_RT[scored].numpy()].sum()
    )


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything an evaluation must leave alone: weights, buffers, each module's mode and drop
    rate, gradients, random numbers.
    """
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


# --- inside the run -------------------------------------------------------------------------------


@decides("evaluation.divergence")
class Divergence(RuntimeCheck):
    """Held-out loss is finite, at first not far above guessing,
    and never a multiple of the evaluation before, which the run's state remembers rightly.

    Weights that were trained elsewhere begin far below guessing, whatever the vocabulary: their
    first loss has a bound of its own.
    """

    events = (Evaluated,)
    kept = ("before_nats",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.before_nats: float | None = None

    def observe(self, event: Event) -> Verdict:
        before, self.before_nats = self.before_nats, event.loss_nats
        stated, loss, limits = event.previous_loss_nats, event.loss_nats, self.limits
        first = stated is None
        ratio = loss / (event.random_loss_nats if first else stated)
        allowed = limits.over_random_max if first else limits.over_previous_max
        known = not first or not event.pretrained or loss <= limits.pretrained_nats_max
        return decide_all(
            [
                before not in (None, stated)
                and f"the run's state has {stated} nats as the loss of the evaluation before, "
                f"which was {before}",
                not ratio <= allowed
                and f"held-out loss {loss:.4g} nats is {ratio:.3g} × "
                f"{'ln V' if first else 'the evaluation before'}",
                not known
                and f"held-out loss {loss:.4g} nats, and weights trained before begin at "
                f"{limits.pretrained_nats_max:g} at most",
            ],
            f"step {event.step}: ",
            ratio=ratio,
            loss_nats=loss,
        )


@decides("evaluation.held-out")
class HeldOut(RuntimeCheck):
    """What is scored is as many different rows as declared, of all the split and not trained on;
    the best evaluation is the lowest.
    """

    events = (Started, Evaluated)
    kept = ("best",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.n_batches, self.best, self.rows, self.begun_at = None, None, None, 0

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.n_batches, self.rows, self.begun_at = (
                event.plan.get("n_eval_batches"),
                None,
                event.step,
            )
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
            reach_frac=1.0 if self.rows is None else self.rows.reach_frac,
            n_batches=len(event.batch_nats),
        )

    def _problem(self, event: Evaluated) -> str:
        """What is wrong; empty if nothing is."""
        if self.rows is None:
            return "the evaluation does not name the rows that were scored"
        if (
            self.rows.n_rows - self.rows.n_distinct
            > self.limits.repeated_rows_max * self.rows.n_rows
        ):
            return (
                f"only {self.rows.n_distinct} of {self.rows.n_rows} held-out rows are different "
                "ones"
            )
        if self.rows.found_in_training_frac > self.limits.found_in_training_frac_max:
            return (
                f"{self.rows.found_in_training_frac:.0%} of what is scored is in the training split"
            )
        if self.rows.reach_frac < self.limits.reach_frac_min:
            return (
                f"the rows that are scored reach over {self.rows.reach_frac:.0%} of the held-out "
                "split"
            )
        if self.rows.n_wrong > self.limits.wrong_rows_max:
            return f"{self.rows.n_wrong} held-out rows are not those of the held-out split"
        if self.n_batches is not None and len(event.batch_nats) != self.n_batches:
            return f"{len(event.batch_nats)} batches were scored, {self.n_batches} were declared"
        step, loss = self.best or (None, math.inf)
        expected = (
            [event.step, event.loss_nats]
            if loss is None or event.loss_nats < loss
            else [step, loss]
        )
        if (
            self.best is None
            and self.begun_at
            and event.best_loss_nats is not None
            and event.best_loss_nats < event.loss_nats
        ):
            return ""  # the best evaluation may be one before a resume
        if [event.best_step, event.best_loss_nats] != expected:
            return (
                f"the best evaluation is reported as {event.best_loss_nats} at step "
                f"{event.best_step}, it is {expected[1]} at {expected[0]}"
            )
        return ""


@decides("evaluation.plausible")
class Plausible(RuntimeCheck):
    """The held-out loss is not far below what the scored text permits: a declared bound, else a
    share of the bits that a compressor needs for the part of it that is not in the training split.

    The compressor runs once, at the first evaluation below `compared_below`.
    """

    events = (Started, Evaluated)
    kept = ("floor", "text")

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.declared: float | None = None
        self.floor: float | None = None
        self.text: dict[str, float] = {}

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.declared = event.plan.get("bits_per_byte_min")
            return None
        if self.declared is not None:
            return self._judged(event, self.declared)
        if event.bits_per_byte >= self.limits.compared_below:
            return passed("", bits_per_byte=event.bits_per_byte, least_bits_per_byte=0.0)
        if self.floor is None:
            if event.compressed is None or event.rows is None:
                return not_run("the scored text is not known")
            found, bits = event.rows().found_in_training_frac, event.compressed()
            self.text = {"found_in_training_frac": found, "compressed_bits_per_byte": bits}
            self.floor = self.limits.over_compressed_min * (1 - found) * bits
        return self._judged(event, self.floor)

    def _judged(self, event: Evaluated, floor: float) -> Verdict:
        return decide(
            event.bits_per_byte >= floor,
            f"step {event.step}: a held-out loss of {event.bits_per_byte:.3g} bits per byte is far "
            f"below what this text permits, {floor:.3g}",
            bits_per_byte=event.bits_per_byte,
            least_bits_per_byte=floor,
            **self.text,
        )


@decides("evaluation.same-batches")
class SameBatches(RuntimeCheck):
    """Every evaluation of a run scores the same batches; otherwise differences between evaluations
    are not differences of the model.
    """

    events = (Evaluated,)
    kept = ("batch_hash", "n_batches", "changes")

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.batch_hash, self.n_batches, self.changes = None, 0, 0

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


@decides("evaluation.overfit-onset")
class OverfitOnset(RuntimeCheck):
    """Training loss falls while held-out loss rises out of its noise.

    Both slopes are those of the last `rounds` evaluations. The rise from the first to the last of
    them must exceed `rise_z_min` standard errors of the paired difference over the held-out
    batches. The gap is held-out minus training loss.
    """

    events = (Evaluated,)
    kept = ("rounds",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.rounds: list[list] = []

    def observe(self, event: Event) -> Verdict | None:
        if event.train_loss_nats is None:
            return None
        self.rounds = [
            *self.rounds,
            [event.train_loss_nats, event.loss_nats, list(event.batch_nats)],
        ][-int(self.limits.rounds) :]
        gap = event.loss_nats - event.train_loss_nats
        if len(self.rounds) < self.limits.rounds:
            return passed("", train_slope=0.0, held_out_slope=0.0, gap_nats=gap, rise_z=0.0)
        train, held_out = _slope([r[0] for r in self.rounds]), _slope([r[1] for r in self.rounds])
        z = _rise_z(self.rounds[0][2], self.rounds[-1][2])
        onset = train < 0 < held_out and gap > 0 and z > self.limits.rise_z_min
        return decide(
            not onset,
            f"step {event.step}: training loss falls by {-train:.3g} nats a round and held-out "
            f"loss rises by {held_out:.3g}",
            train_slope=train,
            held_out_slope=held_out,
            gap_nats=gap,
            rise_z=min(z, 1e9),
        )


def _slope(values: list[float]) -> float:
    """Least-squares slope over equally spaced points."""
    middle, mean = (len(values) - 1) / 2, math.fsum(values) / len(values)
    return sum((i - middle) * (v - mean) for i, v in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )


def _rise_z(first: list[float], last: list[float]) -> float:
    """Mean rise over batches in standard errors of the paired difference;
    infinite for a rise without spread.
    """
    rises = np.asarray(last) - np.asarray(first)
    error = float(rises.std(ddof=1)) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
    rise = float(rises.mean())
    return rise / error if error else math.copysign(math.inf, rise) if rise else 0.0


# the section of a StateCompared that is due with an event
SECTIONS = {Evaluated: "evaluation", Sampled: "sample", Saved: "save"}


@decides("evaluation.leaves-no-trace")
class LeavesNoTrace(RuntimeCheck):
    """An evaluation, a sample and a save leave weights, moments, random state, rows to come and
    modes as they found them. Those of the last step were compared.
    """

    events = (StateCompared, Evaluated, Sampled, Saved, Finished)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.seen: dict[str, int] = {}
        self.compared: dict[str, int] = {}

    def observe(self, event: Event) -> Verdict | None:
        match event:
            case StateCompared(section=section) if section != SINCE_UPDATE:
                self.compared[section] = event.step
                return self._judge(event)
            case Evaluated() | Sampled() | Saved():
                self.seen[SECTIONS[type(event)]] = event.step
            case Finished(step=step):
                last = {section for section, at in self.seen.items() if at == step}
                unlooked = sorted(s for s in last if self.compared.get(s) != step)
                text = f"step {step}: what the {first_of(unlooked)} leaves was not compared"
                return decide(not unlooked, text, uncompared=len(unlooked))
        return None

    def _judge(self, event: StateCompared) -> Verdict:
        return decide(
            event.n_compared > 0 and len(event.differing) <= self.limits.differing_max,
            f"step {event.step}: the {event.section} changed {len(event.differing)} of "
            f"{event.n_compared} parts of the training state ({first_of(event.differing)})",
            differing=len(event.differing),
        )
