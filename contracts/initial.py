"""Gate of the weights at step 0: every parameter follows its declared law, in its own draws."""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from stackproof.contracts.declared import initial_laws
from stackproof.contracts.gate import Verdict, decide_all, decides, failed, worst, worst_at
from stackproof.contracts.model import table_error
from stackproof.contracts.subject import Subject

# Entries of each tensor that are compared with those of all others, and products of entries in all.
COMPARED, FEWEST, PRODUCTS = 2**14, 256, 2 * 10**10


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
    which). The beginnings of all pairs of tensors are compared, and the two halves of each.
    """
    n = len(draws)
    most = min(COMPARED, max(FEWEST, PRODUCTS // n**2))
    halves = {
        f"two halves of {name}": _beginnings(
            [values[: len(values) // 2], values[len(values) // 2 :]]
        )
        for name, values in draws.items()
    }
    found = {name: _correlation_z(both)[0] for name, both in halves.items()}
    names = list(draws)
    # Tensors of different lengths are compared over the shorter one.
    for length in sorted({min(len(v), most) for v in draws.values()}):
        own = [name for name in names if len(draws[name]) >= length]
        if len(own) > 1:
            z, i, j = _correlation_z(_beginnings([draws[name][:length] for name in own]))
            found[f"{own[i]} and {own[j]}"] = z
    pair = worst_at(found)
    return found[pair], pair


def _beginnings(values: Sequence[Tensor]) -> Tensor:
    """The beginnings of samples, each of norm 1: (N, n) float32."""
    n = min(COMPARED, *map(len, values))
    rows_Nn = torch.stack([v[:n].float() for v in values])
    return rows_Nn / rows_Nn.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _correlation_z(rows_Nn: Tensor) -> tuple[float, int, int]:
    """The largest |correlation| of two rows about 0, in standard errors, and their numbers."""
    z_NN = (rows_Nn @ rows_Nn.T).abs().fill_diagonal_(0.0) * math.sqrt(rows_Nn.shape[1])
    at = int(z_NN.nan_to_num(torch.inf).argmax())
    return float(z_NN.flatten()[at]), *divmod(at, len(rows_Nn))
