"""Starting a run: fresh, resumed, forked, or continued under another curriculum
(continued pre-training).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from stackproof.config import BanditCurriculum, RunConfig, recorded_config
from stackproof.contracts.events import Resumed
from stackproof.contracts.gate import Verdict
from stackproof.contracts.keeper import KEPT_MOMENTS, UNFIT_VALUES, Gatekeeper
from stackproof.data import curriculum
from stackproof.data.data_loader import eval_batches, probe_batches
from stackproof.data.manifest import stated
from stackproof.data.prepare import prepare
from stackproof.data.sampler import Sampler
from stackproof.distributed.ranks import ONE_PROCESS, ProcessGroup, Ranks
from stackproof.distributed.started import lost_rank, n_started
from stackproof.evaluate.stopping import make_stop_rule
from stackproof.evidence.file_lock import file_lock
from stackproof.kernels import dispatch
from stackproof.spec import checksums
from stackproof.spec.building import RecordBuilder, artefact, iso, utc_now
from stackproof.spec.canonical import canonical_json, sha256_file
from stackproof.spec.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    StackproofError,
    StreamExhausted,
)
from stackproof.spec.files import read_bytes, remove_leftovers, write_atomically
from stackproof.spec.formulas import parameter_count
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment
from stackproof.spec.records import Artefact, Override, Record, read_record
from stackproof.spec.renamed_keys import current_override
from stackproof.subject.assemble import subject_of
from stackproof.train import checkpoint, checkpoint_folders, checkpoint_writer
from stackproof.train.callbacks import (
    GateEvents,
    PointTracing,
    RunLog,
    SdcCheck,
    StateBetweenUpdates,
    TrainingSplit,
)
from stackproof.train.device import (
    flops_per_step,
    kernels_of,
    probe_peak_flops,
    refuse_emulated,
    resolve_device,
)
from stackproof.train.memory import keep_heap, lay_in_huge_pages, require_room
from stackproof.train.rank_comparison import RankComparison, divide_compared
from stackproof.train.rank_times import RankTimes
from stackproof.train.restart import (
    former_processes,
    latest_checkpoint,
    marks_of,
    process_of,
    red_verdicts,
    refuse_changes,
    refuse_child_at_seed,
    require_newest,
    require_recorded,
    require_tokenizer,
    require_trained,
    state_processes,
)
from stackproof.train.run_dir import RunDir, parent_run
from stackproof.train.signals import uninterrupted
from stackproof.train.state import AUTOCAST, build_state
from stackproof.train.trainer import Callback, CallbackList, RunOutput, Trainer, recorded

CLAIM = (
    "This configuration, on this data and code, gives these losses, weights and samples, "
    "with every gate below looked at."
)
NOT_COVERED = (
    "quality on any task or text other than the held-out split of this corpus",
    "behaviour beyond the trained context length",
    "bitwise equality on another processor, torch build or number of threads",
)
STATE_BYTES_PER_PARAMETER = 12  # a weight and two moments, float32
# What continued pre-training may change.
CONTINUABLE_KEYS = ("curriculum", "train.log_every", "checkpoint.keep", "gates.waive")


@contextmanager
def fresh(
    cfg: RunConfig,
    overrides: Sequence[Override],
    run_dir: Path,
    callbacks: Sequence[Callback] = (),
    *,
    ranks: Ranks = ONE_PROCESS,
    parent: Path | None = None,
    continued: bool = False,
    only: Sequence[str] | None = None,
    recorded_in: Mapping[str, object] | None = None,
) -> Iterator[Trainer]:
    """A new run; with `parent` a child that begins at the parent's latest checkpoint
    under a changed configuration.

    With `continued` only the curriculum may change: the child takes over the parent's history and
    archives its samples. `only` installs just these gates, to prove them one by one; no command
    offers it. `recorded_in` is the environment of a record whose kernels are used, to repeat it.
    `ranks` are the processes of the run, each of which calls this. An exception inside the context
    closes the record of the run and propagates.
    """
    # The parent is verified before anything is created: a damaged one leaves no half-made child.
    loaded = checkpoint.load(checkpoint.find(parent), ranks) if parent else None
    if loaded:
        _refuse_finished(cfg, loaded)
    if continued:
        _refuse_continuing(cfg, overrides, loaded)
    # Lock the directory for the whole run: two processes must never write to it.
    directory = RunDir(run_dir, rank=ranks.rank)
    with ranks.main_first():
        directory.create()
    device = resolve_device(cfg.device)
    with file_lock(directory.path, "run"), kernels_of(cfg, device, recorded_in):
        directory.open()
        if ranks.is_main:
            ranks.launcher.note_begun()
        trainer = setup(cfg, overrides, directory, callbacks, ranks=ranks, only=only)
        # From here on an exception closes the record, so that a failed run is evidence as well.
        with recorded(trainer):
            if loaded is None:
                _refuse_exhaustion(cfg, trainer.state.data_loader.sampler)
            else:
                trainer.output.inherited_s = loaded.state["wall_s"]
            run_preflight(trainer, None)
            take_part(trainer)
            # Written after the gates and before step 1: only a run that passed them can be resumed.
            if loaded is not None:
                trainer.output.record.parents = (loaded.state["record"],)
                if continued:
                    trainer.output.carried = _carry_over(trainer, parent, loaded)
            if ranks.is_main:
                data = trainer.dataset.tokenizer.to_bytes()
                write_atomically(directory.path / "tokenizer.json", data)
                directory.write_run(
                    trainer.output.record,
                    device=trainer.state.device.type,
                    inherited_s=trainer.output.inherited_s,
                    data=stated(trainer.dataset.manifest),
                    n_eval_batches=len(trainer.held_out),
                    parents=list(trainer.output.record.parents),
                    carried=[artefact.model_dump() for artefact in trainer.output.carried],
                )
            # The parent's state comes last, since run.json must describe the run that it enters.
            if loaded is not None:
                _restore(trainer, loaded, ("runtime",))
                if not _compares(trainer, loaded):
                    _forget_evaluations(trainer)
                _continue(trainer, loaded)
            yield trainer


@contextmanager
def resume(
    run_dir: Path,
    sets: Sequence[Override],
    changed: RunConfig,
    callbacks: Sequence[Callback] = (),
    *,
    ranks: Ranks = ONE_PROCESS,
    at: int | None = None,
) -> Iterator[Trainer]:
    """A run continued at its latest checkpoint, or at that of step `at`; at the seed if a kill came
    before its first checkpoint. `changed` is its configuration after `--set`; the number of `ranks`
    may be another one than before.

    Raises ConfigError if anything but the keys of BESIDE_TRAINING changes, CheckpointError if
    nothing can be loaded, or if checkpoint, run.json and logs are not of one run.
    """
    # Refuse another computation first: the record states one configuration for all steps.
    directory = RunDir(run_dir)
    document = directory.read_run()
    require_trained(directory, document)
    refuse_changes(directory, document, changed, sets)
    # The recorded kernels on the recorded device: others give other bits.
    device, environment_then = resolve_device(document["device"]), document["environment"]
    own = directory if ranks.is_main else RunDir(run_dir, rank=ranks.rank)
    own.path.mkdir(parents=True, exist_ok=True)
    with file_lock(own.path, "run"), kernels_of(changed, device, environment_then):
        loaded = latest_checkpoint(directory, at, ranks)
        if loaded is None:
            refuse_child_at_seed(directory, document)
        elif at is None:
            require_newest(directory, loaded)
        marks = marks_of(directory, document, loaded)
        red = red_verdicts(directory, changed) if ranks.is_main else {}
        own.open()
        former = [current_override(Override.model_validate(o)) for o in document["overrides"]]
        overrides = [*former, *sets]
        trainer = setup(changed, overrides, own, callbacks, ranks=ranks, document=document)
        _refuse_other_data(trainer, document)
        step, record = loaded.state["step"] if loaded else 0, trainer.output.record
        trainer.output.inherited_s = document["inherited_s"]
        record.parents = tuple(document.get("parents", ()))
        trainer.output.carried = [Artefact(**a) for a in document.get("carried", ())]
        require_tokenizer(directory, trainer.dataset.tokenizer.to_bytes())
        require_recorded(run_dir, trainer.output.carried)
        trainer.processes = [*former_processes(loaded), process_of(record, document, step)]
        with recorded(trainer):
            others = state_processes(record, document, trainer.processes)
            if loaded is None:
                own.restore_logs({})
            # The gates run again, as the code or the machine may have changed since.
            try:
                run_preflight(trainer, document["n_eval_batches"])
            except BaseException:
                # The record of a resume that ends here describes the run up to its checkpoint.
                with uninterrupted(), suppress(StackproofError, OSError):
                    _return_to(trainer, loaded, marks, red)
                    if loaded is not None:
                        trainer.log_red_preflight()
                raise
            take_part(trainer)
            cut = _return_to(trainer, loaded, marks, red)
            if loaded is not None:
                _continue(trainer, loaded, resumed=True)
            for text in others:
                trainer.callbacks.on_message(text)
            now = iso(utc_now())
            if lost := lost_rank():
                own.log("events.jsonl", event="rank_lost", step=step, at=now, **asdict(lost))
            own.log("events.jsonl", event="resumed", step=step, bytes_cut=cut, at=now)
            yield trainer


def completed(
    run_dir: Path,
    sets: Sequence[Override],
    changed: RunConfig,
    callbacks: Sequence[Callback] = (),
    *,
    ranks: Ranks = ONE_PROCESS,
) -> Record | None:
    """The record of a run that has completed, with its checkpoint verified; None if steps are left.
    Raises as `resume`.
    """
    finished = run_dir / "metadata.json"
    if not finished.is_file() or not (record := read_record(finished)).succeeded:
        return None
    directory = RunDir(run_dir)
    document = directory.read_run()
    refuse_changes(directory, document, changed, sets)
    with ranks.main_first():
        if ranks.is_main:
            _verify_completed(directory, document, record)
    done = (
        f"{run_dir} is {record.status}; nothing is left to do. --fork with more train.max_steps "
        "continues it"
    )
    CallbackList(callbacks).on_message(done)
    return record


def _verify_completed(directory: RunDir, document: dict, record: Record) -> None:
    with file_lock(directory.path, "run"):
        marks_of(directory, document, latest_checkpoint(directory, None))
        # Without them a kill came between the record and the checksums.
        if checksums.read_checksums(directory.path) is None:
            require_recorded(directory.path, (*record.series, *record.outputs))
            remove_leftovers(directory.path)
            directory.seal()


def read_config(run_dir: Path) -> RunConfig:
    """The configuration that a run directory was started with.
    Raises CheckpointError if it is not a run directory, or if run.json was changed.
    """
    return recorded_config(RunDir(run_dir).read_run()["config"])


def parent_config(parent: Path) -> RunConfig:
    """The configuration that a checkpoint holds, of a run directory or a step folder.
    Raises CheckpointError.
    """
    return recorded_config(checkpoint.load_document(checkpoint.find(parent))["config"])


def setup(
    cfg: RunConfig,
    overrides: Sequence[Override],
    directory: RunDir,
    callbacks: Sequence[Callback] = (),
    *,
    ranks: Ranks = ONE_PROCESS,
    document: dict | None = None,
    only: Sequence[str] | None = None,
) -> Trainer:
    """Open data, record and gates and build the training state, whole on every rank.
    `document` is the run.json of a run that is resumed. Rank 0 has the gates.
    """
    # Settings of the process come before the first tensor, which they apply to.
    spec, watching = load_spec(), CallbackList(callbacks)
    device = resolve_device(document["device"] if document else cfg.device)
    allocator = keep_heap()
    refuse_emulated(AUTOCAST[cfg.train.dtype], device, "train.dtype")
    refuse_emulated(AUTOCAST[cfg.optim.dtype], device, "optim.dtype")
    # As errors and not as warnings: attention's backward would sum in any order on a GPU.
    torch.use_deterministic_algorithms(True)
    # A debugging aid that is on by default here and costs 3 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False

    # The record is opened before the data, so that it holds the time and code they were made with.
    watching.on_phase("data")
    record = RecordBuilder(
        kind="train",
        spec=spec,
        config=cfg.to_dict(),
        claim=CLAIM,
        not_covered=NOT_COVERED,
        overrides=overrides,
    )
    if document:
        record.continue_record(document["record"], document["started_at"])
        record.command = document["command"]
    ranks.at(0, "data")
    with ranks.main_first():
        dataset = prepare(cfg.data, on_progress=watching.on_data)

    # Memory is required as soon as the vocabulary is known, before the model takes it.
    vocab_size = dataset.tokenizer.vocab_size
    needed_bytes = require_room(cfg, vocab_size, device)
    if device.type == "cpu":
        allocator = f"{allocator}, {lay_in_huge_pages(needed_bytes)}"
    kernels = dispatch.choices(device, compiled=cfg.train.compile, dtype=cfg.train.dtype)
    chosen = {f"kernel_{k}": str(v) for k, v in kernels.items()}
    if document:  # the kernels are those of the record, and so is how they were chosen
        then = document["environment"]
        chosen |= {k: then[k] for k in chosen if k.endswith("_origin") and k in then}
    mesh = {f"mesh_{name}": size for name, size in ranks.sizes.as_dict().items()}
    chosen |= {"world_size": ranks.sizes.world_size, **mesh} if ranks.sizes.world_size > 1 else {}
    record.environment = environment(str(device), allocator=allocator, **chosen)
    record.inputs = [Artefact(**i) for i in dataset.inputs()]
    if cfg.data.verify != "full":
        looked = "their sizes were" if cfg.data.verify == "size" else "the length of drawn ones was"
        record.not_covered = (
            *NOT_COVERED,
            f"bit flips in the token shards: only {looked} compared",
        )

    n_params = parameter_count(cfg.model.model_dump(), vocab_size)
    checkpoint_folders.require_free(directory.checkpoints, STATE_BYTES_PER_PARAMETER * n_params, 2)
    watching.on_setup(cfg, dataset, n_params, directory.path)
    keeper = Gatekeeper(
        spec,
        kind="train",
        waivers=cfg.gates.waive,
        only=only if ranks.is_main else (),
        config=cfg.to_dict(),
        n_ranks=max(ranks.sizes.world_size, n_started()),
        on_verdict=lambda gate_id, step, verdict: trainer.log_verdict(gate_id, step, verdict),
    )
    # Logs first, then the caller's callbacks, then the gates, which may end the run.
    gate_events = GateEvents(TrainingSplit(dataset, cfg.model.max_seq_len))
    watching_too = SdcCheck(), StateBetweenUpdates(), RankComparison(), RankTimes()
    trainer = Trainer(
        state=build_state(cfg, dataset, device),
        dataset=dataset,
        output=RunOutput(directory, record, checkpoint_writer.make_writer(cfg.checkpoint), ranks),
        keeper=keeper,
        callbacks=CallbackList([RunLog(), *callbacks, PointTracing(), gate_events, *watching_too]),
        peak_flops=probe_peak_flops(device),
        flops_per_step=flops_per_step(cfg, vocab_size) / ranks.sizes.world_size,
    )
    return trainer


def run_preflight(trainer: Trainer, n_eval_batches: int | None) -> None:
    """Check all preflight gates, on rank 0, and draw the held-out batches: as many as the stop rule
    needs, or `n_eval_batches`.

    Raises DataError if the held-out split is too short, and GateFailed for the first red gate that
    halts, after all gates were run.
    """
    cfg, dataset, device = trainer.cfg, trainer.dataset, trainer.state.device
    trainer.callbacks.on_phase("preflight")
    started, ranks = time.perf_counter(), trainer.output.ranks
    ranks.at(trainer.state.step, "preflight")
    with ranks.main_first():
        if ranks.is_main:
            # The gates draw random numbers, which must not shift those of the run.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                settings = {"state": trainer.state, "n_eval_batches": n_eval_batches}
                subject = subject_of(cfg, dataset, device, **settings)
                n_eval_batches = subject.stopping.n_eval_batches
                trainer.keeper.preflight(subject, trainer.callbacks.on_preflight)
    n = ranks.from_main(n_eval_batches)
    trainer.output.record.metric(
        "preflight_s", round(time.perf_counter() - started, 3), "s", better="lower"
    )
    # The held-out batches are drawn once, so that all evaluations compare.
    seq_len = cfg.model.max_seq_len
    trainer.held_out = eval_batches(dataset.validation, seq_len, cfg.eval.batch_size, n)
    if isinstance(cfg.curriculum, BanditCurriculum):
        trainer.probes = probe_batches(dataset.validation, seq_len, cfg.curriculum.probe_windows)
        arms = [s for s in trainer.state.data_loader.sampler.sources if s.weight > 0 and s.cap > 0]
        if unprobed := [s.name for s in arms if s.name not in trainer.probes]:
            raise DataError(
                f"source {unprobed[0]} has no held-out window, so the bandit cannot measure its "
                "progress",
                allowed="a held-out window of every source with a weight and a cap above 0",
                next_step=(
                    f"raise data.split.validation_frac, --set curriculum.caps.{unprobed[0]}=0, or "
                    "curriculum.kind=static"
                ),
            )


def take_part(trainer: Trainer) -> None:
    """Divide the state that the preflight gates have judged among the ranks of the run."""
    match trainer.output.ranks:
        case ProcessGroup() as ranks:
            divide_compared(trainer, ranks)


@contextmanager
def restoring(loaded: checkpoint.Loaded) -> Iterator[None]:
    """Raise CheckpointError for a state document whose values have other types or forms than a
    writer gives them.
    """
    try:
        yield
    except UNFIT_VALUES as e:
        raise CheckpointError(
            f"{loaded.path / 'state.json'} cannot be restored: {type(e).__name__}: {str(e)[:200]}",
            allowed="the document that a run has written",
            next_step=checkpoint.OLDER,
        ) from e


def _return_to(
    trainer: Trainer,
    loaded: checkpoint.Loaded | None,
    marks: dict[str, dict] | None,
    red: Mapping[str, tuple[int, Verdict]],
) -> int:
    """Take a run back to its checkpoint: restore its state, and cut the logs, or the steps after it
    would appear twice. Red verdicts of those steps stay. Returns the bytes cut.
    """
    directory, cut = trainer.output.dir, 0
    if loaded is not None:
        step = loaded.state["step"]
        stated = marks is not None and trainer.output.ranks.is_main
        cut = directory.restore_logs(marks) if stated else directory.rewind(step)
        # The gates see the resume after their own state, with which they judge it.
        _restore(trainer, loaded, KEPT_MOMENTS)
        with restoring(loaded):
            n_batches = len(trainer.held_out)
            if n_batches and not trainer.state.stopper.compares(n_batches):
                raise ValueError(f"its evaluations had not {n_batches} batches")
    for gate_id, (at_step, verdict) in red.items():
        trainer.keeper.carry(gate_id, at_step, verdict)
        trainer.log_verdict(gate_id, at_step, verdict)
    return cut


def _continue(trainer: Trainer, loaded: checkpoint.Loaded, *, resumed: bool = False) -> None:
    """Let the gates see that the run continues from a checkpoint, which was restored; `resumed` if
    it is one of this run.
    """
    state = trainer.state
    _refuse_exhaustion(trainer.cfg, state.data_loader.sampler)
    trainer.started_from, trainer.resumed = loaded.path, resumed
    if resumed and (run := loaded.state["run"]):
        trainer.verified = set(run["compared"])
    trainer.keeper.observe(
        Resumed(step=state.step, path=str(loaded.path), cursor=state.data_loader.cursor)
    )
    trainer.callbacks.on_message(f"continuing after step {state.step} from {loaded.path}")


def _restore(trainer: Trainer, loaded: checkpoint.Loaded, moments: Sequence[str]) -> None:
    """Restore the training state, and the gates of these moments. A changed curriculum begins where
    the checkpoint's order stood. Raises CheckpointError.
    """
    state = trainer.state
    with restoring(loaded), torch.no_grad():
        dropped = checkpoint.restore(state, loaded)
        trainer.keeper.load_state_dict(loaded.state["gates"], moments)
    # Another curriculum starts from the rows that the former one has drawn.
    former = recorded_config(loaded.state["config"])
    if former.curriculum != trainer.cfg.curriculum:
        order = curriculum.sampler_at(former, trainer.dataset, loaded.state["curriculum"])
        dropped = state.data_loader.sampler.load_state_dict(
            curriculum.rebased(order, loaded.state["cursor"])
        )
    for name in dropped:
        trainer.output.dir.log("events.jsonl", event="arm_dropped", step=state.step, source=name)
        trainer.callbacks.on_message(
            f"the curriculum's state has source {name}, which is not an arm of this run; dropped"
        )


def _compares(trainer: Trainer, loaded: checkpoint.Loaded) -> bool:
    """Whether the evaluations of a checkpoint had the held-out batches of this run."""
    stopper, stated = trainer.state.stopper, (loaded.state["run"] or {}).get("held_out_sha256")
    same = stated == trainer.held_out_sha256 and stopper.compares(len(trainer.held_out))
    return same or stopper.rounds == 0


def _forget_evaluations(trainer: Trainer) -> None:
    """Reset stop rule, best step and their gates: losses on other batches do not compare."""
    state = trainer.state
    state.stopper, state.best, state.last_val_nats = make_stop_rule(trainer.cfg.stop), {}, None
    trainer.keeper.forget_evaluations()
    trainer.callbacks.on_message(
        "the held-out batches are not those that the parent states: the search for the best "
        "evaluation begins again"
    )


def _carry_over(trainer: Trainer, parent: Path, loaded: checkpoint.Loaded) -> list[Artefact]:
    """Copy the parent's history up to the checkpoint, archive its samples and curriculum state,
    write the table of changes.

    Returns the written files for the record.
    """
    directory, source = trainer.output.dir, RunDir(parent_run(parent))
    if run := loaded.state["run"]:
        source.require_logs(run["logs"])
    for name in ("metrics.jsonl", "curriculum.jsonl"):
        directory.copy_history(source, name, loaded.state["step"])
    archive = directory.path / "archive"
    archive.mkdir(exist_ok=True)  # a kill may have come before run.json
    if (source.path / "samples.jsonl").is_file():
        write_atomically(archive / "samples.jsonl", read_bytes(source.path / "samples.jsonl"))
    write_atomically(archive / "curriculum.json", canonical_json(loaded.state["curriculum"]))
    former = recorded_config(loaded.state["config"])
    changes = curriculum.changes(former, trainer.cfg, trainer.dataset, loaded.state["curriculum"])
    document = {
        "parent": loaded.state["record"],
        "step": loaded.state["step"],
        "model_sha256": sha256_file(checkpoint.weights_file(loaded.path)),
        **changes,
        "archived": {p.name: sha256_file(p) for p in sorted(archive.iterdir())},
    }
    write_atomically(directory.path / "continuation.json", canonical_json(document))
    return [
        artefact(p, root=directory.path)
        for p in (directory.path / "continuation.json", *sorted(archive.iterdir()))
    ]


# --- what is refused ------------------------------------------------------------------------------


def _refuse_finished(cfg: RunConfig, loaded: checkpoint.Loaded) -> None:
    """Raise ConfigError if a child of this checkpoint would take no step."""
    if loaded.state["step"] >= cfg.train.max_steps:
        raise ConfigError(
            "the run has taken all of its steps, so a child would take none",
            value=f"step {loaded.state['step']} of {cfg.train.max_steps}",
            next_step=(
                "give a checkpoint of an earlier step (DIR/checkpoints/step-…), or --fork with "
                "more train.max_steps"
            ),
        )


def _refuse_continuing(
    cfg: RunConfig, overrides: Sequence[Override], loaded: checkpoint.Loaded
) -> None:
    """Raise ConfigError for a changed key that is not continuable, and for no change."""
    if refused := _outside(overrides, CONTINUABLE_KEYS):
        raise ConfigError(
            f"--continue-from changes the mixture alone, and {refused[0].key} is something else",
            value=f"{refused[0].value} from {refused[0].source}",
            allowed=", ".join(CONTINUABLE_KEYS),
            next_step="stack train --fork DIR changes anything, without the history",
        )
    if cfg.curriculum == recorded_config(loaded.state["config"]).curriculum:
        next_step = "--set curriculum.… changes it; --resume continues without a change"
        raise ConfigError("the mixture stays as it is", next_step=next_step)


def _outside(overrides: Sequence[Override], keys: Sequence[str]) -> list[Override]:
    """Overrides of keys that are not among `keys` or below them."""
    return [o for o in overrides if not any(o.key == k or o.key.startswith(k + ".") for k in keys)]


def _refuse_other_data(trainer: Trainer, document: dict) -> None:
    """Raise DataError if the data are not those that the run was started on."""
    manifest, then = trainer.dataset.manifest, document["data"]
    either = stated(manifest), manifest  # earlier versions listed any number of shards
    if changed := [
        k for k in ("tokenizer", "sources", "splits") if then.get(k) not in [m[k] for m in either]
    ]:
        raise DataError(
            f"the data are not those the run was started on: {', '.join(changed)} differ",
            allowed="the shards, sources and tokenizer named in run.json",
            next_step="restore them, or --fork starts a child run on what is there now",
        )


def _refuse_exhaustion(cfg: RunConfig, order: Sampler) -> None:
    """With `on_exhausted = "error"`, raise StreamExhausted if the plan needs more
    windows than the corpus has.
    """
    rows = cfg.train.max_steps * cfg.train.tokens_per_step // cfg.model.max_seq_len
    n_windows = sum(s.n_windows for s in order.sources)
    planned = order.counts(rows).tolist()  # without the later draws of a bandit
    short = [(s.name, n, s.n_windows) for s, n in zip(order.sources, planned) if n > s.n_windows]
    if rows > n_windows:
        short = [("all", rows, n_windows)]
    if cfg.data.on_exhausted == "error" and short:
        name, wanted, available = short[0]
        raise StreamExhausted(
            f"{'the corpus' if name == 'all' else f'source {name}'} ends before the run does",
            value=(
                f"{wanted} windows planned, {available} in the training split (data.on_exhausted "
                "= error)"
            ),
            allowed=f"at most {available} windows of {cfg.model.max_seq_len} tokens",
            next_step=(
                "lower train.max_steps, add text, or --set data.on_exhausted=wrap for further "
                "epochs"
            ),
        )
