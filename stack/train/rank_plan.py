"""What a run on many ranks needs: memory and collective operations of a rank, and a predicted time
of a step, counted on the real model, divided on torch's meta device over a fake process group.

Nothing is computed or sent, so that one process plans a thousand ranks. D d_model
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stackproof.config import RunConfig
from stackproof.config.base import Frozen
from stackproof.config.optim import Muon
from stackproof.distributed.mesh import MeshSizes, mesh_sizes
from stackproof.distributed.tensors import local_part
from stackproof.kernels.cross_entropy import chunks
from stackproof.model.parallelize import divide_matrices, parallelize
from stackproof.model.transformer import Transformer
from stackproof.spec.errors import ConfigError
from stackproof.spec.formulas import flops_per_token
from stackproof.train.memory import FLOAT, passing_bytes, peak_bytes
from stackproof.train.optimizer import OPTIMIZERS, group_of, orthogonalise

REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
# The operations of DTensor, as torch's dispatcher names them.
OPERATIONS = {
    "all_gather_into_tensor": GATHER,
    "reduce_scatter_tensor": SCATTER,
    "all_reduce": REDUCE,
}
FLOPS_PER_S = {"float32": 6.7e13, "bfloat16": 9.89e14, "float16": 9.89e14}


class Cluster(Frozen):
    """The machines that a prediction assumes. The defaults are data sheet figures of nodes of eight
    NVIDIA H100 SXM with 400 Gb/s of network per GPU; they are not measured here.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    flops_per_s: float = Field(gt=0, description="of dense matrix products, per rank")
    reached_frac: float = Field(0.4, gt=0, le=1, description="share of flops_per_s that is reached")
    memory_bytes: float = Field(80e9, gt=0, description="memory of a rank")
    node_ranks: int = Field(8, ge=1, description="ranks of a node")
    node_bytes_per_s: float = Field(450e9, gt=0, description="that a rank sends within its node")
    network_bytes_per_s: float = Field(50e9, gt=0, description="that a rank sends to other nodes")
    latency_s: float = Field(5e-6, ge=0, description="of each hop around a ring")

    @classmethod
    def of(cls, cfg: RunConfig, changes: Mapping[str, Any]) -> "Cluster":
        """The defaults for the precision of a run, with changes. Raises pydantic's ValidationError
        for an unknown name or a value that is not allowed.
        """
        return cls.model_validate({"flops_per_s": FLOPS_PER_S[cfg.train.dtype], **changes})


@dataclass(frozen=True, order=True)
class Collective:
    """A collective operation over one dimension of the mesh. `n_bytes` is the size of the whole
    tensor: what an all-gather returns, and what a reduction takes, on every rank.
    """

    operation: str
    dimension: str
    of: str
    n_bytes: int

    def sent_bytes(self, n_ranks: int) -> float:
        """What each rank sends, by a ring."""
        passes = 2 if self.operation == REDUCE else 1
        return passes * (n_ranks - 1) / n_ranks * self.n_bytes

    def time_s(self, sizes: MeshSizes, cluster: Cluster) -> float:
        """Predicted time by a ring: its hops, and what is sent at the rate of the slowest link."""
        n_ranks = sizes.as_dict()[self.dimension]
        hops = (2 if self.operation == REDUCE else 1) * (n_ranks - 1)
        rate = cluster.node_bytes_per_s
        in_nodes = cluster.node_ranks % _span(self.dimension, sizes) == 0
        if not in_nodes and sizes.world_size > cluster.node_ranks:
            rate = cluster.network_bytes_per_s
        return hops * cluster.latency_s + self.sent_bytes(n_ranks) / rate


def _span(dimension: str, sizes: MeshSizes) -> int:
    """Neighbouring ranks among which the groups of a dimension lie."""
    spans = {TENSOR: sizes.tensor, SHARD: sizes.tensor * sizes.shard, REPLICATE: sizes.world_size}
    return spans[dimension]


@dataclass(frozen=True)
class RankPlan:
    """One mesh. `memory_bytes` are the parts of the rank with the largest ones, `collectives` how
    often a rank takes part in each operation in a step, `optimizer_flops` those of the update.
    """

    cfg: RunConfig
    vocab_size: int
    sizes: MeshSizes
    cluster: Cluster
    memory_bytes: dict[str, int]
    collectives: Counter[Collective]
    optimizer_flops: int

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the memory of a rank."""
        return self.memory_bytes["peak"] <= self.cluster.memory_bytes

    @cached_property
    def times_s(self) -> dict[str, float]:
        """Predicted seconds of a step, by part. The operations of FSDP2 overlap with computing, so
        that the longer of both counts; those of tensor parallelism and of the update do not.
        """
        m, cluster = self.cfg.model, self.cluster
        rate = cluster.reached_frac * cluster.flops_per_s
        per_token = flops_per_token(m.model_dump(), self.vocab_size, m.max_seq_len)
        n_tokens = self.cfg.train.tokens_per_step / self.sizes.world_size
        parts = {"compute": per_token * n_tokens / rate, "data": 0.0, "tensor": 0.0}
        parts["update"] = self.optimizer_flops / rate
        for collective, n in self.collectives.items():
            part = "tensor" if collective.dimension == TENSOR else "data"
            part = "update" if collective.of == "matrices" else part
            parts[part] += n * collective.time_s(self.sizes, cluster)
        step = max(parts["compute"], parts["data"]) + parts["tensor"] + parts["update"]
        return parts | {"step": step}

    def summary(self) -> dict[str, Any]:
        """Mesh, peak and step time, JSON-ready."""
        peak, step_s = self.memory_bytes["peak"], self.times_s["step"]
        mesh = self.sizes.as_dict()
        return {"mesh": mesh, "peak_bytes": peak, "step_s": step_s, "fits": self.fits}

    def document(self) -> dict[str, Any]:
        """All quantities, JSON-ready."""
        n_data_ranks, sizes = self.sizes.n_data_ranks, self.sizes.as_dict()
        return {
            "mesh": sizes,
            "micro_batch_rows": self.cfg.micro_batch_rows(n_data_ranks),
            "accumulation": self.cfg.accumulation(n_data_ranks),
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "collectives": [
                asdict(c)
                | {"per_step": n, "step_bytes": n * c.n_bytes}
                | {"sent_bytes": round(n * c.sent_bytes(sizes[c.dimension]))}
                for c, n in sorted(self.collectives.items())
            ],
            "predicted_s": self.times_s,
            "predicted_tokens_per_s": self.cfg.train.tokens_per_step / self.times_s["step"],
            "predicted_run_s": self.cfg.train.max_steps * self.times_s["step"],
        }


def plan(cfg: RunConfig, vocab_size: int, world_size: int, cluster: Cluster) -> dict[str, Any]:
    """The plan of a configuration on this many ranks, of every other mesh that it admits, and the
    cheapest mesh: the one of the shortest predicted step among those that fit. JSON-ready.
    Raises ConfigError for a mesh that is not possible.
    """
    sizes = mesh_sizes(cfg, world_size)
    with _fake_ranks(world_size):
        planner = _Planner(vocab_size, cluster)
        own = planner.of(cfg, sizes)
        plans = [planner.of(other, s) for other, s in admissible(cfg, world_size)]
    plans.sort(key=lambda p: (not p.fits, p.times_s["step"], p.memory_bytes["peak"]))
    cheapest = plans[0].summary() if plans[0].fits else None
    return {
        "world_size": world_size,
        **own.document(),
        "cheapest": cheapest,
        "meshes": [p.summary() for p in plans],
        "assumptions": cluster.model_dump(),
    }


def admissible(cfg: RunConfig, world_size: int) -> Iterator[tuple[RunConfig, MeshSizes]]:
    """Every mesh of this many ranks that the configuration admits, with the configuration that
    states it.
    """
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tensor in divisors:
        for shard in (n for n in divisors if world_size // tensor % n == 0):
            mesh = MeshSizes(world_size // tensor // shard, shard, tensor)
            parallel = cfg.parallel.model_copy(update=mesh.as_dict())
            other = cfg.model_copy(update={"parallel": parallel})
            try:
                yield other, mesh_sizes(other, world_size)
            except ConfigError:
                continue


@contextmanager
def _fake_ranks(world_size: int) -> Iterator[None]:
    """Rank 0 of a process group whose operations do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Planner:
    """Plans of one model. What meshes have in common is counted once."""

    def __init__(self, vocab_size: int, cluster: Cluster):
        self.vocab_size, self.cluster = vocab_size, cluster
        self._activations: dict[tuple[int, int], Counter[Collective]] = {}

    def of(self, cfg: RunConfig, sizes: MeshSizes) -> RankPlan:
        """The plan of one mesh."""
        rows = cfg.micro_batch_rows(sizes.n_data_ranks)
        n_micro_steps = cfg.accumulation(sizes.n_data_ranks)
        units = divided(cfg, self.vocab_size, sizes)
        memory = state_bytes(units, cfg) | _fsdp_bytes(units, n_micro_steps)
        memory |= passing_bytes(cfg, self.vocab_size, rows, tensor=sizes.tensor)
        start = FLOAT * sum(u.n_each * _n_whole(u) for u in units) + memory["weights"]
        memory |= {"start": start, "peak": max(start, peak_bytes(memory))}
        matrices = [(u.n_each, p) for u in units for name, p in u.parameters if _turned(name, cfg)]
        collectives = _of_data(units, n_micro_steps) + _of_update(matrices, sizes)
        for collective, n in self._of_tensor(cfg, sizes, rows).items():
            collectives[collective] += n * (1 if collective.of == "gradients" else n_micro_steps)
        used = {c: n for c, n in collectives.items() if sizes.as_dict()[c.dimension] > 1}
        flops = _orthogonalising_flops(matrices, cfg)
        return RankPlan(cfg, self.vocab_size, sizes, self.cluster, memory, Counter(used), flops)

    def _of_tensor(self, cfg: RunConfig, sizes: MeshSizes, rows: int) -> Counter[Collective]:
        """The operations of tensor parallelism in a micro-step; those of gradients in a step."""
        if sizes.tensor == 1:
            return Counter()
        key = sizes.tensor, rows
        if key not in self._activations:
            self._activations[key] = _of_activations(cfg, self.vocab_size, sizes, rows)
        return self._activations[key]


# --- the divided model ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together, of which the model has `n_each` alike: a block, or
    what belongs to none, with small blocks.
    """

    parameters: Sequence[tuple[str, nn.Parameter]]
    n_each: int
    is_root: bool


def divided(cfg: RunConfig, vocab_size: int, sizes: MeshSizes) -> list[Unit]:
    """The units of the model of a run, divided among the ranks of a mesh of the process group.
    Blocks of the same shapes are divided alike, so that one of each is.
    """
    with torch.device("meta"):
        model = Transformer(cfg.model, vocab_size)
    shapes = [tuple((n, p.shape) for n, p in b.named_parameters()) for b in model.layers]
    kept, counts = [shapes.index(shape) for shape in dict.fromkeys(shapes)], Counter(shapes)
    model.layers = nn.ModuleList(model.layers[i] for i in kept)
    parallelize(model, sizes.device_mesh("cpu"))
    units, rest = [], [(n, p) for n, p in model.named_parameters() if not n.startswith("layers.")]
    for number, block in enumerate(model.layers):
        own = [(f"layers.{number}.{n}", p) for n, p in block.named_parameters()]
        n_each = counts[shapes[kept[number]]]
        if isinstance(block, FSDPModule):
            units.append(Unit(own, n_each, False))
        else:  # a small block belongs to the rest
            rest += n_each * own
    return [*units, Unit(rest, 1, True)]


def _n_local(tensor: Tensor) -> int:
    """Entries of the part of rank 0, which is the largest: torch pads the others to it."""
    return local_part(tensor).numel()


def _n_gathered(unit: Unit) -> int:
    """Entries of a unit on a rank of a tensor group, padded to parts of equal size."""
    return sum(_n_local(p) * _size(p, SHARD) for _, p in unit.parameters)


def _n_whole(unit: Unit) -> int:
    return sum(p.numel() for _, p in unit.parameters)


def _size(parameter: nn.Parameter, dimension: str) -> int:
    mesh = parameter.device_mesh
    return mesh.size(mesh.mesh_dim_names.index(dimension))


def state_bytes(units: Iterable[Unit], cfg: RunConfig) -> dict[str, int]:
    """Weights, gradients and optimizer state that rank 0 holds, bytes."""
    weights = moments = 0
    for unit in units:
        for name, parameter in unit.parameters:
            n_bytes = unit.n_each * FLOAT * _n_local(parameter)
            fields = _rule(name, cfg).state_fields
            weights += n_bytes
            moments += sum(FLOAT * unit.n_each if f == "step" else n_bytes for f in fields)
    return {"weights": weights, "gradients": weights, "moments": moments}


def _fsdp_bytes(units: Sequence[Unit], n_micro_steps: int) -> dict[str, int]:
    """What FSDP2 holds beside that, bytes. `gathered`: the root's weights, those of a block and of
    the next, the gradients of a block and their copy that is sent. `accumulated`: whole gradients,
    which are summed over the ranks in the last micro-step.
    """
    root = sum(_n_gathered(u) for u in units if u.is_root)
    # Without a block of its own, the gradients of the root and their copy remain.
    largest = max((_n_gathered(u) for u in units if not u.is_root), default=root / 2)
    every = sum(u.n_each * _n_gathered(u) for u in units)
    return {
        "gathered": int(FLOAT * (root + 4 * largest)),
        "accumulated": FLOAT * every if n_micro_steps > 1 else 0,
    }


def _rule(name: str, cfg: RunConfig) -> Any:
    return OPTIMIZERS[type(cfg.optim)][group_of(name, cfg.optim)]


def _turned(name: str, cfg: RunConfig) -> bool:
    """Whether Muon updates a parameter, for which every rank assembles it."""
    return isinstance(cfg.optim, Muon) and group_of(name, cfg.optim) == "muon"


# --- collective operations ------------------------------------------------------------------------


def _of_data(units: Iterable[Unit], n_micro_steps: int) -> Counter[Collective]:
    """The operations of FSDP2 in a step. Weights are gathered for the forward, those of blocks
    again for the backward; gradients are reduced once.
    """
    found: Counter[Collective] = Counter()
    for unit in units:
        whole = FLOAT * _n_gathered(unit)
        part = FLOAT * sum(_n_local(p) for _, p in unit.parameters)
        n_gathers = n_micro_steps * (1 if unit.is_root else 2)
        found[Collective(GATHER, SHARD, "weights", whole)] += unit.n_each * n_gathers
        found[Collective(SCATTER, SHARD, "gradients", whole)] += unit.n_each
        found[Collective(REDUCE, REPLICATE, "gradients", part)] += unit.n_each
    return found


def _of_update(
    matrices: Iterable[tuple[int, nn.Parameter]], sizes: MeshSizes
) -> Counter[Collective]:
    """The operations by which every rank assembles the matrices that Muon turns: those of one shape
    and division at once.
    """
    n_held: Counter[Any] = Counter()
    for n_each, parameter in matrices:
        n_held[parameter.shape, parameter.placements] += n_each * _n_local(parameter)
    found: Counter[Collective] = Counter()
    for (_, placements), n_entries in n_held.items():
        # DTensor undoes the inner division first: that by FSDP2 where both divide the same axis.
        inner, outer = (SHARD, sizes.shard), (TENSOR, sizes.tensor)
        if placements[-1] == Shard(1):
            inner, outer = outer, inner
        n_bytes = FLOAT * n_entries
        for dimension, n_ranks in (inner, outer):
            n_bytes *= n_ranks
            found[Collective(GATHER, dimension, "matrices", n_bytes)] += 1
    return found


def _orthogonalising_flops(matrices: Iterable[tuple[int, nn.Parameter]], cfg: RunConfig) -> int:
    """FLOPs of the update of matrices by Muon, on each rank."""
    total, of_shape = 0, {}
    for n_each, parameter in matrices:
        if parameter.shape not in of_shape:
            matrix = torch.empty(1, *parameter.shape, device="meta")
            with FlopCounterMode(display=False) as counter:
                orthogonalise(matrix, steps=cfg.optim.ns_steps, dtype=torch.float32)
            of_shape[parameter.shape] = counter.get_total_flops()
        total += n_each * of_shape[parameter.shape]
    return total


class _Watch(TorchDispatchMode):
    """Counts the operations of DTensor while it is entered, but those of single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Collective] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), named: Any = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        name = str(function).split(".")[1]
        if function.namespace == "_c10d_functional" and name in OPERATIONS:
            operation = OPERATIONS[name]
            whole = result if operation == GATHER else arguments[0]
            n_bytes = whole.numel() * whole.element_size()
            if whole.numel() > 1:
                self.found[Collective(operation, TENSOR, "activations", n_bytes)] += 1
        return result


def _of_activations(
    cfg: RunConfig, vocab_size: int, sizes: MeshSizes, rows: int
) -> Counter[Collective]:
    """The operations of a tensor group in a micro-step, and of its gradients in a step, from a
    forward and a backward on the meta device. That has no half precision: counted in float32.
    """
    with torch.device("meta"):
        model = Transformer(cfg.model, vocab_size)
        input_ids_BT = torch.zeros(rows, cfg.model.max_seq_len, dtype=torch.int64)
    model.activation_checkpointing = cfg.train.activation_checkpointing == "blocks"
    divide_matrices(model, sizes.device_mesh("cpu")["tensor"])
    with _Watch() as watch:
        x_BTD, _ = model.hidden_states(input_ids_BT)
        x_BTD.sum().backward()
    found, n_tokens = watch.found, input_ids_BT.numel()
    # The head, whose loss reads the precision of a real device: see vocabulary_parallel.
    for part in chunks(n_tokens, vocab_size):
        n = part.stop - part.start
        found[Collective(REDUCE, TENSOR, "loss", FLOAT * n)] += 1
        found[Collective(REDUCE, TENSOR, "loss", 2 * FLOAT * n)] += 1
    found[Collective(REDUCE, TENSOR, "loss", FLOAT * x_BTD.numel())] += 1
    for parameter in model.parameters():
        # The head itself, which is not in this forward, is divided.
        if parameter.grad is not None and parameter.grad.placements[0].is_partial():
            n_bytes = FLOAT * parameter.numel()
            found[Collective(REDUCE, TENSOR, "gradients", n_bytes)] += 1
    return found
