"""A real run of the stack, opened without its preflight, and one step of it with every
gate of steps looking on.
"""

import time
from pathlib import Path

from stackproof.contracts.events import Started
from stackproof.spec.gates import Gate, load_spec
from stackproof.spec.runners import required, watched_events
from stackproof.train import loop, session
from stackproof.train import step as steps
from stackproof.train.listener import Listener
from stackproof.train.rundir import RunDir

STEPS = {"Started", "BatchDrawn", "StepTaken"}


def fed(gate: Gate) -> bool:
    """Whether steps alone let a gate look; nothing is sampled or evaluated here."""
    return gate.moment != "runtime" or set(watched_events(gate)) <= STEPS


def open_run(cfg, overrides, folder: Path) -> session.Run:
    """A run in a new folder, at step 0, its gates told that it starts."""
    directory = RunDir(folder)
    directory.create()
    run = session._open(
        cfg,
        overrides,
        directory,
        Listener(),
        only=[g.id for g in required(load_spec(), "train") if fed(g)],
    )
    announce(run)
    return run


def announce(run: session.Run) -> None:
    """Tell the gates that steps begin here."""
    run.keeper.observe(Started(step=run.state.step, plan=run.plan()))


def gated_step(run: session.Run) -> None:
    """What `stack train` does for every step: draw, update, look."""
    started = time.perf_counter()
    batches = loop.draw(run)
    report = steps.train_step(run.state, batches)
    run.after_step(report, batches, max(time.perf_counter() - started, 1e-9))


def bare_step(run: session.Run) -> None:
    """The same update with nobody looking."""
    steps.train_step(run.state, [run.state.reader.draw() for _ in range(run.cfg.accumulation())])
