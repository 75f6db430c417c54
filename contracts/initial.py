"""Gate of the weights at step 0: every parameter follows its declared law, in its own draws."""

import math
from collections.abc import Mapping
from types import SimpleNamespace

from torch import Tensor

from stackproof.contracts.declared import initial_laws
from stackproof.contracts.gate import Verdict, decide_all, decides, failed, worst, worst_at
from stackproof.contracts.model import table_error
from stackproof.contracts.subject import Subject

COMPARED = 2**16  # entries of two tensors that are compared


@decides("model.init-law")
def init_law(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Each parameter follows its law: mean and spread lie where a sample of its size must, or every
    entry is the declared constant.

    The laws are those of spec/architecture.py, which the model does not read. Draws are
    independent: neither two parameters nor two halves of one correlate; and they reach as far as
    normal ones do. Rotary tables equal a fresh computation, and buffers that checkpoints hold
    are 0.
    """
    model, a = subject.model.module, subject.declared.architecture
    parameters = dict(model.named_parameters())
    laws = initial_laws(a, subject.model.vocab_size)
    if odd := sorted(parameters.keys() ^ laws.keys()):
        return failed(
            f"parameters without a declared law, or the reverse: {', '.join(odd)}",
            undeclared=len(odd),
        )
    n_entries = sum(p.numel() for p in parameters.values())
    tensors = [*parameters.values(), *model.buffers()]
    infinite = sum(int((~t.isfinite()).sum()) for t in tensors if t.is_floating_point())
    if infinite:
        return failed("weights or buffers are not finite", not_finite=infinite)
    z = {name: _law_z(p.detach(), *laws[name]) for name, p in parameters.items()}
    where = worst_at(z)
    alike, pair = _likeness_z(
        {n: p.detach().flatten() for n, p in parameters.items() if laws[n][0] == "normal"}
    )
    held = [t for n, t in model.state_dict().items() if n not in parameters]
    tables_error = table_error(subject.model.rotary_tables, a)
    buffer_error = worst([tables_error, *(float(t.double().abs().max()) for t in held)])
    n_declared = subject.declared.n_parameters
    return decide_all(
        [
            not z[where] <= limits.z_max and f"{where} does not follow its declared law",
            not alike <= limits.z_max and f"{pair} hold the same draws",
            not buffer_error <= limits.buffer_abs_error_max
            and "rotary tables differ from a fresh computation, or a kept buffer is not 0",
            n_entries != n_declared and f"{n_entries} parameters, {n_declared} by the formula",
        ],
        z=z[where],
        worst=where,
        likeness_z=alike,
        buffer_abs_error=buffer_error,
        n_parameters=n_entries,
    )


def _law_z(values: Tensor, law: str, value: float) -> float:
    """How many standard errors mean, spread or reach of a sample lie from the declared law;
    infinite for a constant that is not met.

    Reach is the fourth moment, 3 for normal draws, and judged from below alone: uniform ones have
    1.8, and a few large draws weigh much.
    """
    if law == "constant":
        return 0.0 if bool((values == value).all()) else math.inf
    n, wide = values.numel(), values.double()
    of_mean = abs(float(wide.mean())) * math.sqrt(n) / value
    of_spread = abs(float(wide.square().mean().sqrt()) / value - 1) * math.sqrt(2 * n)
    of_reach = (3 - float((wide / value).pow(4).mean())) / math.sqrt(96 / n)
    return worst((of_mean, of_spread, of_reach))


def _likeness_z(draws: Mapping[str, Tensor]) -> tuple[float, str]:
    """(how many standard errors from 0 the correlation of two draws lies that are most alike,
    which). Beginnings are compared: of every tensor with that of the first and of the one before
    it, and of its two halves.
    """
    first, before = (next(iter(draws)),) * 2
    found: dict[str, float] = {}
    for name, values in draws.items():
        half = len(values) // 2
        found[f"two halves of {name}"] = _correlation_z(values[:half], values[half:])
        for other in {first, before} - {name}:
            found[f"{other} and {name}"] = _correlation_z(draws[other], values)
        before = name
    pair = worst_at(found)
    return found[pair], pair


def _correlation_z(a: Tensor, b: Tensor) -> float:
    """|correlation| of the beginnings of two samples about 0, in standard errors."""
    n = min(len(a), len(b), COMPARED)
    a, b = a[:n].double(), b[:n].double()
    return abs(float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))) * math.sqrt(n)
