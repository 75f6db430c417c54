"""The training loop: draw, step, look, evaluate, sample, save."""

import time

from stackproof.config import BanditCurriculum
from stackproof.contracts.events import BatchDrawn
from stackproof.data.reader import Batch
from stackproof.spec.errors import Stopped
from stackproof.train import step as steps
from stackproof.train.recompute import recomputed_step
from stackproof.train.run import Run
from stackproof.train.signals import STATUS_OF_SIGNAL, Requests, listening


def train_loop(run: Run) -> tuple[str, str]:
    """Train to the last step or an early stop. Returns (status, reason).

    Raises GateFailed when a gate halts, Stopped after a signal,
    StreamExhausted when the corpus ends and may not wrap.
    """
    state, cfg = run.state, run.cfg
    status, reason = "completed", f"all {cfg.train.max_steps} steps"
    with listening(run.on_checkpoint_asked) as requests:
        while state.step < cfg.train.max_steps:
            take_step(run)
            if (
                isinstance(cfg.curriculum, BanditCurriculum)
                and state.step % cfg.curriculum.probe_every == 0
            ):
                run.probe()
            last = state.step == cfg.train.max_steps
            evaluated = last or state.step % cfg.eval.every == 0
            if evaluated and run.evaluate() and not last:
                status, reason, last = (
                    "early_stopped",
                    f"no significant gain for {state.stopper.wait} evaluations",
                    True,
                )
            if last or state.step % cfg.sample.every == 0:
                run.sample()
            run.flush_line()

            new_best = evaluated and state.best.get("step") == state.step
            asked = requests.checkpoint and state.step % cfg.checkpoint.signal_boundary == 0
            if last or new_best or state.step % cfg.checkpoint.every == 0 or asked or requests.stop:
                run.save()
                requests.checkpoint = requests.checkpoint and not asked
            stop_if_asked(requests, run)
            if last:
                break
        run.writer.settle()
    return status, reason


def take_step(run: Run) -> None:
    """Draw, update, look; the clock runs from before the draw.
    Now and then the step is computed twice.
    """
    started = time.perf_counter()
    recorded_s = run.trace_s
    batches = draw(run)
    started += run.trace_s - recorded_s
    first = recomputed_step(run.state, batches) if run.recompute_due() else None
    report = steps.train_step(run.state, batches)
    run.after_step(report, batches, time.perf_counter() - started)
    if first is not None:
        run.compare(first)


def draw(run: Run) -> list[Batch]:
    """The micro-batches of one optimizer step, shown to the gates; before that,
    points are recorded on them where it is due.
    """
    reader, before = run.state.reader, run.state.reader.cursor
    batches = [reader.draw() for _ in range(run.cfg.accumulation())]
    run.recent.draw(run.state.step + 1, batches, reader.cursor)
    run.record_points(batches[0])
    run.keeper.observe(
        BatchDrawn(
            step=run.state.step + 1,
            cursor_before=before,
            cursor_after=reader.cursor,
            sample_ids=tuple(i for b in batches for i in b.sample_ids),
            epoch=batches[-1].epoch,
            n_tokens=sum(b.input_ids.numel() for b in batches),
            sources=tuple(s for b in batches for s in b.sources),
            epochs=tuple(e for b in batches for e in b.epochs),
        )
    )
    return batches


def stop_if_asked(requests: Requests, run: Run) -> None:
    """End the run if a signal asked for it; the checkpoint of this step is already written."""
    if requests.stop is None or run.state.step == run.cfg.train.max_steps:
        return
    run.writer.settle()
    status, exit_code = STATUS_OF_SIGNAL[requests.stop]
    raise Stopped(
        f"{status} after step {run.state.step}; its checkpoint is good",
        exit_code=exit_code,
        next_step=f"stack train --resume {run.dir.path}",
    )
