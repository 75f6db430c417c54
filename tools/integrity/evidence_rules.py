"""Rules about the ledger and the records in it."""

import datetime as dt
import json
import math
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise

from stackproof.spec import formulas, mutants, pins
from stackproof.spec.archive import METADATA
from stackproof.spec.errors import NoHistory, StackproofError
from stackproof.spec.records import GateResult, Record, Series, left_out
from tools.integrity.core import (
    LEDGER,
    LOG,
    At,
    Messages,
    Repo,
    at,
    each_record,
    number,
    rule,
    stated_count,
)

EXIT_OF_STATUS = {
    "completed": {0},
    "early_stopped": {0},
    "halted": {4},
    "preempted": {75},
    "interrupted": {130},
}
# Floating-point operations per second that no present device exceeds: a dense bfloat16 product on
# an accelerator, and on a core of a CPU with matrix units in half precision, or vector units.
ACCELERATOR_FLOPS, HALF_CORE_FLOPS, CORE_FLOPS = 2.5e15, 6.5e12, 3e11
MAX_WAIVER_DAYS = 366
MAX_STEPS = 10**8  # of a run whose steps are listed
EVIDENCE_FILES = ("ledger.jsonl", "archive.jsonl", "registry.toml", "findings.toml", ".lock")
EVIDENCE_FILES += (pins.FILE, pins.SIGNERS)
NUMBERS = (int, float)
OF_RUNS = ("train", "evaluate", "resume", "falsification")  # kinds with a whole configuration


@rule(
    "CHAIN",
    title="The ledger's chain is unbroken",
    why="A line that was edited, removed or reordered breaks the hash of the next.",
    hint="git checkout evidence/ledger.jsonl",
    over=at(LEDGER),
)
def chain(repo: Repo) -> Messages:
    return (At(message, line) for line, message in repo.ledger.problems())


@rule(
    "LEDGER-APPEND-ONLY",
    title="The ledger only ever grew",
    why="A shortened ledger can hide a failure.",
    hint="restore the committed lines; a wrong record is superseded by a later one",
    over=at(LEDGER),
)
def append_only(repo: Repo) -> Messages:
    return repo.rewritten(LEDGER)


@rule(
    "RECORD-HASH",
    title="Every record is byte for byte the accepted one",
    why="A figure edited after acceptance is a false claim.",
    hint="git checkout the record; a wrong one is superseded, never edited",
)
def record_hash(repo: Repo) -> Messages:
    for record_id, problem in repo.survey.unread.items():
        yield At(problem, path=repo.record_file(record_id))


@rule(
    "RECORD-CLOSED",
    title="A record's folder holds the record, its series, and nothing else",
    why="A file that no hash covers can be changed, and code or a pickle in it can be run.",
    hint="remove the file; an artefact stays outside, and its record names it by hash",
    over=at("evidence"),
)
def record_closed(repo: Repo) -> Messages:
    allowed = set(EVIDENCE_FILES)
    for name, glance in repo.survey.glances.items():
        allowed.update(f"{name}/{file}" for file in (METADATA, *glance.series))
    here = repo.root / "evidence"
    for path in sorted(here.rglob("*")) if here.is_dir() else ():
        name = path.relative_to(here).as_posix()
        if path.is_symlink() or (not path.is_dir() and name not in allowed):
            known = name.partition("/")[0] in repo.survey.glances
            if known or "/" not in name:  # RECORD-ORPHAN names unknown folders
                yield At("is neither a record nor a series of one", path=f"evidence/{name}")


@rule(
    "RECORD-ORPHAN",
    title="Folders and ledger lines correspond",
    why="A record outside the ledger can be swapped without a trace.",
    hint="stack evidence add DIR, or remove the folder",
    over=at(LEDGER),
)
def record_orphan(repo: Repo) -> Messages:
    known = {e.record for e in repo.entries}
    here = repo.root / "evidence"
    beside = os.scandir(here) if here.is_dir() else ()
    folders = {x.name for x in beside if not x.name.startswith(".") and x.is_dir()}
    for name in sorted(folders - known):
        yield At("lies here without a ledger line", path=f"evidence/{name}")
    for name in sorted(known - folders - repo.ledger.archive.by_record.keys()):
        yield f"the folder of {name} is missing, and it is not archived"


@rule(
    "ARTEFACT-HASH",
    title="Series beside a record match their hashes",
    why="The summary is only as good as the log it was computed from.",
    hint="git checkout the file",
    over=each_record,
)
def artefact_hash(repo: Repo, record: Record) -> Messages:
    return _unreadable(repo, record, record.series, repo.series_bytes)


@rule(
    "SERIES-TYPED",
    title="Lines of a series have the types that readers rely on",
    why="A rule or a page that takes a text for a number gives no result, or fails.",
    hint="supersede the record",
    over=each_record,
)
def series_typed(repo: Repo, record: Record) -> Messages:
    of_lines = [series for series in record.series if series.path.endswith(".jsonl")]
    return _unreadable(repo, record, of_lines, repo.series_lines)


def _unreadable(
    repo: Repo, record: Record, of: Iterable[Series], read: Callable[[Record, Series], object]
) -> Messages:
    """The errors of reading files beside a record."""
    for series in of:
        try:
            read(record, series)
        except NoHistory:
            continue  # ARCHIVE reports it as not verified
        except StackproofError as e:
            yield At(e.what, path=repo.record_file(record.id, series.path))


@rule(
    "RECORD-CONFIG",
    title="The configuration of a run is one that this stack reads",
    why="A figure is derived from the configuration, so that has to be whole.",
    hint="supersede the record with a true one",
    over=each_record,
)
def record_config(repo: Repo, record: Record) -> Messages:
    if record.kind in OF_RUNS and repo.config_of(record) is None:
        yield "its configuration is not valid"


@rule(
    "WALL",
    title="Clocks are plausible",
    why="A run cannot end before it starts, or take thousands of steps in a second.",
    hint="supersede the record with a true one",
    over=each_record,
)
def wall(repo: Repo, record: Record) -> Messages:
    started, finished = map(dt.datetime.fromisoformat, (record.started_at, record.finished_at))
    elapsed = (finished - started).total_seconds()
    if elapsed < 0 or finished > dt.datetime.now(dt.UTC) + dt.timedelta(minutes=10):
        yield f"it ran from {record.started_at} to {record.finished_at}"
    if abs(elapsed - record.wall_s) > 5 + 0.05 * elapsed:
        yield f"wall_s = {record.wall_s}, the timestamps are {elapsed:.1f} s apart"
    if record.kind == "train" and record.succeeded:
        yield from _rate_problems(repo, record, record.wall_s + _wall_s(repo, record.parents))


def _wall_s(repo: Repo, parents: Iterable[str]) -> float:
    """Seconds of records and of all that they continue, each once."""
    waiting, seen, total_s = list(parents), set(), 0.0
    while waiting:
        name = waiting.pop()
        glance = None if name in seen else repo.glance(name)
        seen.add(name)
        if glance is not None:
            total_s += glance.wall_s
            waiting += glance.parents
    return total_s


def _rate_problems(repo: Repo, record: Record, wall_s: float) -> Messages:
    rate, seen, train_s = (number(record, n) for n in ("tokens_per_s", "tokens_seen", "train_s"))
    if not record.wall_s or rate is None or seen is None:
        yield "a finished training run states no time or no rate"
        return
    if train_s and not 0.2 <= (true := seen / train_s) / rate <= 5:
        yield f"tokens_per_s = {rate:.0f}, but {seen:.0f} tokens in {train_s} s are {true:.0f}"
    if train_s and train_s > wall_s * 1.05 + 5:
        yield f"train_s = {train_s} is longer than wall_s = {wall_s}, its parents' included"
    config, vocab_size = repo.config_of(record), number(record, "vocab_size")
    if config is None or vocab_size is None or not 1 <= vocab_size < math.inf:
        return
    flops = _flops_per_token(json.dumps(config["model"]), int(vocab_size))
    if not rate * flops <= (roof := _roof_flops(record, config["train"]["dtype"])):
        yield (
            f"{rate:.3g} tokens/s need {rate * flops:.2g} FLOP/s, more than the {roof:.2g} that "
            "its device can have"
        )


def _roof_flops(record: Record, dtype: str) -> float:
    """What all devices of a run can do in a second. A record without its number of cores is held
    to 256.
    """
    if record.environment.get("device", "cpu") != "cpu":
        return ACCELERATOR_FLOPS * stated_count(record, "world_size", 1)
    core = CORE_FLOPS if dtype == "float32" else HALF_CORE_FLOPS
    return core * stated_count(record, "cpu_count", 256)


@lru_cache(maxsize=256)
def _flops_per_token(model_json: str, vocab_size: int) -> int:
    """FLOPs per trained token of a model section, which many runs share."""
    model = json.loads(model_json)
    return formulas.flops_per_token(model, vocab_size, model["max_seq_len"])


@rule(
    "FINITE",
    title="A finished run has finite numbers",
    why="Every comparison with NaN is silently false.",
    hint="supersede the record",
    over=each_record,
)
def finite(repo: Repo, record: Record) -> Messages:
    if not record.succeeded:
        return
    for name, metric in record.metrics.items():
        if not isinstance(metric.value, NUMBERS) or not math.isfinite(metric.value):
            yield f"{name} = {metric.value}"
    for line in repo.series(record, LOG):
        if any(isinstance(line.get(k), str) for k in ("loss_nats", "grad_norm")):
            yield At(f"step {line.get('step')} is not finite", path=_log_file(repo, record))


def _log_file(repo: Repo, record: Record) -> str:
    return repo.record_file(record.id, LOG)


@rule(
    "STATUS",
    title="Status and exit code agree",
    why="A failure must not be recorded as a success.",
    hint="supersede the record",
    over=each_record,
)
def status(repo: Repo, record: Record) -> Messages:
    allowed = EXIT_OF_STATUS.get(record.status, {record.exit_code})
    failed_with_0 = record.status == "failed" and record.exit_code == 0
    if record.exit_code not in allowed or failed_with_0:
        yield f"status {record.status} with exit code {record.exit_code}"
    if not record.succeeded:
        return
    if red := [g.id for g in record.gates if g.verdict != "pass" and not _excused(record, g)]:
        yield f"a finished run whose gates did not all pass: {', '.join(red[:4])}"
    for kill in record.kills:
        if kill.outcome not in ("killed", "awaiting") or kill.control != "pass":
            yield f"a finished proof with {kill.plant} {kill.outcome}, control {kill.control}"


def _excused(record: Record, gate: GateResult) -> bool:
    """Whether a gate is waived, or did not run in another trainer and the record states why."""
    stated = f"{gate.id}: {gate.message}" in record.not_covered
    not_run = record.kind == "foreign" and gate.verdict == "not_run"
    return bool(gate.waiver) or (not_run and stated)


@rule(
    "PLACEHOLDER",
    title="No fingerprints of placeholders",
    why="A loss of exactly one, a perplexity of e or a repeated float was not measured.",
    hint="find the code that returns a constant; supersede the record",
    over=each_record,
)
def placeholder(repo: Repo, record: Record) -> Messages:
    for name in record.metrics:
        if name.endswith("_ppl") and abs(number(record, name) - math.e) < 1e-6:
            yield f"{name} is e, so the loss was exactly one"
    lines, path = repo.series(record, LOG), _log_file(repo, record)
    for a, b, c in zip(lines, lines[1:], lines[2:]):
        if a.get("loss_nats") == b.get("loss_nats") == c.get("loss_nats"):
            text = f"steps {a['step']} to {c['step']} have the same loss {a['loss_nats']}"
            yield At(text, path=path)
            break
    if any(a.get("grad_norm") == b.get("grad_norm") == 1.0 for a, b in pairwise(lines)):
        yield At("the gradient norm is exactly one twice in a row", path=path)


@rule(
    "STEPS-CONTIGUOUS",
    title="The step log has no hole and reaches the end",
    why="Removed rows can hide a spike.",
    hint="git checkout the series",
    over=each_record,
)
def steps_contiguous(repo: Repo, record: Record) -> Messages:
    if record.succeeded and record.kind in ("train", "foreign"):
        steps = [line["step"] for line in repo.series(record, LOG)]
        last, config = number(record, "steps"), repo.config_of(record)
        if last is None or not last.is_integer():
            found: Iterable[str] = ("a finished run states no number of steps",)
        elif record.kind == "foreign":
            found = _foreign_holes(record, steps, int(last))
        else:
            found = _holes(record, steps, config["train"]["log_every"], int(last)) if config else ()
        yield from (At(text, path=_log_file(repo, record)) for text in found)


def _holes(record: Record, steps: list[int], every: int, last: int) -> Iterable[str]:
    expected = {*range(every, last + 1, every), last}
    if not steps or sorted(set(steps)) != steps:
        yield "steps do not rise strictly"
    elif missing := sorted(s for s in expected - set(steps) if s >= steps[0]):
        yield f"{len(missing)} step(s) are missing, the first is {missing[0]}"
    elif not record.parents and steps[0] > every:
        yield f"the log begins at step {steps[0]}"


def _foreign_holes(record: Record, steps: list[int], last: int) -> Iterable[str]:
    before = record.config.get("first_step")
    if not isinstance(before, int) or last - before > MAX_STEPS:
        yield f"the step that the run began after is {before!r}"
        return
    first = before + 1
    if not steps or steps != list(range(first, last + 1)):
        yield f"a line for each step from {first} to {last} is required; found {len(steps)}"


@rule(
    "METRIC-RECOMPUTE",
    title="Summaries follow from the log",
    why="A summary edited apart from its log is a claim without a source.",
    hint="supersede the record with a true one",
    over=each_record,
)
def metric_recompute(repo: Repo, record: Record) -> Messages:
    lines = repo.series(record, LOG)
    if not lines:
        return
    if record.kind == "foreign" and record.succeeded:
        loss = lines[-1]["loss_nats"]
        if number(record, "train_loss_nats") != loss:
            yield f"train_loss_nats is not the log's last loss, {loss}"
    if record.kind == "train":
        for name, value in _summary(record, lines).items():
            if number(record, name) not in (None, value):
                yield f"{name} = {number(record, name)}, its log gives {value}"


def _summary(record: Record, lines: list[dict]) -> dict[str, float]:
    """Metrics of a training run as its log gives them."""
    names = {"train_loss_nats": "loss_nats"} | {n: n for n in ("tokens_seen", "ema_loss_nats")}
    found = {metric: lines[-1].get(key) for metric, key in names.items()}
    scored = [line for line in lines if line.get("val_loss_nats") is not None]
    if scored:
        found["val_loss_nats"] = scored[-1]["val_loss_nats"]
        if "val_bits_per_byte" in scored[-1]:
            found["val_bits_per_byte"] = scored[-1]["val_bits_per_byte"]
        if not record.parents:
            best = min(scored, key=lambda line: float(line["val_loss_nats"]))
            found["best_val_loss_nats"], found["best_step"] = best["val_loss_nats"], best["step"]
    return found


@rule(
    "AUDIT-RECOMPUTE",
    title="The breadth of an audit is that of its answers",
    why="A breadth that does not follow from the answers was not measured.",
    hint="supersede the record with a true one",
    over=each_record,
)
def audit_recompute(repo: Repo, record: Record) -> Messages:
    lines = repo.series(record, "audits.jsonl")
    last = [line for line in lines if line["step"] == max(x["step"] for x in lines)]
    passed = [line for line in last if line["passed"]]
    truth = {"passes": len(passed), "breadth": len({line["domain"] for line in passed})}
    for name, value in truth.items() if lines else ():
        stated = record.metrics[name].value if name in record.metrics else None
        if stated != value:
            yield f"{name} = {stated}, its answers give {value}"


@rule(
    "MUTATION-RECOMPUTE",
    title="The rates of a draw of mutants follow from its mutants",
    why="A rate that does not follow from the mutants was not measured.",
    hint="supersede the record with a true one",
    over=each_record,
)
def mutation_recompute(repo: Repo, record: Record) -> Messages:
    if record.kind != "mutation":
        return
    truth = mutants.metrics(repo.series(record, mutants.SERIES))
    stated = {name: (m.value, m.unit, m.n) for name, m in record.metrics.items()}
    for name in sorted(truth.keys() | stated.keys()):
        if stated.get(name) != truth.get(name):
            yield f"{name} = {stated.get(name)}, its mutants give {truth.get(name)}"


@rule(
    "COMMIT",
    title="Every record names a commit of this history",
    why="A run can be repeated only at a commit that exists.",
    hint="push the commit, or run again at one that exists (clones need their full history: "
    "fetch-depth 0)",
    over=each_record,
)
def commit(repo: Repo, record: Record) -> Messages:
    if record.code.commit not in repo.ancestors:
        yield f"commit {record.code.commit[:12]} is not an ancestor of HEAD"


@rule(
    "TIME",
    title="No record is older than its commit",
    why="Code that was committed after the run is not the code that ran.",
    hint="run again at the commit",
    over=each_record,
)
def time(repo: Repo, record: Record) -> Messages:
    committed = repo.ancestors.get(record.code.commit)
    started = dt.datetime.fromisoformat(record.started_at).timestamp()
    if committed and started < committed - 300:
        yield f"started at {record.started_at}, before its commit"


@rule(
    "DIRTY",
    title="Nothing stands on uncommitted code",
    why="A diff that was never committed cannot be reviewed.",
    hint="commit, run again, add the new record",
)
def dirty(repo: Repo) -> Messages:
    standing = {r for s in repo.states.values() for r in (*s.kill_records, *s.run_records)}
    standing |= {r for m in repo.registry for r in m.records.values()}
    for name in sorted(standing & repo.glances.keys()):
        if repo.glances[name].dirty:
            text = "a gate or a release stands on it, and its code was not committed"
            yield At(text, path=repo.record_file(name))


@rule(
    "SPEC-AT-COMMIT",
    title="A record's spec version is that of its commit",
    why="Evidence for another version of the spec proves another promise.",
    hint="run again at the commit",
    over=each_record,
)
def spec_at_commit(repo: Repo, record: Record) -> Messages:
    text = repo.in_history("spec/spec.toml").get(record.code.commit)
    if text is not None and f'version = "{record.spec.version}"'.encode() not in text:
        yield f"states spec {record.spec.version}, its commit has another"


@rule(
    "WAIVER-EXPIRED",
    title="No waiver has expired",
    why="A waiver is a debt with a date.",
    hint="fix the cause and run again, or renew the waiver in a new run",
    over=each_record,
)
def waiver_expired(repo: Repo, record: Record) -> Messages:
    if any(record.id in model.records.values() for model in repo.registry):
        for gate in record.gates:
            if gate.waiver and dt.date.fromisoformat(gate.waiver.expires) < dt.date.today():
                yield f"the waiver of {gate.id} expired on {gate.waiver.expires}"


@rule(
    "WAIVER-LONG",
    title="A waiver lasts a year at most",
    why="A waiver that never ends removes its gate.",
    hint="waive the gate again, with a date within a year, in a new run",
    over=each_record,
)
def waiver_long(repo: Repo, record: Record) -> Messages:
    began = dt.datetime.fromisoformat(record.started_at).date()
    for gate in record.gates:
        if gate.waiver:
            lasts = dt.date.fromisoformat(gate.waiver.expires) - began
            if lasts.days > MAX_WAIVER_DAYS:
                yield f"the waiver of {gate.id} lasts until {gate.waiver.expires}"


@rule(
    "RECORD-GATES",
    title="A record holds every gate of its kind and configuration",
    why="A gate that is left out of a run cannot turn red.",
    hint="run it again by its verb and supersede the record",
    over=each_record,
)
def record_gates(repo: Repo, record: Record) -> Messages:
    if record.spec.sha256 != repo.spec_sha256:
        return
    if absent := left_out(repo.spec, record):
        yield f"made without {len(absent)} gate(s): {', '.join(absent[:4])}"
