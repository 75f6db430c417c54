"""Sizes for comparing kernels, by operation and kind of device.

B rows, N query heads, K key/value heads, T tokens, H head width, R rows (positions), D features, M
outputs, F inner features, V vocabulary
"""

import torch

from stackproof.contracts.kernel_call import Case, Layout
from stackproof.kernels.table import Operation

# For a CPU: shapes a and b of benchmarks/training.py, and one of a larger model.
LINEAR = {"cpu": ((4096, 128, 384), (4096, 256, 768), (2048, 1024, 1024))}  # R, D, M
LINEAR["cuda"] = ((8192, 768, 2304), (16384, 1024, 2816), (16384, 4096, 4096))
ATTENTION = {  # B, N, K, T, H
    "cpu": ((16, 4, 4, 256, 32), (8, 8, 2, 512, 32), (2, 16, 4, 1024, 64)),
    "cuda": ((16, 12, 12, 1024, 64), (8, 16, 4, 2048, 64), (4, 32, 8, 2048, 128)),
}
# R, D, V
HEAD = {
    "cpu": ((4096, 128, 512), (4096, 256, 32000)),
    "cuda": ((8192, 768, 50304), (16384, 2048, 32768)),
}
# R, D
NORM = {"cpu": ((4096, 128), (2048, 1024)), "cuda": ((8192, 768), (16384, 1024), (16384, 4096))}
# R, F
SWIGLU = {"cpu": ((4096, 384), (2048, 2816)), "cuda": ((8192, 2048), (16384, 2816), (16384, 11008))}


def cases(op: Operation, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The calls of an operation for comparing its kernels."""

    def case(**arguments: object) -> Case:
        return Case(op.name, arguments, device)

    def dense(*shape: int, of: torch.dtype = dtype) -> Layout:
        return Layout(shape, torch.empty(shape, device="meta").stride(), of)

    def heads(B: int, N: int, T: int, H: int) -> Layout:
        """In the layout of a projection's output: (B, T, N, H) in memory."""
        return Layout((B, N, T, H), (T * N * H, H, N * H, 1), dtype)

    match op.name:
        case "linear":
            return [case(x=dense(R, D), weight_MD=dense(M, D)) for R, D, M in LINEAR[device.type]]
        case "attention":
            return [
                case(
                    q_BNTH=heads(B, N, T, H),
                    k_BKSH=heads(B, K, T, H),
                    v_BKSH=heads(B, K, T, H),
                    **seen,
                )
                for B, N, K, T, H in ATTENTION[device.type]
                for seen in ({}, {"window": T // 4})
            ]
        case "rms_norm":
            return [
                case(
                    x_BTD=dense(1, R, D),
                    weight_D=dense(D, of=torch.promote_types(dtype, torch.float32)),
                    eps=1e-5,
                )
                for R, D in NORM[device.type]
            ]
        case "rope":
            return [
                case(x_BNTH=heads(B, N, T, H), **dict(zip(("cos", "sin"), tables(T, H, device))))
                for B, N, _, T, H in ATTENTION[device.type]
            ]
        case "swiglu":
            return [
                case(gate_BTF=dense(1, R, F), up_BTF=dense(1, R, F)) for R, F in SWIGLU[device.type]
            ]
        case "linear_cross_entropy":
            return [
                case(
                    x_RD=dense(R, D),
                    weight_VD=dense(V, D),
                    labels_R=torch.arange(R, device=device) % V,
                )
                for R, D, V in HEAD[device.type]
            ]
    raise AssertionError(f"no sizes for {op.name}")


def tables(T: int, H: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of T positions, (T, H/2) float32."""
    angle_TJ = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, H, 2) / H)
    return angle_TJ.cos().to(device), angle_TJ.sin().to(device)
