"""What a run has logged and is about to record, read back for its gates."""

from collections import Counter
from functools import partial

from stackproof.contracts.events import LogsRead, Recorded
from stackproof.spec.canonical import sha256_file
from stackproof.spec.provenance import environment
from stackproof.train import checkpoint_folders
from stackproof.train.run_dir import RunDir
from stackproof.train.trainer import Trainer


def logs_of(trainer: Trainer) -> LogsRead:
    """The logs of a run, read back line by line: that of a long run is large."""
    directory, step, every = trainer.output.dir, trainer.state.step, trainer.cfg.train.log_every
    steps, evaluations, line = [], {}, {}
    for line in directory.lines("metrics.jsonl"):
        steps.append(line["step"])
        if "val_loss_nats" in line:
            evaluations[line["step"]] = line
    samples = {line["step"]: line for line in directory.lines("samples.jsonl")}
    sources = tuple(source.name for source in trainer.state.data_loader.sampler.sources)
    lines = directory.lines("curriculum.jsonl")
    turns = tuple(line["step"] for line in lines if line["event"] == "turn")
    read = tuple(steps), line, evaluations, samples, sources, partial(_rows_after, directory)
    turn_every = getattr(trainer.cfg.curriculum, "probe_every", None)
    return LogsRead(
        step, every, directory.mismarked(), *read, turns, turn_every, _unlogged(trainer)
    )


def _rows_after(directory: RunDir, step: int) -> Counter[str]:
    """Logged rows of each source after a step."""
    rows: Counter[str] = Counter()
    for line in directory.lines("curriculum.jsonl"):
        if line["event"] == "rows" and line["step"] > step:
            rows.update(line["rows"])
    return rows


def record_of(trainer: Trainer, status: str) -> Recorded:
    """What the record of a run that has completed is about to state."""
    record, dataset, root = trainer.output.record, trainer.dataset, trainer.output.dir.path
    described = ("manifest.json", "tokenizer.json")
    latest = checkpoint_folders.pointed(trainer.output.dir.checkpoints, "latest")
    saved = sorted(latest.iterdir()) if latest and latest.is_dir() else ()
    return Recorded(
        trainer.state.step,
        status,
        trainer.cfg.train.max_steps,
        metrics={name: metric.value for name, metric in record.metrics.items()},
        counts={name: metric.n for name, metric in record.metrics.items()},
        inputs={file.path: file.sha256 for file in record.inputs},
        read={name: sha256_file(dataset.directory / name) for name in described},
        held_out_bytes=dataset.validation.n_bytes,
        environment=dict(record.environment),
        machine=environment(
            str(trainer.state.device), world_size=trainer.state.ranks.sizes.world_size
        ),
        outputs={file.path: file.bytes for file in record.outputs},
        saved={p.relative_to(root).as_posix(): p.stat().st_size for p in saved},
        facts=_facts(trainer),
    )


def _facts(trainer: Trainer) -> dict[str, int]:
    """Metrics of the data set, and of the model where one process holds all of it."""
    dataset, model = trainer.dataset, trainer.state.model
    whole = trainer.state.ranks.sizes.world_size == 1
    return {
        "vocab_size": len(dataset.tokenizer.token_bytes),
        "unique_tokens": dataset.train.n_tokens,
        "val_batches": len(trainer.held_out),
        **({"n_params": sum(p.numel() for p in model.parameters())} if whole else {}),
    }


def _unlogged(trainer: Trainer) -> tuple[str, ...]:
    """Gates with a verdict before step 1 or on a checkpoint that have no line in gates.jsonl. A
    resumed process cuts the log back to its checkpoint, so that only a whole run is judged.
    """
    if trainer.resumed:
        return ()
    lines = {line["gate"] for line in trainer.output.dir.lines("gates.jsonl")}
    judged = (s for s in trainer.keeper.states.values() if s.gate.moment != "runtime")
    return tuple(
        s.gate.id for s in judged if s.verdict.outcome != "not_run" and s.gate.id not in lines
    )
