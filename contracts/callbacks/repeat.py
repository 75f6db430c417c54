"""The gradient of a step as each rank computes it alone, to compare with the reduced one.

Gradients are compared by sketches: linear maps to a few numbers, the same on all ranks, so that the
sketch of a sum is the sum of sketches and no gradient is sent.

P parameters, S numbers of a sketch, R ranks
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks.probe import logits_of, untouched
from stackproof.contracts.callbacks.reading import Reading
from stackproof.contracts.events import StepRepeated
from stackproof.contracts.loss import CANCELLED_FRAC

MAX_RANKS = 64
PERIOD, CHUNK = 2**14, 2**22
FUSED = "the loss is fused with the head, so that its gradient cannot be computed alone"
NO_LOSS = "no cross-entropy could be read off the gradient of a rank"
# Weights of tokens are read off gradients: see the limits of loss.logit-gradient.
READ_ERROR, HALF_READ_ERROR = 5e-3, 0.02
COMPARED_ABOVE = 1e-4  # of an error, below which no explanation is sought
# A wrong reduction is a combination of the gradients of the ranks, to far less than its error.
EXPLAINED_FRAC = 0.1


def sketch_size(world_size: int) -> int:
    """Numbers of a sketch: so many that the gradients of all ranks are far from spanning it."""
    return max(64, 4 * 2 ** math.ceil(math.log2(world_size)))


def sketch(tensor: Tensor, n: int) -> Tensor:
    """(S,) float64 on the CPU: the sum of entries with fixed random signs, by place modulo `n`."""
    signs = torch.randint(2, (PERIOD,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    signs, total = signs.to(tensor.device), 0.0
    for piece in tensor.detach().reshape(-1).split(CHUNK):
        padded = nn.functional.pad(piece, (0, -len(piece) % PERIOD)).view(-1, PERIOD)
        total = total + (padded.double() * signs).sum(0)
    return total.view(-1, n).sum(0).cpu()


@dataclass(frozen=True)
class Call:
    """One forward pass, so that it can be made again with the same random numbers."""

    module: nn.Module
    args: tuple
    kwargs: Mapping[str, Any]
    cpu: Tensor
    devices: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> "Call":
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        devices = torch.cuda.get_rng_state_all() if on_gpu else []
        return cls(module, args, kwargs, torch.get_rng_state(), devices)

    def again(self) -> Any:
        """The output of the same pass."""
        torch.set_rng_state(self.cpu)
        if self.devices:
            torch.cuda.set_rng_state_all(self.devices)
        return self.module(*self.args, **self.kwargs)


class StepRepeat:
    """Computes the gradient of this rank's own rows again, from the gradients at its logits, while
    `wanted`. Micro-step by micro-step, after each backward pass, so that memory is there.
    """

    def __init__(self, model: nn.Module, n: int):
        self.model, self.n, self.wanted, self.unknown = model, n, False, ""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = map(list, zip(*named))
        self._own = torch.zeros(len(named), n, dtype=torch.float64)
        self._open: list[tuple[Call, Tensor, torch.dtype | None]] = []

    def add(
        self, call: Call, gradient: Tensor, head: Tensor | None, autocast: torch.dtype | None
    ) -> None:
        """A gradient has reached the logits of a pass."""
        if head is not None:
            self.unknown = FUSED
        else:
            self._open.append((call, gradient.detach(), autocast))

    def settle(self) -> None:
        """Repeat the passes whose gradients came. Changes neither gradients nor random state. An
        error of a pass ends the comparison and not the training.
        """
        waiting, self._open = self._open, []
        for call, gradient, autocast in waiting:
            device = gradient.device.type
            typed = torch.autocast(device, autocast) if autocast else nullcontext()
            try:
                with untouched(self.model), torch.enable_grad():
                    with typed:
                        logits = logits_of(call.again())
                    found = torch.autograd.grad(
                        logits, self.parameters, gradient.to(logits.dtype), allow_unused=True
                    )
                self._own += self._sketches(found)
            except Exception as e:
                # Such as too little memory, or a model that counts its calls.
                first_line = next(iter(str(e).splitlines()), "")
                error = f"{type(e).__name__}: {first_line}"
                self.unknown = f"a pass could not be made again: {error}"

    def end(self, factor: float) -> dict[str, Tensor]:
        """The sketches (P, S) of this rank's own gradient, and of the reduced one times `factor`.
        The next step is not repeated.
        """
        self.settle()
        reduced = self._sketches([p.grad for p in self.parameters]) * factor
        own, self._own = self._own, torch.zeros_like(self._own)
        self.wanted = False
        return {"own": own, "reduced": reduced}

    def _sketches(self, gradients: Sequence[Tensor | None]) -> Tensor:
        none = torch.zeros(self.n, dtype=torch.float64)
        return torch.stack([none if g is None else sketch(g, self.n) for g in gradients])


def weights_of(readings: Sequence[Reading]) -> dict[str, Any]:
    """What the readings of one rank's step show about the weight of its tokens: the mean weight,
    three counts of tokens by which a trainer may divide, and whether values are in half precision.
    """
    weights = [w for r in readings for w in r.weights]
    counts = [sum(getattr(r, k) for r in readings) for k in ("n_expected", "n_learned", "n_labels")]
    return {
        "weight": sum(weights) / len(weights) if weights else math.nan,
        "counts": counts,
        "half": any(r.half for r in readings),
    }


def compare_weights(
    found: Sequence[Mapping[str, Any]], mean_of_ranks: bool
) -> tuple[float, str, float]:
    """(how far a token's weight in the gradient of all ranks is from 1/N, relative; of which rank;
    the share with which gradients of ranks are reduced). Errors within what a reading rounds are 0.
    NaN where no weight could be read. With `mean_of_ranks` each rank divides by its own tokens, as
    its trainer declares.
    """
    n_ranks = len(found)
    holds = [rank for rank in range(n_ranks) if found[rank]["counts"][1] > 0]
    weights = torch.tensor([found[rank]["weight"] for rank in holds], dtype=torch.float64)
    if not holds or weights.isnan().any():
        return math.nan, "", 1.0
    counts = torch.tensor([one["counts"] for one in found], dtype=torch.float64)
    totals = counts[holds] * n_ranks if mean_of_ranks else counts.sum(0).expand(len(holds), -1)
    # The reduction is a mean or a sum, and the trainer divides by one of the counts: what fits.
    shares = torch.tensor([1 / n_ranks, 1.0], dtype=torch.float64)
    off = ((weights[:, None] * totals)[:, :, None] * shares - 1).abs().flatten(1)
    best = int(off.mean(0).argmin())
    error, rank = off[:, best].max(0)
    allowed = HALF_READ_ERROR if any(one["half"] for one in found) else READ_ERROR
    where = f"the tokens of rank {holds[int(rank)]}"
    return float(error) if error > allowed else 0.0, where, float(shares[best % len(shares)])


def weights_compared(
    step: int, found: Sequence[Mapping[str, Any]], mean_of_ranks: bool
) -> StepRepeated:
    """The weights of tokens on all ranks, as an event."""
    error, where, _ = compare_weights(found, mean_of_ranks)
    if math.isnan(error):
        return StepRepeated(step, 0, {}, "", {}, NO_LOSS)
    return StepRepeated(step, len(found), {"gradient": error}, where, {})


def step_repeated(
    step: int, names: Sequence[str], found: Sequence[Mapping[str, Any]], mean_of_ranks: bool
) -> StepRepeated:
    """The reduced gradients of all ranks, compared with the mean or the sum of what each has
    computed on its own rows, whichever gives tokens the weight that is due.
    """
    error, where, share = compare_weights(found, mean_of_ranks)
    reasons = [one["unknown"] for one in found if one["unknown"]]
    if reasons or math.isnan(error):
        return StepRepeated(step, 0, {}, "", {}, next(iter(reasons), NO_LOSS))
    own_RPS = torch.stack([one["own"] for one in found])
    reduced_RPS = torch.stack([one["reduced"] for one in found])
    due_PS = own_RPS.sum(0) * share
    scale_P = due_PS.norm(dim=1).clamp_min(float(CANCELLED_FRAC * due_PS.norm())).clamp_min(1e-300)
    off_P = (reduced_RPS - due_PS).norm(dim=2).amax(0) / scale_P
    bad = [p for p in range(len(names)) if not off_P[p] <= COMPARED_ABOVE]
    strange = [p for p in bad if not _is_combination(own_RPS[:, p], reduced_RPS[:, p], off_P[p])]
    if strange and strange == bad and not error:
        reason = (
            f"the gradient of {names[bad[0]]} is off by {float(off_P[bad[0]]):.2g}, and has parts "
            "that do not come from the logits of any rank"
        )
        return StepRepeated(step, 0, {}, "", {}, reason)
    judged = [p for p in range(len(names)) if p not in strange]
    worst = max(judged, key=lambda p: float(off_P[p]), default=None)
    if worst is not None and float(off_P[worst]) >= error:
        error, where = float(off_P[worst]), names[worst]
    return StepRepeated(step, max(1, len(judged)), {"gradient": error}, where, {})


def _is_combination(own_RS: Tensor, reduced_RS: Tensor, error: Tensor) -> bool:
    """Whether every rank's reduced gradient of a parameter is a combination of what the ranks have
    computed, as it is where a reduction is wrong and nothing else.
    """
    if int((own_RS.abs().sum(0) > 0).sum()) < 4 * len(own_RS):
        return False
    fitted = torch.linalg.lstsq(own_RS.T, reduced_RS.T, driver="gelsd").solution
    left_R = (own_RS.T @ fitted - reduced_RS.T).norm(dim=0)
    return bool((left_R <= EXPLAINED_FRAC * error * reduced_RS.norm(dim=1)).all())
