"""The mesh of a run: how its ranks are arranged as replicate × shard × tensor."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stackproof.config import MixtureOfDepths, MixtureOfExperts, RunConfig
from stackproof.spec.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class MeshSizes:
    """Ranks along each dimension. The tensor coordinate of neighbouring ranks differs, then that
    along shard, then that along replicate.
    """

    replicate: int
    shard: int
    tensor: int

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.replicate * self.shard * self.tensor

    @property
    def n_data_ranks(self) -> int:
        """Ranks that read different rows."""
        return self.replicate * self.shard

    def place(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank."""
        data_rank, tensor = divmod(rank, self.tensor)
        replicate, shard = divmod(data_rank, self.shard)
        return {"replicate": replicate, "shard": shard, "tensor": tensor}

    def device_mesh(self, device_type: str) -> "DeviceMesh":
        """torch's mesh over all ranks of the process group."""
        from torch.distributed.device_mesh import init_device_mesh

        sizes = (self.replicate, self.shard, self.tensor)
        return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard", "tensor"))

    def __str__(self) -> str:
        return " × ".join(f"{name} {n}" for name, n in self.as_dict().items())

    def as_dict(self) -> dict[str, int]:
        """JSON-ready."""
        return {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor}


ONE_RANK = MeshSizes(1, 1, 1)


def mesh_sizes(cfg: RunConfig, world_size: int) -> MeshSizes:
    """The mesh of a configuration on this many ranks. Raises ConfigError, naming the keys, if the
    product is another number or the model cannot be divided so.
    """
    declared = cfg.parallel
    fixed = declared.replicate * declared.tensor
    shard = max(1, world_size // fixed) if declared.shard == "auto" else declared.shard
    sizes = MeshSizes(declared.replicate, shard, declared.tensor)
    if sizes.world_size != world_size:
        raise ConfigError(
            f"the mesh has not as many ranks as the run: {world_size}",
            value=(
                f"parallel.replicate {sizes.replicate} × parallel.shard {declared.shard} × "
                f"parallel.tensor {sizes.tensor}"
            ),
            allowed=f"a product of {world_size}",
            next_step="change --nproc or these keys; parallel.shard = auto takes what is left",
        )
    _require_rows(cfg, sizes)
    if sizes.tensor > 1:
        _require_divisible(cfg, sizes.tensor)
    return sizes


def _require_rows(cfg: RunConfig, sizes: MeshSizes) -> None:
    if cfg.rows_per_step % sizes.n_data_ranks:
        raise ConfigError(
            "the rows of a step cannot be dealt evenly to the data ranks",
            value=(
                f"{cfg.rows_per_step} rows (train.tokens_per_step / model.max_seq_len) to "
                f"parallel.replicate × parallel.shard = {sizes.n_data_ranks} ranks"
            ),
            allowed="a number of rows that the ranks divide",
            next_step="change --nproc, the mesh, or train.tokens_per_step",
        )


def _require_divisible(cfg: RunConfig, tensor: int) -> None:
    """Tensor parallelism divides heads, features and sequences evenly."""
    m = cfg.model
    for key, part in (("ffn", m.ffn), ("depth", m.depth)):
        if isinstance(part, MixtureOfExperts | MixtureOfDepths):
            raise ConfigError(
                f"tensor parallelism cannot be combined with model.{key}.kind = {part.kind}",
                value=f"parallel.tensor = {tensor}",
                allowed="parallel.tensor = 1, where parallel.shard and replicate are free",
                next_step="--set parallel.tensor=1",
            )
    odd = {
        f"model.{key} = {size}": size
        for key, size in (
            ("n_heads", m.n_heads),
            ("n_kv_heads", m.n_kv_heads),
            ("d_ff", m.d_ff),
            ("max_seq_len", m.max_seq_len),
        )
        if size % tensor
    }
    if odd:
        raise ConfigError(
            "tensor parallelism cannot divide the model evenly",
            value=f"parallel.tensor = {tensor} and {', '.join(odd)}",
            allowed="a divisor of all of them",
            next_step="change parallel.tensor or the model",
        )
