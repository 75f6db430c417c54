"""The training loop, and its phases: draw and update, evaluate, sample, save."""

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from stackproof.config import BanditCurriculum
from stackproof.contracts.coherence import coherence
from stackproof.contracts.subject import Subject
from stackproof.data.data_loader import Batch
from stackproof.evaluate.bits_per_byte import Evaluation, evaluate_batches
from stackproof.evaluate.memorization import memorization
from stackproof.evaluate.sampling import generate, sample_loss
from stackproof.spec.errors import Stopped
from stackproof.spec.records import Record
from stackproof.subject.checkpoints import WrittenCheckpoint
from stackproof.train import checkpoint
from stackproof.train import step as steps
from stackproof.train.callbacks import declared_plan
from stackproof.train.rng import generator
from stackproof.train.signals import STATUS_OF_SIGNAL, Requests, listening
from stackproof.train.state import live_crc32
from stackproof.train.trainer import RestartPoint, Sample, Trainer, close


def train(opened: AbstractContextManager[Trainer]) -> Record:
    """Train to the last step, an early stop or a signal. `opened` is one of stackproof.train.start.
    Returns the record.

    Raises GateFailed if a gate halts the run, Stopped after a signal,
    StreamExhausted if the corpus ends and may not wrap.
    """
    with opened as trainer:
        state, cfg = trainer.state, trainer.cfg
        status, reason = "completed", f"all {cfg.train.max_steps} steps"
        trainer.callbacks.on_train_start(trainer, restart_point(trainer, trainer.started_from))
        # Signals only set requests, so a step is never cut in the middle.
        with listening(partial(acknowledge, trainer)) as requests:
            while state.step < cfg.train.max_steps:
                # The step comes first: all that follows describes the weights after it.
                take_step(trainer)
                last = state.step == cfg.train.max_steps

                # A bandit is rewarded before the next draw, with the gain of this step's weights.
                match cfg.curriculum:
                    case BanditCurriculum(probe_every=every) if state.step % every == 0:
                        probe(trainer)

                # Evaluate before saving, so that the checkpoint holds the decision to stop.
                evaluated = last or state.step % cfg.eval.every == 0
                if evaluated and evaluate(trainer) and not last:
                    status = "early_stopped"
                    reason = f"no significant gain for {state.stopper.wait} evaluations"
                    last = True

                # Draw a text: a falling loss does not show a model that repeats itself.
                if last or state.step % cfg.sample.every == 0:
                    sample(trainer)
                trainer.callbacks.on_step_end(trainer, trainer.report)

                # Save before a request to stop is honoured, so that no step is lost.
                new_best = evaluated and state.best.get("step") == state.step
                asked = requests.checkpoint and state.step % cfg.checkpoint.signal_boundary == 0
                due = state.step % cfg.checkpoint.every == 0
                if last or new_best or asked or due or requests.stop:
                    save(trainer)
                    requests.checkpoint = requests.checkpoint and not asked
                stop_if_asked(trainer, requests)
                if last:
                    break
            # The record names the last checkpoint, so its background write must have ended.
            trainer.output.writer.wait()
        if trainer.evaluation is None:  # a kill came between the last checkpoint and the record
            trainer.evaluation = held_out_loss(trainer)
        trainer.callbacks.on_train_end(trainer, status)
        return close(trainer, status, reason, 0)


def take_step(trainer: Trainer) -> None:
    """Draw the batches of one step and update the weights. The timer runs from before the draw."""
    trainer.callbacks.on_step_start(trainer)
    trainer.timer.start()
    trainer.batches = draw(trainer)
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
    with trainer.read_only("evaluation"):
        trainer.evaluation = report.evaluation = val = held_out_loss(trainer)
        decision = state.stopper.update(val.batch_nats)
        if val.loss_nats < state.best.get("val_loss_nats", float("inf")):
            state.best = {"step": state.step, "val_loss_nats": val.loss_nats}
        options = {"device": state.device, "autocast": state.autocast}
        report.memorization = memorization(
            state.model, trainer.batches, trainer.held_out, **options
        )
        trainer.callbacks.on_evaluation(trainer, report, decision)
        state.last_val_nats = val.loss_nats
    return decision.stop


def held_out_loss(trainer: Trainer) -> Evaluation:
    """Loss on the held-out batches."""
    return _loss(trainer, trainer.held_out)


def _loss(trainer: Trainer, batches: list[Batch]) -> Evaluation:
    state, sizes = trainer.state, trainer.dataset.tokenizer.token_bytes
    return evaluate_batches(
        state.model, batches, sizes, device=state.device, autocast=state.autocast
    )


def sample(trainer: Trainer) -> None:
    """Draw a text from the model and score it."""
    state, cfg, tokenizer = trainer.state, trainer.cfg.sample, trainer.dataset.tokenizer
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
    # One write at a time, and a failed one ends the run before the next save.
    writer.wait()
    with trainer.read_only("save"):
        # Capture all that the checkpoint states before a background write lets training continue.
        point = restart_point(trainer, root / checkpoint.step_name(state.step))
        document = checkpoint.state_document(
            state,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            gates=point.gates,
            record=trainer.output.record.id,
        )
        snapshot = checkpoint.capture(state, document, copied=writer.copied)
        is_best = state.best.get("step") == state.step
        write = partial(_write, trainer, snapshot, live_crc32(state), is_best)
        writer.start(write, partial(_written, trainer, point))
        trainer.callbacks.on_save(trainer, point.folder)


def _write(
    trainer: Trainer, snapshot: checkpoint.Snapshot, live: dict[str, int], is_best: bool
) -> Path:
    """Write a checkpoint, check it with the artifact gates, move the pointers.
    Reads nothing that a training step changes.
    """
    root, model = trainer.output.dir.checkpoints, trainer.state.model
    folder = checkpoint.write(root, snapshot)
    tied = model.head_weight is model.embed.weight
    saved = WrittenCheckpoint(folder, snapshot.step, tied, live)
    trainer.keeper.artifact(Subject(saved=saved), step=snapshot.step)
    if is_best:
        checkpoint.point(root, "best", folder)
    return folder


def _written(trainer: Trainer, point: RestartPoint, folder: Path) -> None:
    """Delete checkpoints that are no longer kept, and announce the new one."""
    checkpoint.retain(trainer.output.dir.checkpoints, trainer.cfg.checkpoint.keep)
    trainer.callbacks.on_saved(trainer, point)


def restart_point(trainer: Trainer, folder: Path | None) -> RestartPoint:
    """Where the run stands, as something that it can begin from again."""
    return RestartPoint(
        folder, trainer.state.step, declared_plan(trainer), trainer.keeper.state_dict()
    )


def acknowledge(trainer: Trainer) -> None:
    """Announce when the checkpoint comes that a signal requested."""
    every = trainer.cfg.checkpoint.signal_boundary
    trainer.callbacks.on_message(
        f"a checkpoint was requested; it comes after a multiple of {every} steps, or with the last "
        "one"
    )


def stop_if_asked(trainer: Trainer, requests: Requests) -> None:
    """Raise Stopped after a signal to stop; the checkpoint of this step is already written."""
    step, run_dir = trainer.state.step, trainer.output.dir.path
    if requests.stop is None or step == trainer.cfg.train.max_steps:
        return
    trainer.output.writer.wait()
    status, exit_code = STATUS_OF_SIGNAL[requests.stop]
    raise Stopped(
        f"{status} after step {step}; its checkpoint is good",
        exit_code=exit_code,
        next_step=f"stack train --resume {run_dir}",
    )
