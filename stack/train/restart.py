"""What a resume continues from: a verified checkpoint, the lines of the logs that belong to it, the
red verdicts of its gates, and the processes that computed the steps before.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from stackproof.config import RunConfig, recorded_config
from stackproof.contracts.gate import Verdict, failed
from stackproof.distributed.mesh import ONE_RANK
from stackproof.distributed.ranks import ONE_PROCESS, Ranks
from stackproof.evidence.file_lock import file_lock
from stackproof.spec.building import RecordBuilder
from stackproof.spec.canonical import leaves, sha256_bytes, sha256_file
from stackproof.spec.errors import CheckpointError, ConfigError, IntegrityError
from stackproof.spec.files import holds, write_atomically
from stackproof.spec.gates import load_spec
from stackproof.spec.records import BESIDE_TRAINING, Artefact, Override, Series
from stackproof.spec.renamed_keys import current_override, translated
from stackproof.train import checkpoint, checkpoint_folders
from stackproof.train.checkpoint_format import Process
from stackproof.train.run_dir import RunDir

ALLOCATED = ("allocator",)  # how memory was laid out; it decides no bit
UNKNOWN = Process(after=0, differs=None)


def latest_checkpoint(
    directory: RunDir, at: int | None, ranks: Ranks = ONE_PROCESS
) -> checkpoint.Loaded | None:
    """The checkpoint to continue from, verified; None for the seed. All ranks call this.
    Raises CheckpointError naming a step that is intact.
    """
    root = directory.checkpoints
    if at == 0:
        return None
    if at is None and not checkpoint_folders.has_any(root):
        _refuse_lost(directory)
        if not directory.sealed:
            raise CheckpointError(
                f"{directory.path / 'run.json'} lacks its hash, and no checkpoint vouches for it",
                next_step="begin the run again in another folder",
            )
        return None
    try:
        folder = checkpoint.at(root, at) if at else checkpoint.find(directory.path)
        return checkpoint.load(folder, ranks)
    except CheckpointError as e:
        # By rank 0 alone, which may read for longer than a collective operation may take.
        with ranks.main_first():
            intact = checkpoint.newest_intact(root) if ranks.is_main else None
        intact = ranks.from_main(intact)
        found = f"step {intact} is intact" if intact else "no checkpoint is intact"
        raise CheckpointError(
            e.what,
            value=e.value,
            allowed=e.allowed,
            next_step=(
                f"{found}: stack train --resume {directory.path} --at {intact or 0}"
                f"{'' if intact else ' begins at the seed'}"
            ),
        ) from e


def require_newest(directory: RunDir, loaded: checkpoint.Loaded) -> None:
    """Raise CheckpointError if a checkpoint is not the one that `latest` names, where its folder is
    there.
    """
    latest = checkpoint_folders.pointed(directory.checkpoints, "latest")
    if latest is not None and latest.is_dir() and latest != loaded.path:
        raise CheckpointError(
            f"{loaded.path} is not the newest checkpoint",
            value=f"step {loaded.state['step']}",
            allowed=f"{latest}, which `latest` names",
            next_step=f"stack train --resume {directory.path} --at STEP takes an older one",
        )


def _refuse_lost(directory: RunDir) -> None:
    """Raise CheckpointError if the run had checkpoints: something stands in their folder, such as
    `latest`, or gates have judged a save. Those of a child also judge the folder that it began at.
    """
    root = directory.checkpoints
    entries = root.iterdir() if root.exists() else ()
    left = sorted(p.name for p in entries if not p.name.startswith("."))
    on_saves = {g.id for g in load_spec().gates.values() if g.moment == "artifact"}
    lines = (x for x in directory.lines("gates.jsonl") if isinstance(x, dict))
    judged = any(x.get("gate") in on_saves for x in lines)
    if judged and not directory.read_run().get("parents"):
        left.append("a verdict on a save")
    if left:
        raise CheckpointError(
            f"the checkpoints of {directory.path} are gone",
            value=f"no step folder, but {left[0]}",
            allowed="the step folders that the run has written, not links to them",
            next_step=f"restore them; stack train --resume {directory.path} --at 0 begins again",
        )


def marks_of(
    directory: RunDir, document: dict, loaded: checkpoint.Loaded | None
) -> dict[str, dict] | None:
    """The lines of the logs that belong to a checkpoint; None if it does not state them.
    Raises CheckpointError unless run.json, checkpoint and logs are of one run.
    """
    if loaded is None:
        return None
    config, ours = loaded.state["config"], document["config"]
    apart = sorted(_differing_keys(translated(config), translated(ours)))
    run, record = loaded.state["run"], loaded.state["record"]
    if apart or record != document["record"] or (run and run["sha256"] != directory.sha256):
        what = f"{', '.join(apart[:4])} differ" if apart else "not the file that the run began with"
        raise CheckpointError(
            f"{directory.path / 'run.json'} and {loaded.path} are not of one run: {what}",
            value=f"record {document['record']}",
            allowed=f"record {record}, with the configuration in its checkpoint",
            next_step=f"restore run.json; stack train --fork {loaded.path} does not read it",
        )
    if run is None:
        return None
    directory.require_logs(run["logs"])
    return run["logs"]


def _differing_keys(a: dict, b: dict) -> set[str]:
    """Dotted keys in which two configurations differ, without those that a resume may change."""
    left, right = (dict(leaves(tree)) for tree in (a, b))
    keys = {k for k in left.keys() | right.keys() if left.get(k) != right.get(k)}
    return {k for k in keys if not any(k == b or k.startswith(f"{b}.") for b in BESIDE_TRAINING)}


def red_verdicts(directory: RunDir, cfg: RunConfig) -> dict[str, tuple[int, Verdict]]:
    """The first red verdicts inside the run of gates that halt, as (step, verdict) by gate.
    Raises ConfigError for one that is not waived.
    """
    gates, red = load_spec().gates, {}
    for number, line in enumerate(directory.lines("gates.jsonl"), start=1):
        match line:
            case {"gate": str(gate_id), "verdict": "fail", "step": int(step), "message": str(text)}:
                gate, measured = gates.get(gate_id), line.get("measured")
                if gate and gate.severity == "halt" and gate_id not in red:
                    measured = measured if isinstance(measured, dict) else {}
                    red[gate_id] = step, failed(text, **measured)
            case {"gate": str(), "verdict": str()}:
                pass
            case _:
                raise CheckpointError(
                    f"{directory.path / 'gates.jsonl'}:{number} is not a verdict",
                    value=repr(line)[:100],
                    next_step="restore the file, or begin the run again",
                )
    waived = {w.id for w in cfg.gates.waive}
    if stopped := [gate_id for gate_id in red if gate_id not in waived]:
        step, verdict = red[stopped[0]]
        raise ConfigError(
            f"gate {stopped[0]} halted this run at step {step}: {verdict.message}",
            allowed="a resume of a run that no gate has halted, or with the gate waived",
            next_step=(
                f"stack train --fork {directory.path} --set … starts a child run with a change; "
                f"--set gates.waive=… with a reason for {stopped[0]} continues this run and keeps "
                "the verdict in its record"
            ),
        )
    return red


def process_of(record: RecordBuilder, document: Mapping[str, Any], step: int) -> Process:
    """This process as a checkpoint states it: the step that it begins after, and where its code and
    environment differ from those in run.json.
    """
    then, now = _facts(document), _facts({"environment": record.environment, "code": record.code})
    apart = [k for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k)]
    return Process(after=step, differs={k: now.get(k) for k in apart if k not in ALLOCATED})


def former_processes(loaded: checkpoint.Loaded | None) -> list[Process]:
    """The processes that a checkpoint states; one that is unknown for a checkpoint of a former
    version, which states none.
    """
    if loaded is None:
        return []
    stated = (loaded.state["run"] or {}).get("processes")
    return [UNKNOWN] if stated is None else [Process.model_validate(p) for p in stated]


def state_processes(
    record: RecordBuilder, document: Mapping[str, Any], processes: list[Process]
) -> tuple[str, ...]:
    """State in a record the steps of processes with other code or another environment than the last
    one. Code that was changed without a commit at any step makes the record dirty. Returns the
    texts.
    """
    first = _facts(document)
    spans = list(_spans(processes))
    took_steps = [first | (differs or {}) for _, _, differs in spans]
    if dirty := next((facts for facts in took_steps if facts.get("code.dirty")), None):
        changed = {"dirty": True, "diff_sha256": dirty.get("code.diff_sha256")}
        record.code = record.code.model_copy(update=changed)
    last = processes[-1].differs
    found = (_other_process(*span, last, first) for span in spans)
    texts = tuple(text for text in found if text)
    record.not_covered = (*record.not_covered, *texts)
    return texts


def _spans(processes: list[Process]) -> Iterator[tuple[int, int, dict | None]]:
    """The first and the last step that each process before the last one took, and how it differs
    from run.json.
    """
    for process, following in pairwise([Process(after=0, differs={}), *processes]):
        if process.after < following.after:
            yield process.after + 1, following.after, process.differs


def _facts(of: Mapping[str, Any]) -> dict[str, Any]:
    """Environment and code of a process, as one table; one process states no mesh."""
    code = of["code"] if isinstance(of["code"], dict) else of["code"].model_dump()
    mesh = {f"mesh_{name}": size for name, size in ONE_RANK.as_dict().items()}
    return mesh | of["environment"] | {f"code.{name}": value for name, value in code.items()}


def _other_process(
    begin: int, end: int, then: dict | None, last: dict, first: Mapping[str, Any]
) -> str:
    """What a record states of a process that took steps; empty if it was like the last one."""
    if then is None:
        return f"which code and environment steps {begin} to {end} had: it is not known"
    pairs = {
        k: (then.get(k, first.get(k)), last.get(k, first.get(k)))
        for k in sorted(then.keys() | last.keys())
    }
    apart = {k: (was, now) for k, (was, now) in pairs.items() if was != now}
    changes = "; ".join(f"{k} {was}, now {now}" for k, (was, now) in apart.items())
    match apart.get("world_size"):
        case (was, now):
            return f"steps {begin} to {end} were taken by {was} ranks, now {now}: {changes}"
        case _:
            return f"steps {begin} to {end} had another process: {changes}" if changes else ""


def is_begun(run_dir: Path, cfg: RunConfig, parent: Path | None) -> bool:
    """Whether a command that is started again continues the run of its folder. False if the folder
    holds none. A child without a checkpoint begins again, since its seed is not where it began: its
    run.json is deleted.

    Raises ConfigError if the run has another configuration than `cfg`, that of the command, or
    another parent, or if a red gate halted a child that would begin again; UsageError if a process
    is writing to that.
    """
    directory = RunDir(run_dir)
    if not (directory.path / "run.json").is_file():
        return False
    document = directory.read_run()
    refuse_changes(directory, document, cfg, ())
    parents = [checkpoint.load_document(checkpoint.find(parent))["record"]] if parent else []
    if (theirs := document.get("parents", [])) != parents:
        raise ConfigError(
            f"{directory.path} holds a run with another parent",
            value=", ".join(theirs) or "none",
            allowed=", ".join(parents) or "a run without a parent, as the command names none",
            next_step=f"stack train --resume {directory.path}, or choose another --run-dir",
        )
    if not parent:
        return True
    with file_lock(directory.path, "run"):
        if checkpoint_folders.has_any(directory.checkpoints):
            return True
        red_verdicts(directory, cfg)
        (directory.path / "run.json").unlink()
    return False


def not_yet_stated(run_dir: Path, overrides: Iterable[Override]) -> list[Override]:
    """The changes of a command that run.json does not state, such as those of the command that
    began the run.
    """
    then = RunDir(run_dir).read_run()["overrides"]
    stated = [current_override(Override.model_validate(o)) for o in then]
    return [o for o in overrides if o not in stated]


def refuse_changes(
    directory: RunDir, document: Mapping[str, Any], changed: RunConfig, sets: Sequence[Override]
) -> None:
    """Raise ConfigError if a resumed run would compute something else."""
    ours, then = changed.to_dict(), recorded_config(document["config"]).to_dict()
    if not (apart := sorted(_differing_keys(ours, then))):
        return
    left, right = dict(leaves(ours)), dict(leaves(then))
    given = [o.source for o in sets if any(f"{k}.".startswith(f"{o.key}.") for k in apart)]
    raise ConfigError(
        f"a resumed run keeps its configuration, which differs in {', '.join(apart[:4])}",
        value="; ".join(
            f"{k} = {left.get(k)}, in {directory.path / 'run.json'} {right.get(k)}"
            for k in apart[:4]
        ),
        allowed=f"changes of {', '.join(BESIDE_TRAINING)}",
        next_step=(
            f"stack train --fork {directory.path} {' '.join(given)} starts a child run with the "
            "change recorded"
            if given
            else "choose another --run-dir"
        ),
    )


def refuse_child_at_seed(directory: RunDir, document: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a run without a checkpoint that did not begin at its seed."""
    if document.get("parents") or document["inherited_s"] > 0:
        raise CheckpointError(
            f"{directory.path} began at a checkpoint of another run and has none of its own",
            value=f"parent {', '.join(document.get('parents', ())) or 'not stated'}",
            allowed="a run that has saved a checkpoint, or one that began at its seed",
            next_step="give the command that began it again, with another --run-dir",
        )


def require_trained(directory: RunDir, document: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a run.json without training, such as that of an imported model."""
    if missing := sorted({"data", "n_eval_batches"} - document.keys()):
        raise CheckpointError(
            f"{directory.path / 'run.json'} states no {' and no '.join(missing)} to continue with",
            allowed="the folder of a run that stack train has begun",
            next_step=f"stack train --fork {directory.path} trains an imported model",
        )


def require_tokenizer(directory: RunDir, data: bytes) -> None:
    """Raises CheckpointError unless tokenizer.json is that of the data, and writes one that is
    missing.
    """
    path = directory.path / "tokenizer.json"
    if not os.path.lexists(path):
        write_atomically(path, data)
    if not path.is_file() or not holds(path, data):
        raise CheckpointError(
            f"{path} is not the tokenizer of this run",
            allowed=f"the file with sha256 {sha256_bytes(data)[:12]}…, as the data have it",
            next_step="delete it: the resume writes it again",
        )


def require_recorded(run_dir: Path, files: Iterable[Series | Artefact]) -> None:
    """Raises IntegrityError unless files that a run states are there, unchanged."""
    for stated in files:
        path = run_dir / stated.path
        try:
            leaves = PurePath(stated.path).is_absolute() or ".." in PurePath(stated.path).parts
            found = "a path that leaves the run" if leaves else sha256_file(path)
        except (OSError, ValueError):  # a name that no file can have
            found = "no readable file"
        if found != stated.sha256:
            raise IntegrityError(
                f"{path} is not the file that the run states",
                value=found,
                allowed=f"sha256 {stated.sha256}",
                next_step=(
                    f"restore it; stack train --fork {run_dir}/checkpoints/STEP does not read it"
                ),
            )
