"""Opens a run (fresh, resumed or forked), trains it and closes it with a record,
however it ends.
"""

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from stackproof.config import BanditCurriculum, RunConfig, validate
from stackproof.contracts.events import Finished, Resumed, Started
from stackproof.contracts.keeper import Gatekeeper
from stackproof.data.prepare import prepare
from stackproof.data.reader import eval_batches, probe_batches
from stackproof.evidence.exclusive import alone
from stackproof.kernels import dispatch
from stackproof.spec.building import RecordBuilder, artefact, iso, utc_now
from stackproof.spec.errors import (
    ConfigError,
    DataError,
    EnvironmentUnfit,
    GateFailed,
    StackproofError,
    Stopped,
    StreamExhausted,
)
from stackproof.spec.formulas import parameter_count
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment
from stackproof.spec.records import BESIDE_TRAINING, Artefact, Override, Record, read_record
from stackproof.train import checkpoint, operations, polish
from stackproof.train.allocator import keep_heap, lay_in_huge_pages
from stackproof.train.kernels import kernels_of
from stackproof.train.listener import Listener
from stackproof.train.loop import train_loop
from stackproof.train.measures import state_metrics
from stackproof.train.memory import require_room
from stackproof.train.precision import refuse_emulated
from stackproof.train.preflight import preflight, probe_peak_flops
from stackproof.train.run import Run
from stackproof.train.rundir import SERIES, RunDir
from stackproof.train.state import AUTOCAST, build_state
from stackproof.train.step import nonfinite_parts
from stackproof.train.writing import make_writer

CLAIM = (
    "This configuration, on this data and code, gives these losses, weights and samples, with "
    "every gate below looked at."
)
NOT_COVERED = (
    "quality on any task or text other than the held-out split of this corpus",
    "behaviour beyond the trained context length",
    "bitwise equality on another processor, torch build or number of threads",
)


def resolve_device(name: str) -> torch.device:
    """`auto` takes the GPU if there is one; asking for an absent GPU is an error,
    never a fall-back.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentUnfit(
            "a CUDA device was asked for and there is none",
            value=f"torch {torch.__version__}",
            next_step="--device cpu, or see stack doctor",
        )
    # cuBLAS is deterministic only with a fixed workspace, and reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device(
        "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    )


def read_config(run_dir: Path) -> RunConfig:
    """The configuration a run directory was started with. Raises CheckpointError if it is none."""
    return validate(RunDir(run_dir).read_run()["config"])


def start(
    cfg: RunConfig,
    overrides: Sequence[Override],
    run_dir: Path,
    listener: Listener,
    *,
    parent: Path | None = None,
    polishing: bool = False,
    only: Sequence[str] | None = None,
    recorded: Mapping[str, object] | None = None,
) -> Record:
    """A fresh run, or with `parent` a child that continues the parent's latest checkpoint
    under a changed configuration.

    `polishing` changes the curriculum alone, takes over the parent's histories and archives its
    samples and curriculum state.

    `only` installs just these gates, for proving them one by one; no command offers it. `recorded`
    is the environment of a record whose kernels are used, to repeat it. The record of a run that a
    gate halted travels with the exception as `error.record`.
    """
    loaded = checkpoint.load(checkpoint.find(parent)) if parent else None
    if polishing:
        polish.refuse(cfg, overrides, loaded)
    directory = RunDir(run_dir)
    directory.create()
    with alone(run_dir, "run"), kernels_of(cfg, resolve_device(cfg.device), recorded):
        run = _open(
            cfg, overrides, directory, listener, runner="resume" if parent else "train", only=only
        )
        with _recording(run):
            if loaded is None:
                _refuse_certain_exhaustion(run)
            run.inherited_s = loaded.state["wall_s"] if loaded is not None else 0.0
            n_eval_batches = _check_before_step_one(run, None)
            _write_run_json(run, overrides, n_eval_batches)
            if loaded is not None:
                if polishing:
                    run.kept = polish.carry_over(parent, directory, loaded, cfg, run.dataset)
                _adopt(run, loaded)
                run.builder.parents = (loaded.state["record"],)
            return _train(run)


def resume(
    run_dir: Path, sets: Sequence[Override], changed: RunConfig, listener: Listener
) -> Record:
    """Continue a run at its latest checkpoint.
    `changed` is its configuration after `--set`; only resumable keys may differ.

    Raises ConfigError for any other change, CheckpointError if nothing can be loaded.
    """
    directory = RunDir(run_dir)
    document = directory.read_run()
    _refuse_changes(validate(document["config"]), changed, sets)
    with alone(run_dir, "run"):
        loaded = checkpoint.load(checkpoint.find(run_dir))
        finished = run_dir / "metadata.json"
        if finished.is_file() and (record := read_record(finished)).succeeded:
            listener.on_event(
                f"{run_dir} is {record.status}; nothing is left to do. --fork continues it under "
                "a changed configuration"
            )
            return record
        former = [Override.model_validate(o) for o in document["overrides"]]
        with kernels_of(changed, resolve_device(document["device"]), document["environment"]):
            run = _open(
                changed, [*former, *sets], directory, listener, runner="resume", document=document
            )
            _require_same_data(run, document)
            run.inherited_s = document["inherited_s"]
            with _recording(run):
                _check_before_step_one(run, document["n_eval_batches"])
                cut = directory.rewind(loaded.state["step"])
                _adopt(run, loaded)
                directory.log(
                    "events.jsonl",
                    event="resumed",
                    step=run.state.step,
                    lines_cut=cut,
                    at=iso(utc_now()),
                )
                return _train(run)


def _require_same_data(run: Run, document: dict) -> None:
    if changed := [
        k
        for k in ("tokenizer", "sources", "splits")
        if document["data"][k] != run.dataset.manifest[k]
    ]:
        raise DataError(
            f"the data are not those the run was started on: {', '.join(changed)} differ",
            allowed="the shards, sources and tokenizer named in run.json",
            next_step="restore them, or --fork starts a child run on what is there now",
        )


def _refuse_changes(original: RunConfig, changed: RunConfig, sets: Sequence[Override]) -> None:
    refused = [
        o for o in sets if not any(o.key == k or o.key.startswith(k + ".") for k in BESIDE_TRAINING)
    ]
    if changed != original and refused:
        raise ConfigError(
            f"a resumed run keeps its configuration, and {refused[0].key} decides what is computed",
            value=f"{refused[0].value} from {refused[0].source}",
            allowed=f"changes of {', '.join(BESIDE_TRAINING)}",
            next_step=(
                f"stack train --fork DIR {' '.join(o.source for o in sets)} starts a child run "
                "with the change recorded"
            ),
        )


def _open(
    cfg: RunConfig,
    overrides: Sequence[Override],
    directory: RunDir,
    listener: Listener,
    *,
    runner: str = "train",
    document: dict | None = None,
    only: Sequence[str] | None = None,
) -> Run:
    spec = load_spec()
    device = resolve_device(document["device"] if document else cfg.device)
    allocator = keep_heap()
    refuse_emulated(AUTOCAST[cfg.train.dtype], device, "train.dtype")
    if cfg.optim.kind == "muon":
        refuse_emulated(AUTOCAST[cfg.optim.dtype], device, "optim.dtype")
    # warn_only would let attention's backward sum in any order on a GPU
    torch.use_deterministic_algorithms(True)
    # a search for reads of unwritten memory that costs 3 % of a step
    torch.utils.deterministic.fill_uninitialized_memory = False
    listener.on_phase("data")
    builder = RecordBuilder(
        kind="train",
        spec=spec,
        config=cfg.to_dict(),
        claim=CLAIM,
        not_covered=NOT_COVERED,
        overrides=overrides,
        command=_command(),
    )
    if document:
        builder.continue_record(document["record"], document["started_at"])
    dataset = prepare(cfg.data, on_progress=listener.on_build)
    needed_bytes = require_room(cfg, dataset.tokenizer.vocab_size, device)
    if device.type == "cpu":
        allocator = f"{allocator}, {lay_in_huge_pages(needed_bytes)}"
    kernels = {
        f"kernel_{k}": str(v)
        for k, v in dispatch.choices(
            device, compiled=cfg.train.compile, dtype=cfg.train.dtype
        ).items()
    }
    builder.environment = environment(str(device), allocator=allocator, **kernels)
    builder.inputs = [Artefact(**i) for i in dataset.inputs()]
    if cfg.data.verify != "full":
        builder.not_covered = (
            *NOT_COVERED,
            "bit flips in the token shards: only their sizes were compared",
        )

    vocab_size, model = dataset.tokenizer.vocab_size, cfg.model.model_dump()
    listener.on_opened(cfg, dataset, parameter_count(model, vocab_size), directory.path)
    said = lambda gate_id, step, verdict: run.on_verdict(gate_id, step, verdict)  # noqa: E731 - the run holds its keeper
    run = Run(
        cfg=cfg,
        dir=directory,
        device=device,
        dataset=dataset,
        keeper=Gatekeeper(
            spec,
            kind="train",
            runner=runner,
            waivers=cfg.gates.waive,
            only=only,
            config=cfg.to_dict(),
            on_verdict=said,
        ),
        builder=builder,
        listener=listener,
        state=build_state(cfg, dataset, device),
        peak_flops=probe_peak_flops(device),
        flops_per_step=operations.flops_per_step(cfg, vocab_size),
        writer=make_writer(cfg.checkpoint),
        random_loss_nats=math.log(vocab_size),
    )
    return run


def _command() -> list[str]:
    return ["stack", *sys.argv[1:]]


def _refuse_certain_exhaustion(run: Run) -> None:
    """With `on_exhausted = "error"`, a plan that cannot end well is refused before it begins,
    or goes on.
    """
    cfg, order = run.cfg, run.state.reader.order
    rows = cfg.train.max_steps * cfg.train.tokens_per_step // cfg.model.max_seq_len
    n_windows = sum(s.n_windows for s in order.sources)
    # what a bandit will draw is not known
    planned = dict(zip((s.name for s in order.sources), order.counts(rows).tolist()))
    short = [
        (s.name, planned[s.name], s.n_windows)
        for s in order.sources
        if planned[s.name] > s.n_windows
    ]
    if rows > n_windows:
        short = [("all", rows, n_windows)]
    if cfg.data.on_exhausted == "error" and short:
        name, wanted, there = short[0]
        raise StreamExhausted(
            "the corpus ends before the run does"
            if name == "all"
            else f"source {name} ends before the run does",
            value=(
                f"{wanted} windows planned, {there} in the training split (data.on_exhausted = "
                "error)"
            ),
            allowed=f"at most {there} windows of {cfg.model.max_seq_len} tokens",
            next_step=(
                "lower train.max_steps, add text, or --set data.on_exhausted=wrap for further "
                "epochs"
            ),
        )


def _check_before_step_one(run: Run, n_eval_batches: int | None) -> int:
    run.listener.on_phase("preflight")
    started = time.perf_counter()
    n = preflight(
        run.cfg,
        run.dataset,
        run.device,
        run.keeper,
        run.listener.on_preflight,
        n_eval_batches=n_eval_batches,
    )
    run.builder.metric("preflight_s", round(time.perf_counter() - started, 3), "s", better="lower")
    run.n_eval_batches = n
    run.held_out = eval_batches(
        run.dataset.validation, run.cfg.model.max_seq_len, run.cfg.eval.batch_size, n
    )
    if isinstance(run.cfg.curriculum, BanditCurriculum):
        run.probes = probe_batches(
            run.dataset.validation, run.cfg.model.max_seq_len, run.cfg.curriculum.probe_windows
        )
        blind = [
            s.name
            for s in run.state.reader.order.sources
            if s.weight > 0 and s.cap > 0 and s.name not in run.probes
        ]
        if blind:
            raise DataError(
                f"source {blind[0]} has no held-out window, so the bandit cannot see what its "
                "turns do",
                allowed=(
                    "at least one held-out window of every source with a weight and a cap above 0"
                ),
                next_step=(
                    f"raise data.split.validation_frac, --set curriculum.caps.{blind[0]}=0, or "
                    "curriculum.kind=static"
                ),
            )
    return n


def _write_run_json(run: Run, overrides: Sequence[Override], n_eval_batches: int) -> None:
    run.dataset.tokenizer.save(run.dir.path / "tokenizer.json")
    run.dir.write_run(
        {
            "record": run.builder.id,
            "config": run.cfg.to_dict(),
            "overrides": [o.model_dump(by_alias=True, mode="json") for o in overrides],
            "device": run.device.type,
            "environment": run.builder.environment,
            "code": run.builder.code.model_dump(),
            "data": run.dataset.manifest,
            "n_eval_batches": n_eval_batches,
            "command": list(run.builder.command),
            "started_at": iso(run.builder.started),
            "inherited_s": run.inherited_s,
        }
    )


def _adopt(run: Run, loaded: checkpoint.Loaded) -> None:
    with torch.no_grad():
        dropped = checkpoint.restore(run.state, loaded)
    if validate(loaded.state["config"]).curriculum != run.cfg.curriculum:
        dropped = run.state.reader.order.load_state_dict(polish.rebased(loaded, run.dataset))
    for name in dropped:
        run.dir.log("events.jsonl", event="arm_dropped", step=run.state.step, source=name)
        run.listener.on_event(
            f"the curriculum's state knows source {name}, which is no arm of this run; dropped"
        )
    _refuse_certain_exhaustion(run)
    run.keeper.load_state_dict(loaded.state["gates"])
    run.begun_at = loaded.path
    run.line = next(iter(run.dir.read_lines("metrics.jsonl")[-1:]), {})
    run.keeper.observe(
        Resumed(step=run.state.step, path=str(loaded.path), cursor=run.state.reader.cursor)
    )
    run.listener.on_event(f"continuing after step {run.state.step} from {loaded.path}")


def _train(run: Run) -> Record:
    plan = run.plan()
    run.recent.begin(
        run.begun_at,
        run.state.step,
        plan,
        run.keeper.state_dict(),
        continued=run.begun_at is not None,
    )
    run.keeper.observe(Started(step=run.state.step, plan=plan))
    status, reason = train_loop(run)
    if run.last_val is None:  # a kill came between the last checkpoint and the record
        run.last_val = run.measure()
    pointed = {
        f"{name}_step": checkpoint.pointed_step(run.dir.checkpoints, name)
        for name in ("latest", "best")
    }
    run.keeper.observe(Finished(step=run.state.step, status=status, **pointed))
    return _close(run, status, reason, 0)


class _recording:
    """Writes the record of a run that an exception ends; the exception travels on."""

    def __init__(self, run: Run):
        self.run = run

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is not None:
            self._let_the_writer_end()
            try:
                record = _close(self.run, *_ending(self.run, error))
            except OSError as e:
                # a full disk takes the record too; the first error is the one to tell
                self.run.listener.on_event(f"the record could not be written: {e}")
                return
            if isinstance(error, GateFailed):
                error.record = record

    def _let_the_writer_end(self) -> None:
        """The record names the last good checkpoint.
        A save that failed beside the error that ends the run is told as an event.
        """
        try:
            self.run.writer.settle()
        except Exception as e:
            self.run.dir.log(
                "events.jsonl", event="save_failed", step=self.run.state.step, message=str(e)
            )
            self.run.listener.on_event(f"besides, the checkpoint behind the run failed: {e}")


def _ending(run: Run, error: BaseException) -> tuple[str, str, int]:
    """Status, reason and exit code of a run that an exception ended."""
    match error:
        case GateFailed():
            if any(g.id == "runtime.finite" and g.verdict == "fail" for g in run.keeper.results()):
                run.dir.log(
                    "events.jsonl",
                    event="nonfinite",
                    step=run.state.step,
                    **nonfinite_parts(run.state.model),
                )
            return "halted", error.what, error.exit_code
        case Stopped(exit_code=75):
            return "preempted", error.what, 75
        case Stopped():
            return "interrupted", error.what, 130
        case KeyboardInterrupt():
            saved = (run.dir.checkpoints / "latest").is_file()
            return (
                "interrupted",
                (
                    "stopped at once; "
                    f"{'the last checkpoint is good' if saved else 'nothing was saved yet'}"
                ),
                130,
            )
        case StackproofError():
            return "failed", error.what, error.exit_code
    return "failed", f"{type(error).__name__}: {error}", 1


def _close(run: Run, status: str, reason: str, exit_code: int) -> Record:
    """State the metrics and write the record; also for runs that ended badly."""
    state_metrics(run, with_baselines=exit_code == 0)
    run.builder.device_s = max(0.0, run.state.wall_s - run.inherited_s)
    if folder := checkpoint.pointed(run.dir.checkpoints, "latest"):
        run.builder.outputs = [
            artefact(folder / f, root=run.dir.path) for f in (*checkpoint.FILES, "manifest.json")
        ]
        run.builder.outputs.append(artefact(run.dir.path / "tokenizer.json", root=run.dir.path))
        run.builder.outputs += run.kept
    run.builder.outputs += [
        artefact(p, root=run.dir.path) for p in sorted(run.dir.path.glob("repro/*/repro.json"))
    ]
    record = run.builder.finish(
        run.dir.path,
        status=status,
        end_reason=reason,
        exit_code=exit_code,
        gates=run.keeper.results(),
        series=SERIES,
    )
    run.listener.on_finished(record, run.dir.path)
    return record
