"""What the tests of this room run on every rank of a pool."""

import errno
import os
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import ScriptObject, Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import filesystem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stackproof.config import RunConfig, load_config
from stackproof.data.data_loader import Batch
from stackproof.distributed import failure
from stackproof.distributed.communication import Communication, profiled
from stackproof.distributed.output import divide_output, traceback_kept
from stackproof.distributed.process_group import joined
from stackproof.distributed.tensors import is_divided, local_part, whole
from stackproof.model import parallelize
from stackproof.model.foreign import plain_name
from stackproof.museum.plant import load_museum
from stackproof.recipes import recipe
from stackproof.replay.bundle import ReproRecorder
from stackproof.spec.errors import DataError, StackproofError, Stopped
from stackproof.train import checkpoint, loop, start
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.start import fresh, resume
from stackproof.train.state import TrainState, divide, state_around
from tests.distributed.rows import logged

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


def state_of_one(cfg: RunConfig, dtype: torch.dtype) -> TrainState:
    """A fresh state of one process."""
    loader = SimpleNamespace(rank=0, world_size=1, rows=1, cursor=0)
    state = state_around(cfg, VOCAB, loader, CPU)
    state.model.to(dtype)
    state.optimizer = opt.make_optimizer(state.model, cfg.optim)
    return state


def states(cfg: RunConfig, ranks, dtype: torch.dtype) -> tuple[TrainState, TrainState]:
    """A state of one process, and an equal one that is divided."""
    one, divided = (state_of_one(cfg, dtype) for _ in range(2))
    divide(divided, ranks)
    return one, divided


def own(batches: list[Batch], ranks) -> list[Batch]:
    """The micro-batches of this rank, numbered as the data loader does."""
    n, rank = ranks.sizes.n_data_ranks, ranks.data_rank
    return [
        replace(batch, cursor_before=batch.cursor_before - rank, rows_before=rank)
        for batch in batches[rank::n]
    ]


def gradient_error(
    mesh: dict, changes: dict, dtype: str, unit_bytes: int | None = None, reduced_in: str = ""
) -> tuple[float, float]:
    """Relative L2 distance of the gradient of all ranks from that of one process, and the relative
    distance of the loss. `unit_bytes` are those from which a block is a unit of FSDP2, and
    `reduced_in` is another dtype than FSDP2 reduces gradients in.
    """
    cfg = configuration(mesh, changes)
    if unit_bytes is not None:
        parallelize.UNIT_BYTES = unit_bytes
    if reduced_in:
        policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, reduced_in))
        parallelize.fully_shard = partial(parallelize.fully_shard, mp_policy=policy)
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


def loss_distance(
    mesh: dict, changes: dict, n_steps: int, dtype: str = "float64", n_permuted: int = 0
) -> tuple[float, float]:
    """Largest relative distance of the losses of training from those of one process: of all ranks,
    and, on rank 0, of `n_permuted` single processes that read the micro-batches of each step in
    another order.
    """
    cfg, draws = configuration(mesh, changes), torch.Generator().manual_seed(0)
    worst = [0.0, 0.0]
    with joined(cfg, CPU) as ranks:
        one, divided = states(cfg, ranks, getattr(torch, dtype))
        permuted = [
            state_of_one(cfg, getattr(torch, dtype)) for _ in range(n_permuted * ranks.is_main)
        ]
        for step in range(n_steps):
            batches = batches_of(cfg, step)
            alone = steps.train_step(one, batches).loss_nats
            together = steps.train_step(divided, own(batches, ranks)).loss_nats
            others = [
                steps.train_step(state, [batches[i] for i in torch.randperm(ROWS, generator=draws)])
                for state in permuted
            ]
            of_others = [report.loss_nats for report in others]
            for i, losses in enumerate(([together], of_others)):
                worst[i] = max([worst[i], *(abs(loss - alone) / alone for loss in losses)])
    return tuple(worst)


def overflow_on_one_rank(mesh: dict) -> list[tuple[int, float, float, int]]:
    """For each rank: retries, loss, clipped norm and loss scale of a float16 step in which its part
    of the gradients overflows once.
    """
    cfg = configuration(mesh, {"train.dtype": "float16"})
    with joined(cfg, CPU) as ranks:
        return [overflow(cfg, ranks, rank) for rank in range(ranks.world_size)]


def overflow(cfg: RunConfig, ranks, rank: int) -> tuple[int, float, float, int]:
    """`overflow_on_one_rank` of one rank."""
    state = states(cfg, ranks, torch.float32)[1]
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    unscale, n_calls = state.scaler.unscale_, []

    def unscale_after_overflow(optimizer):
        n_calls.append(1)
        if len(n_calls) == 1 and ranks.rank == rank:
            local_part(opt.gradients(state.model)[0])[0] = torch.inf
        unscale(optimizer)

    state.scaler.unscale_ = unscale_after_overflow
    report = steps.train_step(state, own(batches_of(cfg, 1), ranks))
    scale = state.scaler.get_scale()
    return report.overflow_retries, report.loss_nats, report.clipped_grad_norm, scale


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


def place(mesh: dict) -> dict[str, int]:
    """The coordinates of this rank, as torch has them."""
    with joined(configuration(mesh, {}), CPU) as ranks:
        return dict(zip(ranks.mesh.mesh_dim_names, ranks.mesh.get_coordinate()))


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
        return type(error).__name__, error.exit_code, str(error)
    return "", 0, failure.last_operation()


def print_and_fail(run_dir: Path, start: int, how: str) -> None:
    """Print as a library does and as a warning, and end the block as `how` has it."""
    rank = int(os.environ["RANK"])
    divide_output(run_dir, rank, start)
    os.write(1, f"library of {rank}\n".encode())
    print(f"text of {rank}")
    warnings.warn(f"warning of {rank}", stacklevel=1)
    try:
        with traceback_kept(run_dir, rank):
            match how:
                case "failed":
                    raise DataError("the shard is damaged")
                case "stopped":
                    raise Stopped("preempted after step 3", exit_code=75)
                case "crashed" if rank == 1:
                    os.abort()
    except StackproofError:
        sys.stdout.flush()


def communication(late_s: float) -> Communication:
    """Of a sum for which the last rank is late, followed by a product on each."""
    with joined(configuration({}, {}), CPU) as ranks, profiled(CPU) as found:
        ranks.total(1)  # from here on all measure
        if ranks.rank == ranks.world_size - 1:
            time.sleep(late_s)
        ranks.total(1)
        torch.ones(64, 64) @ torch.ones(64, 64)
    return found


def starts(counting: int | None) -> list[tuple[bool, bool, int]]:
    """For each of two starts: whether it is a restart, whether it reads the error that rank 1 of
    the first one has announced, and its sum. Only the agent of rank `counting` counts a restart.
    """
    cfg, found = configuration({}, {}), []
    for _ in range(2):
        with joined(cfg, CPU) as ranks:
            announced = failure.ended(ranks.store, 1) is not None
            found.append((ranks.restarted, announced, ranks.total(1)[0]))
            failure.announce(ranks.store, 1, StackproofError("the disk is full"))
            if ranks.rank == counting:
                os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return found


# --- runs -----------------------------------------------------------------------------------------


def run(cfg: RunConfig, folder: Path, cache: str, until: int | None = None) -> str | None:
    """Train without gates, or go on in the folder of a run; a log beside it has the rows. Returns
    the status of the record on rank 0, or the error. `until` ends the run by a signal after that
    step.
    """
    os.environ["STACKPROOF_CACHE"] = cache
    loop.draw = logged(loop.draw, folder.with_suffix(".rows"))
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
            record = loop.train(opened)
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


def red_with_bundle(cfg: RunConfig, folder: Path, cache: str) -> str | None:
    """The status of a run, on rank 0, in which a gate turns red and a bundle is written."""
    os.environ["STACKPROOF_CACHE"] = cache
    only = ("distributed.stragglers",)
    with load_museum()["distributed.slow-rank"].apply(), joined(cfg, CPU) as ranks:
        record = loop.train(fresh(cfg, (), folder, (ReproRecorder(),), ranks=ranks, only=only))
    return record and record.status


def nonfinite_on_rank_0() -> list[str]:
    """The names that rank 0 finds alone, of parameters with a NaN in its part."""
    cfg, found = configuration({"shard": 2}, {}), []
    with joined(cfg, CPU) as ranks:
        model = states(cfg, ranks, torch.float32)[1].model
        if ranks.is_main:
            with torch.no_grad():
                local_part(model.final_norm.weight)[0] = torch.nan
            found = steps.nonfinite_parts(model)["parameters"]
        ranks.total(1)
    return found


def end_after(step: int) -> None:
    """Send SIGTERM to the last rank after a step, as a machine that is taken away does."""
    taken = steps.train_step

    def step_and_signal(state, batches):
        report = taken(state, batches)
        if report.step == step and state.ranks.rank == state.ranks.sizes.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    steps.train_step = step_and_signal


# --- what a rank holds and sends ------------------------------------------------------------------


def held_and_sent(mesh: dict, changes: dict, unit_bytes: int) -> tuple[dict[str, int], Counter]:
    """After a step of float32 training: bytes of weights, gradients and moments that this rank
    holds, and how often it took part in each collective operation, by (operation, dimension, bytes
    of the whole tensor). Blocks of `unit_bytes` are units of FSDP2.
    """
    cfg = configuration(mesh, changes)
    parallelize.UNIT_BYTES = unit_bytes
    with joined(cfg, CPU) as ranks:
        state = states(cfg, ranks, torch.float32)[1]
        batches = own(batches_of(cfg, 1)[: cfg.rows_per_step], ranks)
        with Sent(ranks.mesh) as sent:
            steps.accumulate(state, batches)
            grads = opt.gradients(state.model)
            steps.apply_gradients(state, grads, opt.global_norm(grads))
        weights = list(state.model.parameters())
        moments = [t for f in state.optimizer.state.values() for t in f.values()]
        parts = {
            "weights": weights,
            "gradients": [p.grad for p in weights],
            "moments": moments,
        }
        held = {name: sum(n_bytes(local_part(t)) for t in ts) for name, ts in parts.items()}
    return held, sent.found


def n_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Sent(TorchDispatchMode):
    """Counts the collective operations over the groups of a mesh, of FSDP2 and of DTensor. Single
    numbers, and groups of one rank, are left out.
    """

    OPERATIONS = {
        "_allgather_base_": "all-gather",
        "all_gather_into_tensor": "all-gather",
        "_reduce_scatter_base_": "reduce-scatter",
        "reduce_scatter_tensor": "reduce-scatter",
        "allreduce_": "all-reduce",
        "all_reduce": "all-reduce",
    }

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        dimensions = [d for d in mesh.mesh_dim_names if mesh[d].size() > 1]
        self.dimension_of = {mesh.get_group(d).group_name: d for d in dimensions}
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        operation = self.OPERATIONS.get(str(function).split(".")[1])
        if operation and function.namespace in ("c10d", "_c10d_functional"):
            given = tree_leaves((arguments, result))
            groups = [a if isinstance(a, str) else group_name(a) for a in given]
            largest = max((a for a in given if isinstance(a, Tensor)), key=n_bytes)
            for group in (
                {g for g in groups if g in self.dimension_of} if largest.numel() > 1 else ()
            ):
                self.found[operation, self.dimension_of[group], n_bytes(largest)] += 1
        return result


def group_name(argument: Any) -> str | None:
    """The name of a process group as an operation of torch has it; None for other arguments."""
    if not isinstance(argument, ScriptObject) or "ProcessGroup" not in str(argument._type()):
        return None
    return ProcessGroup.unbox(argument).group_name
