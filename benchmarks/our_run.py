"""A real run of the stack, opened without its preflight, and one step of it with every
gate of steps looking on.
"""

from contextlib import ExitStack
from pathlib import Path

import torch

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
from stackproof.distributed.process_group import joined
from stackproof.distributed.ranks import ONE_PROCESS, Ranks
from stackproof.spec.gates import Gate, load_spec
from stackproof.train import loop, start
from stackproof.train import step as steps
from stackproof.train.callbacks import SdcCheck, declared_plan
from stackproof.train.device import kernels_of
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


def open_run(cfg, overrides, folder: Path, ranks: Ranks = ONE_PROCESS) -> Trainer:
    """A run in a new folder, at step 0, whose gates have observed its start; on several ranks with
    the gates that compare them. No step is computed twice.
    """
    directory = RunDir(folder, rank=ranks.rank)
    with ranks.main_first():
        directory.create()
    gates = load_spec().required("train")
    only = [g.id for g in gates if g.subsystem == "distributed" or fed(g)]
    run = start.setup(cfg, overrides, directory, ranks=ranks, only=only)
    start.take_part(run)
    run.callbacks = CallbackList(
        [c for c in run.callbacks.callbacks if not isinstance(c, SdcCheck)]
    )
    run.callbacks.on_train_start(run, loop.restart_point(run, None))
    return run


def open_on_ranks(opened: ExitStack, cfg, overrides, folder: Path) -> Trainer:
    """A run as `open_run` has it, on the ranks that this process is one of, with one thread and the
    kernels of its configuration, until `opened` is closed.
    """
    device = torch.device(cfg.device)
    torch.set_num_threads(1)
    ranks = opened.enter_context(joined(cfg, device))
    opened.enter_context(kernels_of(cfg, device))
    return open_run(cfg, overrides, folder, ranks)


def announce(run: Trainer) -> None:
    """Tell the gates that steps begin here."""
    run.keeper.observe(Started(step=run.state.step, plan=declared_plan(run)))


def gated_step(run: Trainer) -> None:
    """What `stack train` does for every step: draw, update, look."""
    loop.take_step(run)


def bare_step(run: Trainer) -> None:
    """The same update with nobody looking."""
    steps.train_step(run.state, run.state.next_batches())
