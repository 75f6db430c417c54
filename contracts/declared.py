"""What a declared architecture requires of weights, and weights under which each of them shows.

Names, shapes and initial laws come from spec/architecture.py. The model does not read that table:
`model.init-law` and `model.reference-differential` compare it with what the model built by itself.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from stackproof.spec.architecture import Buffer
from stackproof.spec.resolved_model import tensors

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(a: Mapping[str, Any], vocab_size: int) -> Shapes:
    """Names and shapes (out, in) of all that a checkpoint of the resolved `model` section holds.

    Selection biases are included. Raises IntegrityError for a variant without an entry in the
    table.
    """
    return {t.name: t.shape for t in tensors(a, vocab_size)}


def initial_laws(a: Mapping[str, Any], vocab_size: int) -> dict[str, tuple[str, float]]:
    """Law of every parameter at step 0: ("normal", spread about 0) or ("constant", value)."""
    held = tensors(a, vocab_size)
    parameters = (t for t in held if not isinstance(t.weight, Buffer))
    return {t.name: t.weight.law.resolve(a) for t in parameters}


def chooses(a: Mapping[str, Any]) -> bool:
    """Whether routers choose experts or tokens, so that content decides which
    tokens are computed together.
    """
    return a["ffn"]["kind"] == "moe" or hard_capacity(a)


def hard_capacity(a: Mapping[str, Any]) -> bool:
    return a["depth"]["kind"] == "mixture-of-depths" and a["depth"]["gate"]["kind"] == "hard"


# --- weights under which everything shows ---------------------------------------------------------


def kind_of(name: str) -> str:
    """What a parameter is in every layer and expert: its name without their numbers."""
    return re.sub(r"\b(layers|experts)\.\d+\.", "", name)


def drawn_weights(shapes: Shapes, draw: torch.Generator) -> dict[str, Tensor]:
    """Weights float64 under which features, scores and choices are of order 1, gains are not 1,
    and biases are not 0.
    """
    return {name: _drawn(kind_of(name), shape, draw) for name, shape in shapes.items()}


def contextual_weights(a: Mapping[str, Any], vocab_size: int) -> dict[str, Tensor]:
    """Weights under which the next token depends on the context, and not, as at step 0 or under a
    wide tied head, on the last token alone.
    """
    weights = drawn_weights(parameter_shapes(a, vocab_size), torch.Generator().manual_seed(51))
    return weights | {
        "embed.weight": 0.3 * weights["embed.weight"],
        "final_norm.weight": 3 * weights["final_norm.weight"],
    }


def _drawn(kind: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=draw, dtype=torch.float64)
    match kind.split("."):
        case [*_, "lambda_weight"]:
            return 0.5 + 0.2 * noise
        case [*_, ("lambda_q1" | "lambda_k1" | "lambda_q2" | "lambda_k2")]:
            return noise * (0.5 / math.sqrt(shape[0])) ** 0.5
        case [*_, "selection_bias"]:
            return noise * 0.5 / shape[0]
        case ["embed", _]:
            return noise
        case ["positions", _]:
            return 0.5 * noise
        case ["depth", _, "bias"]:
            return 1 + 0.3 * noise
        case [*_, "bias"]:
            return 0.3 * noise
        case [*_, "weight"] if len(shape) == 1:
            return 1 + 0.3 * noise
        case _ if len(shape) == 2:
            return noise / math.sqrt(shape[1])
    raise ValueError(
        f"contracts/declared.py has no draw for the vector {kind}; add one to `_drawn`"
    )


def silent_kinds(a: Mapping[str, Any]) -> set[str]:
    """Kinds of parameters that rightly change nothing under this declaration.

    Without rotation a bias on keys adds the same to every score of a query. A window of one token
    has nothing to weigh. Where every expert is chosen, no bias changes the selection.
    """
    silent, ffn = set(), a["ffn"]
    if a["positions"]["kind"] == "learned" and not a["attention"]["qk_norm"]:
        silent.add("attention.k.bias")
    if a["attention"]["window"] == 1:
        parts = (
            "q.weight q.bias k.weight k.bias q_norm.weight k_norm.weight lambda_q1 lambda_k1 "
            "lambda_q2 lambda_k2"
        )
        silent |= {f"attention.{part}" for part in parts.split()}
    if ffn["kind"] == "moe" and ffn["top_k"] == ffn["n_experts"]:
        silent.add("ffn.selection_bias")
    return silent


def kinds(names: Iterable[str]) -> list[str]:
    """Every kind once, in order of first appearance."""
    return list(dict.fromkeys(kind_of(name) for name in names))
