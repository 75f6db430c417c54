"""One call of an operation, for any of its kernels and its reference: forward and backward on the
same numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import product
from typing import Any

import torch
from torch import Tensor

from stackproof.kernels.table import Operation

PIECE_NUMBERS = 2**20  # in the largest float64 tensor of the reference


@dataclass(frozen=True)
class Layout:
    """Shape, strides and dtype of a tensor whose numbers are drawn again."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def draw(self, device: torch.device, chance: torch.Generator) -> Tensor:
        """Normal numbers in this layout; dimensions of stride 0 repeat one number."""
        single = [1 if step == 0 else n for n, step in zip(self.shape, self.stride)]
        numbers = torch.empty_strided(single, self.stride, dtype=self.dtype, device=device)
        return numbers.copy_(torch.randn(single, generator=chance)).expand(self.shape)


@dataclass(frozen=True)
class Case:
    """One call of an operation by argument name. Differentiable tensors are held as a `Layout`.

    `autocast` is the precision of torch.autocast around the call, None outside of it.
    """

    operation: Operation
    arguments: Mapping[str, Any]
    device: torch.device
    autocast: torch.dtype | None = None
    seed: int = 0

    @property
    def shapes(self) -> str:
        """Text with the shapes and dtypes of the tensors, and the given numbers."""
        tensors = {n: a for n, a in self.arguments.items() if isinstance(a, Layout)}
        sizes = [f"{n.split('_')[0]} {'×'.join(map(str, a.shape))}" for n, a in tensors.items()]
        numbers = [
            f"{n} {self.arguments[n]:g}" for n in ("window", "softcap") if self.arguments.get(n)
        ]
        dtypes = sorted({str(a.dtype).removeprefix("torch.") for a in tensors.values()})
        return f"{', '.join(sizes + numbers)}, {'/'.join(dtypes)}"

    @property
    def half(self) -> bool:
        """Whether it computes in half precision."""
        dtypes = {a.dtype for a in self.arguments.values() if isinstance(a, Layout)}
        return self.autocast is not None or bool(dtypes & {torch.float16, torch.bfloat16})

    def draw(self) -> dict[str, Any]:
        """Every argument, with numbers drawn for each layout. Weights are scaled so that outputs
        have the size of inputs.
        """
        chance = torch.Generator().manual_seed(self.seed)
        drawn = {
            n: a.draw(self.device, chance) if isinstance(a, Layout) else a
            for n, a in self.arguments.items()
        }
        return drawn | {
            n: x * x.shape[-1] ** -0.5
            for n, x in drawn.items()
            if n.startswith("weight") and x.ndim == 2
        }

    def leaves(self, drawn: Mapping[str, Any]) -> dict[str, Tensor]:
        """The differentiable inputs, as fresh leaves."""
        return {
            n: drawn[n].detach().requires_grad_()
            for n, a in self.arguments.items()
            if isinstance(a, Layout)
        }

    def weighed(self, outputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs that have a gradient, and their cotangents."""
        pairs = [(o, g) for o, g in zip(outputs, self.cotangents(outputs)) if o.requires_grad]
        return [o for o, _ in pairs], [g for _, g in pairs]

    def cotangents(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The cotangents of the outputs: normal numbers, 1 for a sum."""
        chance = torch.Generator().manual_seed(self.seed + 1)
        return [
            (torch.randn(o.shape, generator=chance) if o.ndim else torch.ones(())).to(
                o.device, o.dtype
            )
            for o in outputs
        ]

    def call(
        self, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """The outputs of a function, in the precision of the case."""
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            outputs = _bound(self.operation, function, arguments)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def results(self, function: Callable[..., Any], drawn: Mapping[str, Any]) -> dict[str, Tensor]:
        """Outputs and gradients of a function on drawn arguments, by name."""
        leaves = self.leaves(drawn)
        outputs = self.call(function, drawn | leaves)
        torch.autograd.backward(*self.weighed(outputs))
        return _named([o.detach() for o in outputs], leaves)

    def expected(self, drawn: Mapping[str, Any]) -> dict[str, Tensor]:
        """Outputs and gradients of the reference in float64, computed in pieces to bound the
        memory.
        """
        rounded = (
            self.autocast if self.operation.name in ("linear", "linear_cross_entropy") else None
        )
        drawn = {n: _wide(x, rounded) if isinstance(x, Tensor) else x for n, x in drawn.items()}
        leaves = self.leaves(drawn)
        outputs: list[Tensor] = []
        cotangents: list[Tensor] = []
        for piece in _pieces(self.operation.name, drawn | leaves):
            found = _bound(self.operation, self.operation.reference(), piece.arguments)
            found = found if isinstance(found, tuple) else (found,)
            if not outputs:
                outputs = [o.new_zeros(piece.out_shape if o.ndim else ()) for o in found]
                cotangents = self.cotangents(tuple(outputs))
            torch.autograd.backward(found, [g[piece.out] if g.ndim else g for g in cotangents])
            for whole, part in zip(outputs, found):
                (whole[piece.out] if whole.ndim else whole).add_(part.detach())
        return _named(outputs, leaves)


def _wide(x: Tensor, rounded: torch.dtype | None) -> Tensor:
    """Numbers in float64, first rounded as autocast rounds them."""
    return (x if rounded is None else x.to(rounded)).double() if x.is_floating_point() else x


def _bound(op: Operation, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call by position up to the keyword-only arguments: kernels may name their tensors
    differently.
    """
    kinds = signature(op.reference()).parameters
    positional = [
        arguments[n]
        for n, p in kinds.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD and n in arguments
    ]
    return function(
        *positional,
        **{
            n: arguments[n] for n, p in kinds.items() if p.kind is p.KEYWORD_ONLY and n in arguments
        },
    )


def _named(outputs: list[Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {f"output {i}" if i else "the output": o for i, o in enumerate(outputs)}
    return found | {f"the gradient of {n.split('_')[0]}": x.grad for n, x in leaves.items()}


# ---- pieces of a call that the reference computes separately


@dataclass(frozen=True)
class Piece:
    """Arguments of one piece, the place of its output in the whole output, and the shape of
    that.
    """

    arguments: dict[str, Any]
    out: tuple[slice, ...] = ()
    out_shape: tuple[int, ...] = ()


def _pieces(name: str, arguments: dict[str, Any]) -> Iterator[Piece]:
    yield from _heads(arguments) if name == "attention" else _rows(name, arguments)


def _rows(name: str, arguments: dict[str, Any]) -> Iterator[Piece]:
    """Some rows of every argument that has them."""
    first = next(iter(arguments.values()))
    weight = next((x for n, x in arguments.items() if n.startswith("weight") and x.ndim == 2), None)
    width = max(
        x.numel() // max(1, len(first))
        for x in arguments.values()
        if isinstance(x, Tensor) and len(x) == len(first)
    )
    if weight is not None:
        width = max(width, first.numel() // max(1, len(first) * first.shape[-1]) * len(weight))
    shape = (*first.shape[:-1], len(weight)) if name == "linear" else first.shape
    held = {
        n
        for n, x in arguments.items()
        if n.startswith(("weight", "bias")) or not isinstance(x, Tensor)
    }
    held |= {
        n
        for n in ("cos", "sin")
        if n in arguments and (arguments[n].ndim == 2 or len(arguments[n]) != len(first))
    }
    for rows in _steps(len(first), PIECE_NUMBERS // max(1, width)):
        yield Piece({n: x if n in held else x[rows] for n, x in arguments.items()}, (rows,), shape)


def _heads(arguments: dict[str, Any]) -> Iterator[Piece]:
    """Some queries of some key/value heads of some rows.
    Queries t … of the last T see no later key than their own.
    """
    q, k, v = list(arguments.values())[:3]
    (B, N, T, _), (K, S) = q.shape, k.shape[1:3]
    G, mask, start = N // K, arguments.get("mask_B1TS"), arguments.get("start_BS")
    n_queries = min(T, max(1, PIECE_NUMBERS // (G * S)))
    n_heads = min(K, max(1, PIECE_NUMBERS // (G * S * n_queries)))
    n_rows = max(1, PIECE_NUMBERS // (G * S * n_queries * n_heads)) if n_heads == K else 1
    for rows, heads, queries in product(
        _steps(B, n_rows), _steps(K, n_heads), _steps(T, n_queries)
    ):
        keys, mine = (
            slice(0, S if mask is not None else S - T + queries.stop),
            slice(heads.start * G, heads.stop * G),
        )
        names = list(arguments)[:3]
        piece = arguments | dict(
            zip(names, (q[rows, mine, queries], k[rows, heads, keys], v[rows, heads, keys]))
        )
        if mask is not None:
            piece["mask_B1TS"] = mask.expand(B, *mask.shape[1:])[rows, :, queries, keys]
        if start is not None:
            piece["start_BS"] = start[rows, keys]
        yield Piece(piece, (rows, mine, queries), q.shape)


def _steps(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + max(1, size), n)) for i in range(0, n, max(1, size))]
