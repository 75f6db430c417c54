"""One AdamW step over all parameters in one launch: Triton. In the kernel E numbers of a block."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackproof.kernels import launch, tensor_list
from stackproof.spec.errors import UsageError


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """p -= lr·(m̂/(√v̂ + eps) + weight_decay·p) in place, after m and v have taken up the gradient;
    `step` counts from 1.

    Contiguous float32 tensors, of one device, the lists in the same order. Equals
    `torch.optim.AdamW` to float32 rounding. Raises UsageError for other tensors or numbers out of
    range. Oracle: `stackproof.kernels.reference.adamw`. Source: arXiv:1711.05101.
    """
    if step < 1 or lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
        got = f"step {step}, lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}"
        raise UsageError(
            "adamw: numbers out of range",
            value=got,
            allowed="step from 1, betas in [0, 1), the others at least 0",
        )
    lists = {
        "parameters": parameters,
        "gradients": gradients,
        "first_moments": first_moments,
        "second_moments": second_moments,
    }
    tensor_list.check("adamw", **lists)
    if not parameters:
        return
    launch.require(
        "adamw",
        {f"{name}[{i}]": x for name, xs in lists.items() for i, x in enumerate(xs)},
        (torch.float32,),
    )
    table = tensor_list.blocks(tuple(p.numel() for p in parameters), parameters[0].device)
    beta1, beta2 = betas
    numbers = (
        lr / (1 - beta1**step),
        math.sqrt(1 - beta2**step),
        1 - beta1,
        1 - beta2,
        1 - lr * weight_decay,
        eps,
    )
    if table.n:
        with launch.on(parameters[0]):
            where = [tensor_list.addresses(xs) for xs in lists.values()]
            update[(table.n,)](
                *where,
                table.tensor,
                table.first,
                table.count,
                *numbers,
                tensor_list.BLOCK,
                num_warps=8,
                **launch.OPTIONS,
            )


# ---- kernel


@triton.jit
def update(
    parameters, gradients, first_moments, second_moments, tensor, first, count,
    step_size, root_correction, new1, new2, kept, eps, E: tl.constexpr,
):  # fmt: skip
    """One block of one parameter."""
    block = tl.program_id(0)
    i = tl.load(tensor + block)
    at_E = tl.load(first + block) + tl.arange(0, E)
    inside_E = at_E < tl.load(count + i)
    p_E = tl.load(parameters + i).to(tl.pointer_type(tl.float32)) + at_E
    m_E = tl.load(first_moments + i).to(tl.pointer_type(tl.float32)) + at_E
    v_E = tl.load(second_moments + i).to(tl.pointer_type(tl.float32)) + at_E
    g_E = tl.load(
        tl.load(gradients + i).to(tl.pointer_type(tl.float32)) + at_E, mask=inside_E, other=0.0
    )
    old_m_E, old_v_E = (
        tl.load(m_E, mask=inside_E, other=0.0),
        tl.load(v_E, mask=inside_E, other=0.0),
    )
    new_m_E = old_m_E + (g_E - old_m_E) * new1
    new_v_E = old_v_E + (g_E * g_E - old_v_E) * new2
    change_E = step_size * new_m_E / (tl.sqrt_rn(new_v_E) / root_correction + eps)
    tl.store(m_E, new_m_E, mask=inside_E)
    tl.store(v_E, new_v_E, mask=inside_E)
    tl.store(p_E, tl.load(p_E, mask=inside_E, other=0.0) * kept - change_E, mask=inside_E)
