"""The training loop, and its phases: draw and update, evaluate, sample, save."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from stackproof.config import BanditCurriculum
from stackproof.contracts.coherence import coherence
from stackproof.contracts.subject import Subject
from stackproof.data.data_loader import Batch
from stackproof.distributed.started import next_command, resume_command
from stackproof.evaluate.bits_per_byte import Evaluation, evaluate_batches
from stackproof.evaluate.memorization import memorization
from stackproof.evaluate.sampling import generate, sample_loss
from stackproof.spec.errors import CheckpointError, EnvironmentUnfit, Stopped
from stackproof.spec.files import remedy
from stackproof.spec.records import Record
from stackproof.subject.checkpoints import WrittenCheckpoint, WrittenShards, parts_in_memory
from stackproof.train import checkpoint, checkpoint_folders
from stackproof.train import step as steps
from stackproof.train.callbacks import declared_plan
from stackproof.train.rng import generator
from stackproof.train.sharded_checkpoint import ShardedSnapshot
from stackproof.train.signals import STATUS_OF_SIGNAL, Requests, StoppedAtOnce, listening
from stackproof.train.state import live_crc32
from stackproof.train.trainer import (
    RestartPoint,
    Sample,
    Trainer,
    close,
    record_baselines,
    record_results,
)

AGAIN = "stack train --resume DIR, or the same command again if DIR has no run.json"


def train(opened: AbstractContextManager[Trainer]) -> Record | None:
    """Train to the last step, an early stop or a signal. `opened` is one of stackproof.train.start.
    Returns the record; None on the ranks that write none.

    Raises GateFailed if a gate halts the run, Stopped after a signal,
    StreamExhausted if the corpus ends and may not wrap.
    """
    with ended_by_the_system(), listening() as requests, opened as trainer:
        state, cfg = trainer.state, trainer.cfg
        trainer.callbacks.on_train_start(trainer, restart_point(trainer, trainer.started_from))
        if trainer.resumed:
            complete_save(trainer, trainer.started_from)
        elif trainer.started_from is not None:
            judge_loaded(trainer, trainer.started_from)
        # From here on signals only set requests, so a step is never cut in the middle.
        requests.defer(partial(acknowledge, trainer))
        last = trainer.resumed and state.stopper.is_over()
        while state.step < cfg.train.max_steps and not last:
            # The step comes first: all that follows describes the weights after it.
            take_step(trainer)
            last = state.step == cfg.train.max_steps

            # A bandit is rewarded before the next draw, with the gain of this step's weights.
            match cfg.curriculum:
                case BanditCurriculum(probe_every=every) if state.step % every == 0:
                    probe(trainer)

            # Evaluate before saving, so that the checkpoint holds the decision to stop.
            evaluated = last or state.step % cfg.eval.every == 0
            if evaluated:
                last = evaluate(trainer) or last

            # Draw a text: a falling loss does not show a model that repeats itself.
            if last or state.step % cfg.sample.every == 0:
                sample(trainer)
            trainer.callbacks.on_step_end(trainer, trainer.report)

            # A signal to one rank is a signal to all.
            requests.agree(state.ranks)

            # Save before a request to stop is honoured, so that no step is lost.
            new_best = evaluated and state.best.get("step") == state.step
            asked = requests.agreed_checkpoint and state.step % cfg.checkpoint.signal_boundary == 0
            due = state.step % cfg.checkpoint.every == 0
            if last or new_best or asked or due or requests.agreed_stop:
                save(trainer)
                requests.checkpoint = requests.checkpoint and not asked
            stop_if_asked(trainer, requests, last)
        # The record names the last checkpoint, so its background write must have ended.
        trainer.output.writer.wait()
        if trainer.evaluation is None:  # a kill came between the last checkpoint and the record
            trainer.evaluation = held_out_loss(trainer)
        status, reason = "completed", f"all {cfg.train.max_steps} steps"
        if state.step < cfg.train.max_steps:
            status = "early_stopped"
            reason = f"no significant gain for {state.stopper.wait} evaluations"
        if trainer.output.ranks.is_main:
            record_results(trainer)
            record_baselines(trainer)
        trainer.callbacks.on_train_end(trainer, status)
        return close(trainer, status, reason, 0) if trainer.output.ranks.is_main else None


@contextmanager
def ended_by_the_system() -> Iterator[None]:
    """Raise Stopped for a signal that ended the run at once, and EnvironmentUnfit for a file that
    could not be read or written, after the record is closed.
    """
    try:
        yield
    except StoppedAtOnce as e:
        raise Stopped(
            f"{e.status} at once, by a signal",
            exit_code=e.exit_code,
            next_step=AGAIN,
        ) from e
    except OSError as e:
        raise EnvironmentUnfit(
            f"a file of the run could not be read or written: {e}",
            next_step=f"{remedy(e)}, then {AGAIN}",
        ) from e


def take_step(trainer: Trainer) -> None:
    """Draw the batches of one step and update the weights. The timer runs from before the draw."""
    trainer.state.ranks.at(trainer.state.step + 1, "train step")
    trainer.callbacks.on_step_start(trainer)
    trainer.timer.start()
    trainer.batches = draw(trainer)
    with trainer.around_update():
        trainer.report = steps.train_step(trainer.state, trainer.batches)
    trainer.report.wall_s = trainer.timer.stop()
    trainer.state.wall_s += trainer.report.wall_s
    trainer.callbacks.on_step(trainer, trainer.report)


def draw(trainer: Trainer) -> list[Batch]:
    """The micro-batches of one step."""
    batches = trainer.state.next_batches()
    trainer.callbacks.on_batch(trainer, batches)
    return batches


def probe(trainer: Trainer) -> None:
    """Measure the held-out loss of every source and end the bandit's turn with it."""
    losses = {source: _loss(trainer, [batch]).loss_nats for source, batch in trainer.probes.items()}
    turn = trainer.state.data_loader.sampler.reward(losses)
    trainer.output.dir.log("curriculum.jsonl", step=trainer.state.step, event="turn", **turn)


def evaluate(trainer: Trainer) -> bool:
    """Held-out loss, and how much of the last step's batches is memorized.
    Returns whether the stop rule ends the run.
    """
    state, report = trainer.state, trainer.report
    state.ranks.at(state.step, "evaluation")
    with trainer.read_only("evaluation"):
        trainer.evaluation = report.evaluation = val = held_out_loss(trainer)
        decision = state.stopper.update(val.batch_nats)
        if val.loss_nats < state.best.get("val_loss_nats", float("inf")):
            state.best = {"step": state.step, "val_loss_nats": val.loss_nats}
        options = {"device": state.device, "autocast": state.autocast}
        read = state.ranks.from_main(trainer.batches)
        report.memorization = memorization(state.model, read, trainer.held_out, **options)
        trainer.callbacks.on_evaluation(trainer, report, decision)
        state.last_val_nats = val.loss_nats
    return decision.stop


def held_out_loss(trainer: Trainer) -> Evaluation:
    """Loss on the held-out batches."""
    return _loss(trainer, trainer.held_out)


def _loss(trainer: Trainer, batches: list[Batch]) -> Evaluation:
    state, sizes = trainer.state, trainer.dataset.tokenizer.token_bytes
    return evaluate_batches(
        state.model,
        batches,
        sizes,
        device=state.device,
        autocast=state.autocast,
        ranks=state.ranks,
    )


def sample(trainer: Trainer) -> None:
    """Draw a text from the model and score it."""
    state, cfg, tokenizer = trainer.state, trainer.cfg.sample, trainer.dataset.tokenizer
    state.ranks.at(state.step, "sample")
    prompt_ids = [tokenizer.eos_id, *tokenizer.encode(cfg.prompt).ids]
    with trainer.read_only("sample"):
        ids = generate(
            state.model,
            prompt_ids,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=1.0,
            repetition_penalty=1.0,
            generator=generator(trainer.cfg.seed, "sample", state.step),
            eos_id=None,
        )
        text = tokenizer.decode(ids)
        nats = sample_loss(
            state.model, prompt_ids, ids, device=state.device, autocast=state.autocast
        )
        drawn = Sample(state.step, cfg.prompt, text, ids, nats, coherence(text, cfg.language))
        trainer.callbacks.on_sample(trainer, drawn)


def save(trainer: Trainer) -> None:
    """Hand a checkpoint of this step to the writer, once the previous one is on disk."""
    state, tokenizer = trainer.state, trainer.dataset.tokenizer
    root, writer = trainer.output.dir.checkpoints, trainer.output.writer
    state.ranks.at(state.step, "save")
    # One write at a time, and a failed one ends the run before the next save.
    writer.wait()
    # Capture all that the checkpoint states before a background write lets training continue.
    point = restart_point(trainer, root / checkpoint_folders.step_name(state.step))
    document = checkpoint.state_document(
        state,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        gates=point.gates,
        record=trainer.output.record.id,
        run=trainer.mark(),
    )
    with trainer.read_only("save"):
        snapshot = checkpoint.capture(state, document, copied=writer.copied)
        layout = checkpoint.layout_of(trainer.cfg.checkpoint)
        written = written_checkpoint(trainer, point.folder, layout)
        if snapshot is not None:
            write = partial(_write, trainer, snapshot, written)
            writer.start(write, partial(_written, trainer, point))
        trainer.callbacks.on_save(trainer, point.folder)


def written_checkpoint(
    trainer: Trainer, folder: Path, layout: checkpoint.Layout, *, published: bool = False
) -> WrittenCheckpoint | WrittenShards:
    """The folder of this step's checkpoint, with the live state to compare it with."""
    state, model = trainer.state, trainer.state.model
    tied = model.head_weight is model.embed.weight
    match layout:
        case "single":
            return WrittenCheckpoint(folder, state.step, tied, live_crc32(state), published)
        case "sharded":
            held = parts_in_memory(state)
            return WrittenShards(folder, state.step, tied, held, state.ranks.behind(), published)


def _write(
    trainer: Trainer,
    snapshot: checkpoint.Snapshot | ShardedSnapshot,
    saved: WrittenCheckpoint | WrittenShards,
) -> Path:
    """Write a checkpoint behind its logs, and judge it by the artifact gates before `latest` names
    it. Reads nothing that a training step changes.
    """
    trainer.output.dir.sync_logs()
    root = trainer.output.dir.checkpoints
    return checkpoint.write(root, snapshot, lambda folder: _judge(trainer, saved))


def _judge(trainer: Trainer, saved: WrittenCheckpoint | WrittenShards) -> None:
    """Judge a written checkpoint by the artifact gates, on rank 0. All ranks call this for one
    that all have written.
    """
    found = saved.read()
    if trainer.state.ranks.is_main:
        trainer.keeper.artifact(Subject(saved=found), step=saved.step)


def _written(
    trainer: Trainer, point: RestartPoint, folder: Path, *, with_later: bool = True
) -> None:
    """Point `best` at the step of the lowest loss, delete checkpoints that are no longer kept, and
    announce the new one. Raises CheckpointError if the disk refuses.
    """
    root = trainer.output.dir.checkpoints
    if not trainer.state.ranks.is_main:
        return
    try:
        checkpoint_folders.point_best(root, point.best_step)
        checkpoint_folders.retain(root, trainer.cfg.checkpoint.keep, with_later=with_later)
    except OSError as e:
        raise CheckpointError(
            f"old checkpoints below {root} could not be cleared away: {e}",
            next_step=f"{remedy(e)}, then {next_command(root.parent)}; the newest is intact",
        ) from e
    trainer.callbacks.on_saved(trainer, point)


def judge_loaded(trainer: Trainer, folder: Path) -> None:
    """Let the gates of checkpoints compare one that was loaded with the live state."""
    layout = checkpoint.layout_in(folder)
    _judge(trainer, written_checkpoint(trainer, folder, layout, published=True))


def complete_save(trainer: Trainer, folder: Path) -> None:
    """All that follows the write of a checkpoint, for the one that was loaded: a kill may have come
    before it. The gates judge the folder and see the save again, as their saved state is from
    before.
    """
    point = restart_point(trainer, folder)
    with trainer.read_only("save"):
        judge_loaded(trainer, folder)
        if trainer.state.ranks.is_main:
            checkpoint_folders.point(trainer.output.dir.checkpoints, "latest", folder)
        trainer.callbacks.on_save(trainer, folder)
    # Later folders, if an older step was chosen, stay until the next save has succeeded.
    _written(trainer, point, folder, with_later=False)


def restart_point(trainer: Trainer, folder: Path | None) -> RestartPoint:
    """Where the run stands, as something that it can begin from again."""
    return RestartPoint(
        folder,
        trainer.state.step,
        declared_plan(trainer),
        trainer.keeper.state_dict(),
        trainer.state.best.get("step"),
    )


def acknowledge(trainer: Trainer) -> None:
    """Announce when the checkpoint comes that a signal requested."""
    every = trainer.cfg.checkpoint.signal_boundary
    trainer.callbacks.on_message(
        f"a checkpoint was requested; it comes after a multiple of {every} steps, or with the last "
        "one"
    )


def stop_if_asked(trainer: Trainer, requests: Requests, last: bool) -> None:
    """Raise Stopped after a signal to stop; the checkpoint of this step is already written. The
    last step ends the run by itself.
    """
    step, run_dir = trainer.state.step, trainer.output.dir.document.parent
    if requests.agreed_stop is None or last:
        return
    trainer.output.writer.wait()
    status, exit_code = STATUS_OF_SIGNAL[requests.agreed_stop]
    raise Stopped(
        f"{status} after step {step}; its checkpoint is good",
        exit_code=exit_code,
        next_step=resume_command(run_dir),
    )
