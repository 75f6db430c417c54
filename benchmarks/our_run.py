"""A real run of the stack, opened without its preflight, and one step of it with every
gate of steps looking on.
"""

from pathlib import Path

from stackproof.contracts.events import (
    BatchDrawn,
    LossMeasured,
    RatesUsed,
    Started,
    StateCompared,
    StepTaken,
    WeightsUpdated,
)
from stackproof.contracts.gate import resolve
from stackproof.spec.gates import Gate, load_spec
from stackproof.train import loop, start
from stackproof.train import step as steps
from stackproof.train.callbacks import SdcCheck, declared_plan
from stackproof.train.run_dir import RunDir
from stackproof.train.trainer import CallbackList, Trainer

STEPS = {Started, BatchDrawn, StepTaken, LossMeasured, RatesUsed, WeightsUpdated}


def fed(gate: Gate) -> bool:
    """Whether steps alone give a gate a verdict; nothing is sampled or evaluated here. Steps
    without gates move the position of the data loader, which `data.rows` follows.
    """
    if gate.moment != "runtime":
        return True
    events = set(resolve(gate).events) - {StateCompared}
    return bool(events) and events <= STEPS and gate.id != "data.rows"


def open_run(cfg, overrides, folder: Path) -> Trainer:
    """A run in a new folder, at step 0, its gates told that it starts.
    No step is computed twice.
    """
    directory = RunDir(folder)
    directory.create()
    run = start.setup(
        cfg, overrides, directory, only=[g.id for g in load_spec().required("train") if fed(g)]
    )
    run.callbacks = CallbackList(
        [c for c in run.callbacks.callbacks if not isinstance(c, SdcCheck)]
    )
    announce(run)
    return run


def announce(run: Trainer) -> None:
    """Tell the gates that steps begin here."""
    run.keeper.observe(Started(step=run.state.step, plan=declared_plan(run)))


def gated_step(run: Trainer) -> None:
    """What `stack train` does for every step: draw, update, look."""
    loop.take_step(run)


def bare_step(run: Trainer) -> None:
    """The same update with nobody looking."""
    steps.train_step(
        run.state, [run.state.data_loader.next_batch() for _ in range(run.cfg.accumulation())]
    )
