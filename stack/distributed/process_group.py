"""Opening and closing the process group of a run, from the environment that torchrun sets."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from stackproof.config import RunConfig
from stackproof.distributed.launch import n_started, restarts
from stackproof.distributed.mesh import mesh_sizes
from stackproof.distributed.ranks import ONE_PROCESS, ProcessGroup, Ranks
from stackproof.spec.errors import UsageError

RECORDED_OPERATIONS = 2000  # kept by the flight recorder
# Variables by which a launcher states that it started several processes.
STARTED_BY_OTHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@contextmanager
def joined(cfg: RunConfig, device: torch.device) -> Iterator[Ranks]:
    """The ranks of this run until the block ends: those that torchrun has started, or one process.

    Raises ConfigError if the mesh does not fit them, UsageError if another launcher started several
    processes without connecting them, RankLost if a rank ends or does not answer.
    """
    world_size = n_started()
    sizes = mesh_sizes(cfg, world_size)
    if world_size == 1:
        _refuse_strangers()
        yield ONE_PROCESS
        return
    _leave_out_known_warnings()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_OPERATIONS))
    timeout = timedelta(seconds=cfg.parallel.timeout_s)
    shared, rank, _ = next(dist.rendezvous("env://"))
    # It outlives the ranks: those of a restart must not read addresses of lost ones.
    store = dist.PrefixStore(f"start/{restarts()}", shared)
    store.set_timeout(timeout)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    ranks = ProcessGroup(store, sizes, device, timeout)
    try:
        with ranks.watched():
            yield ranks
            # No rank leaves before the others are done: its store and sockets would go with it.
            ranks.highest(0)
    finally:
        ranks.close()


def _leave_out_known_warnings() -> None:
    """That a norm or a save reduces over two mesh dimensions one after the other, which costs
    little, and that an output of the model must not be changed in place, which it is not.
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
