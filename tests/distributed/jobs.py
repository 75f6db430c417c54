"""What the tests of this room run on every rank of a pool."""

import errno
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from stackproof.config import RunConfig, load_config
from stackproof.data.data_loader import Batch
from stackproof.distributed import failure
from stackproof.distributed.process_group import joined
from stackproof.distributed.tensors import is_divided, whole
from stackproof.model.foreign import plain_name
from stackproof.recipes import recipe
from stackproof.spec.errors import StackproofError
from stackproof.train import checkpoint, start
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.loop import train
from stackproof.train.start import fresh, resume
from stackproof.train.state import divide, state_around

VOCAB, ROWS, TOKENS = 61, 8, 24
CPU = torch.device("cpu")


def configuration(mesh: dict, changes: dict) -> RunConfig:
    """A small configuration of a mesh, in which each rank accumulates."""
    small = {
        "model.d_model": 24,
        "model.n_layers": 2,
        "model.n_heads": 4,
        "model.n_kv_heads": 4,
        "model.head_dim": 6,
        "model.d_ff": 32,
        "model.max_seq_len": TOKENS,
        "model.dropout": 0.0,
        "train.tokens_per_step": ROWS * TOKENS,
        "train.micro_batch_size": 1,
        **{f"parallel.{name}": size for name, size in mesh.items()},
    }
    fixed = {key: (value, "test") for key, value in (small | changes).items()}
    return load_config(recipe("pocket"), fixed=fixed)[0]


def batches_of(cfg: RunConfig, step: int) -> list[Batch]:
    """Micro-batches of one row with ragged masks: those of a whole step."""
    draws = torch.Generator().manual_seed(step)
    made = []
    for row in range(ROWS):
        ids = torch.randint(VOCAB, (1, TOKENS + 1), generator=draws)
        labels = ids[:, 1:].clone()
        labels[:, : int(torch.randint(TOKENS, (), generator=draws))] = -100
        made.append(Batch(ids[:, :-1], labels, (row,), 0, row, row + 1, None, (0,), (0,)))
    return made


def states(cfg: RunConfig, ranks, dtype: torch.dtype) -> tuple:
    """A state of one process, and an equal one that is divided."""
    found = []
    for _ in range(2):
        loader = SimpleNamespace(rank=0, world_size=1, rows=1, cursor=0)
        state = state_around(cfg, VOCAB, loader, CPU)
        state.model.to(dtype)
        state.optimizer = opt.make_optimizer(state.model, cfg.optim)
        found.append(state)
    divide(found[1], ranks)
    return tuple(found)


def own(batches: list[Batch], ranks) -> list[Batch]:
    """The micro-batches of this rank, numbered as the data loader does."""
    n, rank = ranks.sizes.n_data_ranks, ranks.data_rank
    return [
        replace(batch, cursor_before=batch.cursor_before - rank, rows_before=rank)
        for batch in batches[rank::n]
    ]


def gradient_error(mesh: dict, changes: dict, dtype: str) -> tuple[float, float]:
    """Relative L2 distance of the gradient of all ranks from that of one process, and the relative
    distance of the loss.
    """
    cfg = configuration(mesh, changes)
    with joined(cfg, CPU) as ranks:
        one, divided = states(cfg, ranks, getattr(torch, dtype))
        batches = batches_of(cfg, 1)
        alone = steps.accumulate(one, batches)
        together = steps.accumulate(divided, own(batches, ranks))
        assert together[1:] == alone[1:]
        wanted = {plain_name(n): p.grad for n, p in one.model.named_parameters()}
        found = {plain_name(n): whole(p.grad) for n, p in divided.model.named_parameters()}
        assert found.keys() == wanted.keys()
        distance = sum(float((found[n] - wanted[n]).double().square().sum()) for n in wanted)
        size = sum(float(g.double().square().sum()) for g in wanted.values())
        loss = abs(together.loss_nats - alone.loss_nats) / alone.loss_nats
    return (distance / size) ** 0.5, loss


def loss_distance(mesh: dict, changes: dict, n_steps: int) -> float:
    """Largest relative distance of the losses of float64 training from those of one process."""
    cfg = configuration(mesh, changes)
    worst = 0.0
    with joined(cfg, CPU) as ranks:
        one, divided = states(cfg, ranks, torch.float64)
        for step in range(n_steps):
            batches = batches_of(cfg, step)
            alone = steps.train_step(one, batches).loss_nats
            together = steps.train_step(divided, own(batches, ranks)).loss_nats
            worst = max(worst, abs(together - alone) / alone)
    return worst


def masks(mesh: dict, changes: dict) -> dict[tuple[int, int, int, int], bytes]:
    """What is kept of each token by (row, layer, branch, position), in a step of this rank, as its
    modules of dropout have it.
    """
    cfg = configuration(mesh, changes)
    found = {}
    with joined(cfg, CPU) as ranks:
        divided = states(cfg, ranks, torch.float64)[1]
        here = []  # row and first position of the micro-batch
        for layer, block in enumerate(divided.model.layers):
            block.dropout.register_forward_hook(partial(keep, found, here, layer))
        first = TOKENS // ranks.sizes.tensor * (ranks.rank % ranks.sizes.tensor)
        batches = own(batches_of(cfg, 1), ranks)
        inner, rows = divided.features, iter([batch.rows[0] for batch in batches])

        def features(*inputs):
            here.append((next(rows), first))
            return inner(*inputs)

        divided.features = features
        steps.accumulate(divided, batches)
    return found


def keep(found: dict, here: list, layer: int, module: Any, inputs: tuple, y_BTD: Tensor) -> None:
    """Add the kept features of each token of the latest micro-batch, which has one row."""
    (row, first), branch = here[-1], inputs[1]
    for i, kept_D in enumerate(y_BTD[0] != 0):
        found[row, layer, branch, first + i] = bytes(kept_D.tolist())


def control_operations() -> dict:
    """What each operation of a process group gives."""
    cfg = configuration({}, {})
    with joined(cfg, CPU) as ranks:
        return {
            "total": ranks.total(1 + ranks.rank, 10),
            "highest": ranks.highest(ranks.rank, -ranks.rank),
            "sum": ranks.sum(torch.tensor([1.0, ranks.rank])).tolist(),
            "maximum": ranks.maximum(torch.tensor([1.0, ranks.rank])).tolist(),
            "rows": ranks.rows([ranks.rank, 7]),
            "dealt": ranks.dealt(range(5), lambda item: item * item),
            "names": ranks.names_of_all(("odd",) if ranks.rank % 2 else ()),
            "main": ranks.from_main(f"of {ranks.rank}"),
        }


def tensor_counts(mesh: dict) -> list[int]:
    """A count to which each data rank adds one."""
    with joined(configuration(mesh, {}), CPU) as ranks:
        return ranks.total(1)


def lose_a_rank(how: str) -> tuple[str, int, str]:
    """The error of a rank when the last one ends, its exit code, and its text."""
    cfg = configuration({}, {"parallel.timeout_s": 5})
    try:
        with joined(cfg, CPU) as ranks:
            ranks.total(1)
            ranks.at(3, "reduce gradients")
            if ranks.rank == ranks.world_size - 1:
                match how:
                    case "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "hung":
                        time.sleep(12)
                        os._exit(1)
                    case "failed":
                        raise StackproofError("the disk is full")
            ranks.total(1)
    except StackproofError as error:
        return type(error).__name__, error.exit_code, f"{error.what} {error.value}"
    return "", 0, failure.last_operation()


# --- runs -----------------------------------------------------------------------------------------


def run(cfg: RunConfig, folder: Path, cache: str, until: int | None = None) -> str | None:
    """Train without gates, or go on in the folder of a run. Returns the status of the record on
    rank 0, or the error. `until` ends the run by a signal after that step.
    """
    os.environ["STACKPROOF_CACHE"] = cache
    without_gates = start.Gatekeeper
    start.Gatekeeper = lambda spec, **given: without_gates(spec, **given | {"only": ()})
    if until is not None:
        end_after(until)
    try:
        with joined(cfg, CPU) as ranks:
            known = (folder / "run.json").is_file()
            opened = (
                resume(folder, (), cfg, ranks=ranks)
                if known
                else fresh(cfg, (), folder, ranks=ranks)
            )
            record = train(opened)
    except StackproofError as error:
        return f"{type(error).__name__} {error.exit_code}"
    return None if record is None else record.status


def parts_read(cfg: RunConfig, folder: Path, cache: str, mesh: dict) -> int:
    """How many tensors of a checkpoint, read in parts on a mesh, are those that one process reads.
    Raises AssertionError if one is another.
    """
    sizes = {f"parallel.{name}": (size, "test") for name, size in mesh.items()}
    cfg = load_config(cfg, fixed=sizes)[0]
    with joined(cfg, CPU) as ranks:
        loaded = checkpoint.load(folder, ranks)
        loader = SimpleNamespace(rank=0, world_size=1, rows=1, cursor=0)
        state = state_around(cfg, loaded.state["vocab_size"], loader, CPU)
        divide(state, ranks)
        held = checkpoint.held_by(state, loaded)
        wanted = loaded.model | loaded.tensors
        found = held.model | held.tensors
        assert found.keys() == wanted.keys()
        assert all(torch.equal(whole(found[name]), wanted[name]) for name in wanted)
        return sum(is_divided(tensor) for tensor in found.values())


def run_with_full_disk(cfg: RunConfig, folder: Path, cache: str, full: int, at: int) -> str | None:
    """`run`, in which the disk of one rank has no room for the `at`-th file that DCP writes."""
    written = filesystem._write_files_from_queue
    calls = [0]

    def refused(*arguments, **named):
        calls[0] += int(os.environ["RANK"]) == full
        if calls[0] == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(*arguments, **named)

    # Behind the preflight, which saves on rank 0 alone.
    began = start.take_part

    def take_part(trainer):
        filesystem._write_files_from_queue = refused
        began(trainer)

    start.take_part = take_part
    return run(cfg, folder, cache)


def end_after(step: int) -> None:
    """Send SIGTERM to the last rank after a step, as a machine that is taken away does."""
    taken = steps.train_step

    def step_and_signal(state, batches):
        report = taken(state, batches)
        if report.step == step and state.ranks.rank == state.ranks.sizes.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    steps.train_step = step_and_signal
