"""Gate of traces: the traced forward is the untraced one, and a point is the value that it names.

B batch, T tokens, V vocab
"""

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.gate import Verdict, decide_all, decides, first_of, worst
from stackproof.contracts.subject import Subject

# Slots of a layer that are the output of one module, by its path in the layer.
MODULES = {
    "attention_norm": "attention_norm",
    "q": "attention.q",
    "k": "attention.k",
    "v": "attention.v",
    "q_norm": "attention.q_norm",
    "k_norm": "attention.k_norm",
    "attention_out": "attention",
    "ffn_norm": "ffn_norm",
    "ffn.gate": "ffn.gate",
    "ffn.up": "ffn.up",
    "ffn.out": "ffn",
    "router": "ffn.router",
    "resid_out": "",
}
LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@decides("model.traced")
def traced(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The logits of the traced forward are, bit for bit, those without tracing; the statistics of
    every point that is one module's output are those of a plain hook on that module.
    """
    found = subject.traced
    values: dict[str, tuple[float, float]] = {}
    handles = [
        found.model.get_submodule(path).register_forward_hook(_keep(values, name))
        for name in found.points
        if (path := module_of(name)) is not None
    ]
    try:
        logits_BTV = found.logits(torch.tensor([list(found.input_ids)]))
    finally:
        for handle in handles:
            handle.remove()
    largest = float((logits_BTV - found.traced_logits).abs().max())
    off = {
        name: worst(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(found.points[name], own))
        for name, own in values.items()
    }
    wrong = [name for name, error in off.items() if not error <= limits.statistic_rel_error_max]
    return decide_all(
        [
            not largest <= limits.logit_abs_max and f"tracing changes the logits by {largest:.3g}",
            list(found.input_ids) != list(found.declared_ids)
            and "other tokens were traced than those declared",
            bool(wrong) and f"{len(wrong)} points are not what they name: {first_of(wrong)}",
            not found.points and "no point was traced",
        ],
        logit_abs=largest,
        statistic_rel_error=worst(off.values(), 0.0),
        compared=len(values),
    )


def module_of(point: str) -> str | None:
    """Path of the module whose output a point is; None for every other point."""
    if point in ("final_norm", "logits"):
        return "final_norm" if point == "final_norm" else ""
    match = LAYER.fullmatch(point)
    if match is None or match[2] not in MODULES:
        return None
    return f"layers.{match[1]}.{MODULES[match[2]]}".rstrip(".")


def _keep(values: dict[str, tuple[float, float]], name: str) -> Any:
    """A hook that keeps the root mean square and the largest magnitude of an output."""

    def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        x = (output if isinstance(output, Tensor) else output[0]).detach().double()
        values[name] = float(x.square().mean().sqrt()), float(x.abs().max())

    return hook
