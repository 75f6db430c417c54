"""Rules about the ledger and the records in it."""

import datetime as dt
import math
from collections.abc import Iterator

from stackproof.spec import formulas
from stackproof.spec.errors import NoHistory, StackproofError
from stackproof.spec.records import Record, left_out
from tools.integrity.core import Repo, rule
from tools.integrity.foreign import Found, admitted, flattery, gaps

EXIT_OF_STATUS = {
    "completed": {0},
    "early_stopped": {0},
    "halted": {4},
    "preempted": {75},
    "interrupted": {130},
}
ROOFLINE_FLOPS = 2e15  # dense bf16 rate of one current accelerator, rounded up


def number(record: Record, name: str) -> float | None:
    """A metric as a number, or None if the record does not state it."""
    metric = record.metrics.get(name)
    return float(metric.value) if metric is not None else None


@rule(
    "CHAIN",
    title="The ledger's chain is unbroken",
    why="A line that was edited, removed or reordered breaks the hash of the next.",
    hint="git checkout evidence/ledger.jsonl",
)
def chain(repo: Repo) -> Found:
    for line, message in repo.ledger.problems():
        yield "evidence/ledger.jsonl", line, message


@rule(
    "LEDGER-APPEND-ONLY",
    title="The ledger only ever grew",
    why="Whoever can shorten the ledger can forget a failure.",
    hint="restore the committed lines; a wrong record is superseded by a later one",
)
def append_only(repo: Repo) -> Found:
    if commit := repo.rewritten("evidence/ledger.jsonl"):
        yield (
            "evidence/ledger.jsonl",
            0,
            f"lines committed in {commit[:10]} were changed or removed",
        )


@rule(
    "RECORD-HASH",
    title="Every record is byte for byte the accepted one",
    why="A figure edited after acceptance is a false claim.",
    hint="git checkout the record; a wrong one is superseded, never edited",
)
def record_hash(repo: Repo) -> Found:
    for entry in repo.entries:
        try:
            repo.ledger.read(entry)
        except NoHistory:
            continue
        except StackproofError as e:
            yield repo.record_file(entry.record), 0, e.what


@rule(
    "RECORD-ORPHAN",
    title="Folders and ledger lines correspond",
    why="A record outside the ledger can be swapped without a trace.",
    hint="stack evidence add DIR, or remove the folder",
)
def record_orphan(repo: Repo) -> Found:
    known = {e.record for e in repo.entries}
    folders = (
        {p.name for p in (repo.root / "evidence").iterdir() if p.is_dir()}
        if (repo.root / "evidence").is_dir()
        else set()
    )
    for name in sorted(folders - known):
        yield f"evidence/{name}", 0, "lies here without a ledger line"
    for name in sorted(known - folders - repo.ledger.archive.by_record.keys()):
        yield "evidence/ledger.jsonl", 0, f"the folder of {name} is missing, and it is not archived"


@rule(
    "ARTEFACT-HASH",
    title="Series beside a record match their hashes",
    why="The summary is only as good as the log it was computed from.",
    hint="git checkout the file",
)
def artefact_hash(repo: Repo) -> Found:
    for record in repo.records.values():
        for series in record.series:
            try:
                repo.ledger.series(record, series)
            except StackproofError as e:
                yield repo.record_file(record.id, series.path), 0, e.what


@rule(
    "PPL",
    title="Perplexity is exp of the loss",
    why="Two figures of one quantity must agree.",
    hint="supersede the record with a true one",
)
def ppl(repo: Repo) -> Found:
    for record in repo.records.values():
        for name in record.metrics:
            loss = (
                number(record, name.removesuffix("_ppl") + "_loss_nats")
                if name.endswith("_ppl")
                else None
            )
            if loss is not None and not math.isclose(
                number(record, name), math.exp(loss), rel_tol=1e-4
            ):
                yield (
                    repo.record_file(record.id),
                    0,
                    f"{name} = {number(record, name):.6g}, exp of the loss is {math.exp(loss):.6g}",
                )


@rule(
    "TOKENS",
    title="Tokens are steps × batch × length × accumulation × world",
    why="A token count that does not close hides what was trained.",
    hint="supersede the record with a true one",
)
def tokens(repo: Repo) -> Found:
    for record in repo.records.values():
        if record.kind != "train" or "tokens_seen" not in record.metrics:
            continue
        model, train = record.config["model"], record.config["train"]
        world = int(record.environment.get("world_size") or 1)
        accumulation = train["tokens_per_step"] // (
            train["micro_batch_size"] * model["max_seq_len"] * world
        )
        expected = formulas.tokens_seen(
            int(number(record, "steps")),
            train["micro_batch_size"],
            model["max_seq_len"],
            accumulation,
            world,
        )
        if number(record, "tokens_seen") != expected:
            yield (
                repo.record_file(record.id),
                0,
                (
                    f"tokens_seen = {number(record, 'tokens_seen'):.0f}, the arithmetic gives "
                    f"{expected}"
                ),
            )


@rule(
    "WALL",
    title="Clocks are plausible",
    why="Thousands of steps in a second, or an end before the start, did not happen.",
    hint="supersede the record with a true one",
)
def wall(repo: Repo) -> Found:
    now = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=10)
    for record in repo.records.values():
        started, finished = (
            dt.datetime.fromisoformat(record.started_at),
            dt.datetime.fromisoformat(record.finished_at),
        )
        elapsed = (finished - started).total_seconds()
        where = repo.record_file(record.id)
        if elapsed < 0 or finished > now:
            yield where, 0, f"it ran from {record.started_at} to {record.finished_at}"
        if abs(elapsed - record.wall_s) > 5 + 0.05 * elapsed:
            yield where, 0, f"wall_s = {record.wall_s}, the timestamps are {elapsed:.1f} s apart"
        if record.kind == "train" and record.succeeded:
            yield from (
                (where, 0, message)
                for message in _rate_problems(record, _wall_s_with_parents(repo, record))
            )


def _wall_s_with_parents(repo: Repo, record: Record) -> float:
    """Seconds of a record and of all it continues."""
    return record.wall_s + sum(
        _wall_s_with_parents(repo, repo.records[p]) for p in record.parents if p in repo.records
    )


def _rate_problems(record: Record, wall_s: float) -> Iterator[str]:
    rate, seen, train_s = (number(record, n) for n in ("tokens_per_s", "tokens_seen", "train_s"))
    if not record.wall_s or rate is None or seen is None:
        yield "a finished training run states no time or no rate"
        return
    if train_s and not 0.2 <= seen / train_s / rate <= 5:
        yield (
            f"tokens_per_s = {rate:.0f}, but {seen:.0f} tokens in {train_s} s are "
            f"{seen / train_s:.0f}"
        )
    if train_s and train_s > wall_s * 1.05 + 5:
        yield f"train_s = {train_s} is longer than wall_s = {wall_s}, that of its parents among it"
    model = record.config["model"]
    flops = formulas.flops_per_token(model, int(number(record, "vocab_size")), model["max_seq_len"])
    if rate * flops > ROOFLINE_FLOPS:
        yield f"{rate:.3g} tokens/s need {rate * flops:.2g} FLOP/s, more than one device has"


@rule(
    "FINITE",
    title="A finished run has finite numbers",
    why="Every comparison with NaN is silently false.",
    hint="supersede the record",
)
def finite(repo: Repo) -> Found:
    for record in repo.records.values():
        bad = [
            n
            for n, m in record.metrics.items()
            if not isinstance(m.value, int | float) or not math.isfinite(m.value)
        ]
        for name in bad if record.succeeded else ():
            yield repo.record_file(record.id), 0, f"{name} = {record.metrics[name].value}"
        for line in repo.series(record.id, "metrics.jsonl") if record.succeeded else ():
            if any(isinstance(line.get(k), str) for k in ("loss_nats", "grad_norm")):
                yield (
                    repo.record_file(record.id, "metrics.jsonl"),
                    0,
                    f"step {line.get('step')} is not finite",
                )


@rule(
    "STATUS",
    title="Status and exit code agree",
    why="A failure recorded as success is the oldest trick.",
    hint="supersede the record",
)
def status(repo: Repo) -> Found:
    for record in repo.records.values():
        allowed = EXIT_OF_STATUS.get(record.status)
        if (allowed is not None and record.exit_code not in allowed) or (
            record.status == "failed" and record.exit_code == 0
        ):
            yield (
                repo.record_file(record.id),
                0,
                f"status {record.status} with exit code {record.exit_code}",
            )
        red = [
            g.id
            for g in record.gates
            if g.verdict != "pass" and not g.waiver and not admitted(record, g)
        ]
        if record.succeeded and red:
            yield (
                repo.record_file(record.id),
                0,
                f"a finished run whose gates did not all pass: {', '.join(red[:4])}",
            )
        for kill in record.kills:
            if record.succeeded and (
                kill.outcome not in ("killed", "awaiting") or kill.control != "pass"
            ):
                yield (
                    repo.record_file(record.id),
                    0,
                    f"a finished proof with {kill.plant} {kill.outcome}, control {kill.control}",
                )


@rule(
    "PLACEHOLDER",
    title="No fingerprints of placeholders",
    why=(
        "A loss of exactly one, a perplexity of e, the same float three times: numbers nobody "
        "measured."
    ),
    hint="find the code that returns a constant; supersede the record",
)
def placeholder(repo: Repo) -> Found:
    for record in repo.records.values():
        for name in record.metrics:
            if name.endswith("_ppl") and abs(number(record, name) - math.e) < 1e-6:
                yield repo.record_file(record.id), 0, f"{name} is e, so the loss was exactly one"
        lines = repo.series(record.id, "metrics.jsonl")
        for a, b, c in zip(lines, lines[1:], lines[2:]):
            if a.get("loss_nats") == b.get("loss_nats") == c.get("loss_nats"):
                yield (
                    repo.record_file(record.id, "metrics.jsonl"),
                    0,
                    f"steps {a['step']} to {c['step']} have the same loss {a['loss_nats']}",
                )
                break
        if any(a.get("grad_norm") == b.get("grad_norm") == 1.0 for a, b in zip(lines, lines[1:])):
            yield (
                repo.record_file(record.id, "metrics.jsonl"),
                0,
                "the gradient norm is exactly one twice in a row",
            )


@rule(
    "STEPS-CONTIGUOUS",
    title="The step log has no hole and reaches the end",
    why="Whoever removes the rows of a spike removes the spike.",
    hint="git checkout the series",
)
def steps_contiguous(repo: Repo) -> Found:
    yield from gaps(repo)
    for record in repo.records.values():
        lines = repo.series(record.id, "metrics.jsonl")
        if record.kind != "train" or not record.succeeded:
            continue
        where = repo.record_file(record.id, "metrics.jsonl")
        steps = [line["step"] for line in lines]
        every = record.config["train"]["log_every"]
        expected = set(range(every, int(number(record, "steps")) + 1, every)) | {
            int(number(record, "steps"))
        }
        if not steps or sorted(set(steps)) != steps:
            yield where, 0, "steps do not rise strictly"
        elif missing := sorted(s for s in expected - set(steps) if s >= steps[0]):
            yield where, 0, f"{len(missing)} step(s) are missing, the first is {missing[0]}"
        elif not record.parents and steps[0] > every:
            yield where, 0, f"the log begins at step {steps[0]}"


@rule(
    "METRIC-RECOMPUTE",
    title="Summaries are what the log says",
    why="A summary edited apart from its log is a claim without a source.",
    hint="supersede the record with a true one",
)
def metric_recompute(repo: Repo) -> Found:
    yield from flattery(repo)
    for record in repo.records.values():
        lines = repo.series(record.id, "metrics.jsonl")
        if record.kind != "train" or not lines:
            continue
        values = [line["val_loss_nats"] for line in lines if "val_loss_nats" in line]
        truth = {
            "train_loss_nats": lines[-1]["loss_nats"],
            "tokens_seen": lines[-1]["tokens_seen"],
            "ema_loss_nats": lines[-1]["ema_loss_nats"],
        }
        if values:
            truth["val_loss_nats"] = values[-1]
        if values and not record.parents:
            truth["best_val_loss_nats"] = min(values)
        for name, value in truth.items():
            if number(record, name) is not None and number(record, name) != value:
                yield (
                    repo.record_file(record.id),
                    0,
                    f"{name} = {number(record, name)}, its log says {value}",
                )


@rule(
    "COMMIT",
    title="Every record names a commit of this history",
    why="A commit nobody has cannot be re-run.",
    hint=(
        "push the commit, or run again at one that exists (clones need their full history: "
        "fetch-depth 0)"
    ),
)
def commit(repo: Repo) -> Found:
    for record in repo.records.values():
        if record.code.commit not in repo.ancestors:
            yield (
                repo.record_file(record.id),
                0,
                f"commit {record.code.commit[:12]} is not an ancestor of HEAD",
            )


@rule(
    "TIME",
    title="No record is older than its commit",
    why="Code that was committed after the run is not the code that ran.",
    hint="run again at the commit",
)
def time(repo: Repo) -> Found:
    for record in repo.records.values():
        committed = repo.ancestors.get(record.code.commit)
        if committed and dt.datetime.fromisoformat(record.started_at).timestamp() < committed - 300:
            yield (
                repo.record_file(record.id),
                0,
                f"started at {record.started_at}, before its commit",
            )


@rule(
    "DIRTY",
    title="Nothing stands on uncommitted code",
    why="A diff that was never committed cannot be reviewed.",
    hint="commit, run again, add the new record",
)
def dirty(repo: Repo) -> Found:
    standing = {r for s in repo.states.values() for r in (*s.kill_records, *s.run_records)}
    standing |= {r for m in repo.registry for r in m.records.values()}
    for record_id in sorted(standing & repo.records.keys()):
        if repo.records[record_id].code.dirty:
            yield (
                repo.record_file(record_id),
                0,
                "a gate or a release stands on it, and its code was not committed",
            )


@rule(
    "SPEC-AT-COMMIT",
    title="A record's spec version is that of its commit",
    why="Evidence for another version of the spec proves another promise.",
    hint="run again at the commit",
)
def spec_at_commit(repo: Repo) -> Found:
    texts: dict[str, str | None] = {}
    for record in repo.records.values():
        sha = record.code.commit
        if sha in repo.ancestors and sha not in texts:
            texts[sha] = repo.git("show", f"{sha}:spec/spec.toml")
        text = texts.get(sha)
        if text is not None and f'version = "{record.spec.version}"' not in text:
            yield (
                repo.record_file(record.id),
                0,
                f"says spec {record.spec.version}, its commit has another",
            )


@rule(
    "WAIVER-EXPIRED",
    title="No waiver has expired",
    why="A waiver is a debt with a date.",
    hint="mend the cause and run again, or renew the waiver in a new run",
)
def waiver_expired(repo: Repo) -> Found:
    today = dt.date.today()
    for model in repo.registry:
        for record_id in model.records.values():
            record = repo.records.get(record_id)
            for gate in record.gates if record else ():
                if gate.waiver and dt.date.fromisoformat(gate.waiver.expires) < today:
                    yield (
                        repo.record_file(record_id),
                        0,
                        f"the waiver of {gate.id} expired on {gate.waiver.expires}",
                    )


@rule(
    "RECORD-GATES",
    title="A record holds every gate of its kind and configuration",
    why="A run with a gate left out is green where nobody looked.",
    hint="run it again by its verb and supersede the record",
)
def record_gates(repo: Repo) -> Found:
    now = repo.spec.sha256
    for record in (r for r in repo.records.values() if r.spec.sha256 == now):
        if absent := left_out(repo.spec, record):
            yield (
                repo.record_file(record.id),
                0,
                f"made without {len(absent)} gate(s): {', '.join(absent[:4])}",
            )
