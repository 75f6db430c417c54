"""Opening and closing the process group of a run, from the environment that torchrun sets."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from stackproof.config import RunConfig
from stackproof.distributed import failure
from stackproof.distributed.mesh import mesh_sizes
from stackproof.distributed.parent import end_with_launcher
from stackproof.distributed.ranks import OneProcess, ProcessGroup, Ranks
from stackproof.distributed.started import by_torchrun, n_started, restarts
from stackproof.distributed.starts import Launcher, common_start
from stackproof.spec.errors import EnvironmentUnfit, UsageError

RECORDED_OPERATIONS = 2000  # kept by the flight recorder
# Variables by which a launcher states that it started several processes.
# SLURM_NTASKS is none of them: a job states it too, in which one process may run alone.
STARTED_BY_OTHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@contextmanager
def joined(cfg: RunConfig, device: torch.device, run_dir: Path = Path("RUN")) -> Iterator[Ranks]:
    """The ranks of this run until the block ends: those that torchrun has started, or one process.
    `run_dir` is the folder that their errors name.

    Raises ConfigError if the mesh does not fit them, UsageError if another launcher started several
    processes without connecting them, EnvironmentUnfit if this one has no GPU of its own, RankLost
    if a rank or the launcher ends or does not answer.
    """
    world_size = n_started()
    timeout = timedelta(seconds=cfg.parallel.timeout_s)
    sizes = mesh_sizes(cfg, world_size)
    if world_size == 1:
        _refuse_strangers()
        launcher = Launcher(_store(timeout, run_dir)[0] if by_torchrun() else None)
        yield OneProcess(restarted=restarts() > 0, launcher=launcher)
        return
    end_with_launcher()
    _leave_out_known_warnings()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_OPERATIONS))
    shared, rank = _store(timeout, run_dir)
    start, n = common_start(shared, rank, world_size, timeout)
    # It outlives the ranks: those of a restart must not read addresses of lost ones.
    store = dist.PrefixStore(start, shared)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device_of_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    ranks = ProcessGroup(store, sizes, device, timeout, run_dir)
    try:
        with ranks.watched():
            ranks.restarted = max(ranks.highest(n - 1, restarts())) > 0
            ranks.launcher = Launcher(shared)
            yield ranks
            # Rank 0 may close its record for longer than a collective operation may take.
            with ranks.main_first():
                pass
            # No rank leaves before the others are done: its store and sockets would go with it.
            ranks.highest(0)
    finally:
        ranks.close()


def _store(timeout: timedelta, run_dir: Path) -> tuple[dist.Store, int]:
    """The launcher's store, and the number of this rank. Raises RankLost if it does not answer."""
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError as e:
        raise failure.without_launcher(e, run_dir) from e
    store.set_timeout(timeout)
    return store, rank


def device_of_rank() -> int:
    """Number of the CUDA device of this rank. Raises EnvironmentUnfit as `require_devices`."""
    number = int(os.environ["LOCAL_RANK"])
    if number >= torch.cuda.device_count():
        require_devices(int(os.environ["LOCAL_WORLD_SIZE"]))
    return number


def require_devices(n_ranks: int) -> None:
    """Raise EnvironmentUnfit if this machine has fewer CUDA devices than ranks: NCCL refuses two
    ranks on one.
    """
    if n_ranks > (n := torch.cuda.device_count()):
        raise EnvironmentUnfit(
            "a rank has no CUDA device of its own",
            value=f"{n_ranks} ranks on this machine, {n} CUDA devices",
            allowed="at most one rank for each CUDA device",
            next_step=f"--nproc {n}, more machines, or --device cpu",
        )


def _leave_out_known_warnings() -> None:
    """That a save reduces over two mesh dimensions one after the other, which costs little, and
    that an output of the model must not be changed in place, which it is not.
    """
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _refuse_strangers() -> None:
    """Raise UsageError if a launcher started several processes, and torchrun did not connect them:
    each would train alone and write the same folder.
    """
    for name in STARTED_BY_OTHERS:
        if int(os.environ.get(name, "1")) > 1 and "RANK" not in os.environ:
            raise UsageError(
                "several processes were started, and this one is not connected to the others",
                value=f"{name}={os.environ[name]}, WORLD_SIZE is not set",
                allowed="processes that torchrun has started",
                next_step="srun torchrun …, one task per node: see docs/cluster.md",
            )
