"""How a model is divided among the ranks of a mesh. The model itself is written for one process.

B batch, T tokens, D d_model, V vocab

Tensor parallelism (arXiv:1909.08053) divides heads, inner features and the vocabulary; between the
matrix products each rank holds a slice of the sequence, on which norms and residuals act
(arXiv:2205.05198). Sharded data parallelism is torch's FSDP2 (`fully_shard`), around each block
that is large enough.
Collective operations are those of DTensor and FSDP2.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement

from stackproof.distributed.tensors import local_part
from stackproof.kernels import dispatch
from stackproof.model.transformer import Transformer

UNIT_BYTES = 4 * 2**20  # a block with fewer on a rank is gathered and reduced with the rest
SEQUENCE = 1  # the axis of (B, T, D) that norms and residuals are divided along
# By the end of a parameter's name: the axis it is divided along. All others are whole on each rank.
DIVIDED = {
    **dict.fromkeys(("q.weight", "k.weight", "v.weight", "q.bias", "k.bias", "v.bias"), 0),
    **dict.fromkeys(("gate.weight", "up.weight", "up.bias", "embed.weight", "head.weight"), 0),
    **dict.fromkeys(("out.weight", "down.weight"), 1),
}


def parallelize(model: Transformer, mesh: DeviceMesh, *, compiled: bool = False) -> None:
    """Divide a model among the ranks of a mesh (replicate, shard, tensor), in place. Every rank
    holds the whole model before, and its part after; each parameter is then a DTensor.

    Gradients are summed over the data ranks in float32, once per optimizer step.
    """
    if mesh["tensor"].size() > 1:
        divide_matrices(model, mesh["tensor"])
    if compiled:
        for block in model.layers:
            _compile_training(block)
    data_mesh = mesh["replicate", "shard"]
    # The hooks of a unit cost as much as a small block computes in.
    blocks = [block for block in model.layers if held_bytes(block) >= UNIT_BYTES]
    for module in (*blocks, model):
        fully_shard(module, mesh=data_mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the count of all ranks already: gradients are plain sums.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden_states")


def _compile_training(block: nn.Module) -> None:
    """Compile the forward of a block where gradients are recorded. Evaluation and sampling are
    eager, as in one process: each length of a text would be another graph.
    """
    graph = torch.compile(block._call_impl, fullgraph=True, options={"fallback_random": True})

    def call(*inputs: Any, **options: Any) -> Any:
        return (graph if torch.is_grad_enabled() else block._call_impl)(*inputs, **options)

    block._compiled_call_impl = call  # where Module.compile keeps its graph


def held_bytes(module: nn.Module) -> int:
    """Bytes of the parameters of a module on this rank, before FSDP2 divides them."""
    return sum(local_part(p).nbytes for p in module.parameters())


# --- tensor parallelism ---------------------------------------------------------------------------


def divide_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Divide the parameters among the ranks of a tensor group, and put the collective operations
    around the modules that use them.
    """
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            axis = _divided_axis(f"{prefix}.{name}")
            placement = Replicate() if axis is None else Shard(axis)
            divided = distribute_tensor(parameter.detach(), mesh, [placement])
            module.register_parameter(name, nn.Parameter(divided, parameter.requires_grad))
        if own:
            # On a slice of the tokens, the gradient of a whole parameter is a part of a sum.
            _use_local_parameters(module, Replicate() if prefix == "positions" else Partial())
    group = TensorGroup(mesh)
    model.embed.forward = partial(group.embedding, model.embed)
    model.layers[0].register_forward_pre_hook(group.slice_input)
    for block in model.layers:
        for branch, last in ((block.attention, block.attention.out), (block.ffn, block.ffn.down)):
            branch.register_forward_pre_hook(group.gather_input)
            last.forward = partial(group.row_parallel, last)
        block.dropout.register_forward_pre_hook(group.slice_places)
    model.final_norm.register_forward_hook(group.gather_output)
    model.logits = partial(group.logits, model)


def _divided_axis(name: str) -> int | None:
    return next((axis for end, axis in DIVIDED.items() if name.endswith(end)), None)


def _use_local_parameters(module: nn.Module, gradient_of_whole: Placement) -> None:
    """In its forward a module finds the part of each parameter that this rank holds, under the
    parameter's own name.
    """

    def enter(module: nn.Module, inputs: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            (placement,) = parameter.placements
            gradient = gradient_of_whole if placement.is_replicate() else placement
            # An attribute of the instance hides the parameter of that name.
            module.__dict__[name] = parameter.to_local(grad_placements=[gradient])

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        for name in module._parameters:
            module.__dict__.pop(name, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


@dataclass
class TensorGroup:
    """The collective operations of the ranks that share each matrix. `row_tokens` is the length of
    the rows in the latest forward.
    """

    mesh: DeviceMesh
    row_tokens: int = 0

    def embedding(self, table: nn.Embedding, ids_BT: Tensor) -> Tensor:
        """Each rank looks up the tokens of its part of the vocabulary; their sum is (B, T, D)."""
        rows_VD = table.weight
        first = _first_row(table._parameters["weight"])
        own_BT = (ids_BT >= first) & (ids_BT < first + len(rows_VD))
        x_BTD = F.embedding((ids_BT - first).where(own_BT, 0), rows_VD) * own_BT[..., None]
        return self._redistributed(x_BTD, Partial(), Replicate())

    def slice_input(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Before the first block: keep this rank's slice of the sequence."""
        x_BTD, *others = inputs
        self.row_tokens = x_BTD.shape[SEQUENCE]
        return self._redistributed(x_BTD, Replicate(), Shard(SEQUENCE)), *others

    def gather_input(self, branch: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Before attention or feed-forward: the whole sequence, (B, T, D). In the backward the
        gradients of all ranks are summed, and each rank keeps those of its slice.
        """
        x_BTD, *others = inputs
        return self._gathered(x_BTD, Partial()), *others

    def slice_places(self, dropout: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before dropout: the places of this rank's slice of the sequence."""
        x_BTD, branch, places = inputs
        if places is None:
            return inputs
        share = -(-self.row_tokens // self.mesh.size())
        first = min(self.mesh.get_local_rank() * share, self.row_tokens)
        return x_BTD, branch, places.between(first, first + x_BTD.shape[SEQUENCE])

    def row_parallel(self, linear: nn.Linear, x_BTD: Tensor) -> Tensor:
        """The sum of all ranks' products, of which each keeps its slice of the sequence."""
        y_BTD = self._redistributed(
            dispatch.linear(x_BTD, linear.weight), Partial(), Shard(SEQUENCE)
        )
        return y_BTD if linear.bias is None else y_BTD + linear.bias

    def gather_output(self, norm: nn.Module, inputs: Any, x_BTD: Tensor) -> Tensor:
        """After the final norm: the whole sequence, with the same gradient on every rank."""
        return self._gathered(x_BTD, Replicate())

    def logits(self, model: Transformer, x_BTD: Tensor) -> Tensor:
        """Logits (B, T, V), float32 or wider, gathered: for evaluation and sampling."""
        head_VD = model.head_weight
        logits_BTV = dispatch.linear(x_BTD, head_VD.to_local())
        shape = (*x_BTD.shape[:2], len(head_VD))
        whole_BTV = self._from_parts(logits_BTV, Shard(2), shape).full_tensor()
        return whole_BTV if whole_BTV.dtype.itemsize >= 4 else whole_BTV.float()

    def _gathered(self, x_BTD: Tensor, gradient: Placement) -> Tensor:
        shape = (x_BTD.shape[0], self.row_tokens, x_BTD.shape[2])
        parts = self._from_parts(x_BTD, Shard(SEQUENCE), shape)
        return parts.redistribute(placements=[Replicate()]).to_local(grad_placements=[gradient])

    def _from_parts(self, x: Tensor, placement: Placement, shape: tuple[int, ...]) -> DTensor:
        stride = (shape[1] * shape[2], shape[2], 1)
        return DTensor.from_local(
            x.contiguous(), self.mesh, [placement], run_check=False, shape=shape, stride=stride
        )

    def _redistributed(self, x_BTD: Tensor, before: Placement, after: Placement) -> Tensor:
        parts = DTensor.from_local(x_BTD, self.mesh, [before], run_check=False)
        return parts.redistribute(placements=[after]).to_local()


def _first_row(table: DTensor) -> int:
    """Number of the first row that this rank holds."""
    _, offset = compute_local_shape_and_global_offset(
        table.shape, table.device_mesh, table.placements
    )
    return offset[0]
