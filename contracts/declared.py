"""What a declared architecture says about weights: their names and shapes, and how to draw some
under which each of them shows.

D d_model, Q width of all query heads, K width of all key/value heads, H head_dim, S width of a
normalised head, F d_ff, E experts, V vocab
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(a: Mapping[str, Any], vocab_size: int) -> Shapes:
    """Names and shapes (out, in) of everything a checkpoint of the resolved `model` section holds,
    selection biases included.
    """
    d = a["d_model"]
    shapes: Shapes = {"embed.weight": (vocab_size, d)}
    if a["positions"]["kind"] == "learned":
        shapes["positions.weight"] = (a["max_seq_len"], d)
    for layer in range(a["n_layers"]):
        parts = {
            "attention_norm": _norm(a),
            "attention": _attention(a),
            "ffn_norm": _norm(a),
            "ffn": _feedforward(a),
        }
        if chosen_depth(a, layer):
            parts["depth.router"] = {"weight": (1, d), "bias": (1,)}
        for part, own in parts.items():
            shapes |= {f"layers.{layer}.{part}.{name}": shape for name, shape in own.items()}
    shapes |= {f"final_norm.{name}": shape for name, shape in _norm(a).items()}
    return shapes if a["tied_head"] else shapes | {"head.weight": (vocab_size, d)}


def chosen_depth(a: Mapping[str, Any], layer: int) -> bool:
    """Whether `layer` (from 0) stands behind a gate."""
    return a["depth"]["kind"] == "mixture-of-depths" and (layer + 1) % a["depth"]["every"] == 0


def chooses(a: Mapping[str, Any]) -> bool:
    """Whether routers choose experts or tokens, so that content decides which
    tokens are computed together.
    """
    return a["ffn"]["kind"] == "moe" or hard_capacity(a)


def hard_capacity(a: Mapping[str, Any]) -> bool:
    return a["depth"]["kind"] == "mixture-of-depths" and a["depth"]["gate"]["kind"] == "hard"


def _norm(a: Mapping[str, Any]) -> Shapes:
    d = a["d_model"]
    return {"weight": (d,), "bias": (d,)} if a["norm"]["kind"] == "layernorm" else {"weight": (d,)}


def _attention(a: Mapping[str, Any]) -> Shapes:
    declared, d, h = a["attention"], a["d_model"], a["head_dim"]
    q, kv, halves = a["n_heads"] * h, a["n_kv_heads"] * h, declared["kind"] == "differential"
    shapes: Shapes = {
        "q.weight": (q, d),
        "k.weight": (kv, d),
        "v.weight": (kv, d),
        "out.weight": (d, q),
    }
    if declared["qkv_bias"]:
        shapes |= {"q.bias": (q,), "k.bias": (kv,), "v.bias": (kv,)}
    if declared["out_bias"]:
        shapes["out.bias"] = (d,)
    if declared["qk_norm"]:
        shapes |= dict.fromkeys(("q_norm.weight", "k_norm.weight"), (h // 2 if halves else h,))
    if halves and declared["form"] == "paper":
        shapes |= dict.fromkeys(("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"), (h // 2,)) | {
            "head_norm.weight": (h,)
        }
    if halves and declared["form"] == "scalar":
        shapes["lambda_weight"] = (1,)
    return shapes


def _feedforward(a: Mapping[str, Any]) -> Shapes:
    ffn = a["ffn"]
    if ffn["kind"] != "moe":
        return _expert(a, ffn)
    shapes: Shapes = {"router.weight": (ffn["n_experts"], a["d_model"])}
    if ffn["balance"]["kind"] == "selection-bias":
        shapes["selection_bias"] = (ffn["n_experts"],)
    for e in range(ffn["n_experts"]):
        shapes |= {
            f"experts.{e}.{name}": shape for name, shape in _expert(a, ffn["expert"]).items()
        }
    return shapes


def _expert(a: Mapping[str, Any], declared: Mapping[str, Any]) -> Shapes:
    d, f = a["d_model"], a["d_ff"]
    if declared["kind"] == "swiglu":
        return {"gate.weight": (f, d), "up.weight": (f, d), "down.weight": (d, f)}
    return {"up.weight": (f, d), "down.weight": (d, f)} | (
        {"up.bias": (f,), "down.bias": (d,)} if declared["bias"] else {}
    )


def initial_law(name: str, a: Mapping[str, Any]) -> tuple[str, float]:
    """("normal", spread about 0) or ("constant", value) of a parameter at step 0.

    What a branch adds to the residual stream is drawn so narrow that all 2·n_layers branches
    together are as wide as the embedding (GPT-2, sec. 2.3); λ of differential attention begin as in
    arXiv:2410.05258, the single one at a half.
    """
    match kind_of(name).split("."):
        case [*_, last, "weight"] if last.endswith("norm"):
            return "constant", 1.0
        case [*_, "bias"]:
            return "constant", 0.0
        case [*_, "lambda_weight"]:
            return "constant", 0.5
        case [*_, ("lambda_q1" | "lambda_k1" | "lambda_q2" | "lambda_k2")]:
            return "normal", 0.1
        case ["attention", "out", _] | ["ffn", "down", _] | ["down", _]:
            return "normal", a["init_std"] / math.sqrt(2 * a["n_layers"])
    return "normal", a["init_std"]


# --- weights under which everything shows ---------------------------------------------------------


def kind_of(name: str) -> str:
    """What a parameter is in every layer and expert: its name without their numbers."""
    return re.sub(r"\b(layers|experts)\.\d+\.", "", name)


def drawn_weights(shapes: Shapes, draw: torch.Generator) -> dict[str, Tensor]:
    """Weights float64 under which features, scores and choices are of order 1, gains are not 1,
    and biases are not 0.
    """
    return {name: _drawn(kind_of(name), shape, draw) for name, shape in shapes.items()}


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
        case _:
            return noise / math.sqrt(shape[1])


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
