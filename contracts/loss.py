"""Gates of the loss: values worked out by hand, and a gradient that does not depend on how a batch
is cut into micro-batches.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from stackproof.contracts.gate import Verdict, decide, decides, failed, worst, worst_at
from stackproof.contracts.subject import MicroBatch, Model, Subject, Trainee, TraineeOptions

IGNORE = -100
LONGEST_ROW = 64
PIECE_NUMBERS = 2**22  # of a tensor, in float64 at a time


# Softmax does not feel a key bias where positions are not rotated: that gradient is rounding alone,
# measured at 2e-11 of the whole one, while the least that carries anything was 6e-5 of it.
ROUNDING_FRAC = 1e-6
# Sums over all tokens that nearly cancel keep the rounding of their terms: the gradients of
# differential attention's λ, a millionth of the whole, differ by up to 2.9e-4 of themselves, which
# is 6.2e-10 of the whole, as the order of the rows does.
CANCELLED_FRAC = 5e-5


def gradient_errors(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], least_frac: float = ROUNDING_FRAC
) -> dict[str, float]:
    """‖got − expected‖ / ‖expected‖ by name, in float64; infinity for what is absent, of another
    shape or not a number. The divisor is at least `least_frac` of the norm of all `expected`
    together.
    """
    norms = {name: _norm(g for (g,) in in_float64(x)) for name, x in expected.items()}
    least = least_frac * math.hypot(*norms.values())
    errors = {}
    for name, gradient in expected.items():
        off = math.inf
        if name in got and got[name].shape == gradient.shape:
            off = _norm(a - b for a, b in in_float64(got[name], gradient))
        scale = max(norms[name], least)
        error = off / scale if scale else (0.0 if off == 0 else math.inf)
        errors[name] = error if error == error else math.inf
    return errors


def in_float64(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors with an equal number of rows, in float64, some rows at a time."""
    rows = [torch.atleast_1d(x) for x in tensors]
    n = max(1, PIECE_NUMBERS * len(rows[0]) // max(1, rows[0].numel()))
    for piece in zip(*(x.split(n) for x in rows), strict=True):
        yield tuple(x.double() for x in piece)


def _norm(pieces: Iterable[Tensor]) -> float:
    return math.hypot(*(float(x.norm()) for x in pieces))


def random_rows(model: Model, n_rows: int, seed: int) -> MicroBatch:
    """Rows of random tokens, at most LONGEST_ROW long, and their next tokens as labels. No global
    random state is used.
    """
    length = min(model.max_length or LONGEST_ROW, LONGEST_ROW)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, model.vocab_size, (n_rows, length + 1), generator=draw)
    return MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


@decides("loss.golden")
def golden(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The loss equals values worked out by hand, from logits, and through accumulation with a model
    that answers with these logits.
    """
    training = subject.training
    # Three positions over V=4 with logits ln of (1,2,3,4)/10: −log p = ln(10/k) for label k−1.
    row = torch.log(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    logits = row.expand(1, 3, 4).clone()
    logits[0, 1] = logits[0, 1].roll(1)
    labels = torch.tensor([[0, 0, 2]])
    by_hand = math.log(10 / 1) + math.log(10 / 4) + math.log(10 / 3)
    errors = {"sum": abs(float(training.cross_entropy_sum(logits, labels)) - by_hand)}

    masked = torch.tensor([[0, IGNORE, 2]])
    by_hand_masked = math.log(10) + math.log(10 / 3)
    errors["masked"] = abs(float(training.cross_entropy_sum(logits, masked)) - by_hand_masked)

    padded = torch.cat([logits, torch.full((1, 5, 4), 3.0)], dim=1)
    padding = torch.cat([labels, torch.full((1, 5), IGNORE)], dim=1)
    errors["padding"] = abs(float(training.cross_entropy_sum(padded, padding)) - by_hand)

    # The same probabilities from logits that are not normalised: whatever is made of the log
    # normaliser must not be in the loss.
    errors["shifted"] = abs(float(training.cross_entropy_sum(logits + 3.0, labels)) - by_hand)

    ids = torch.tensor([[3, 0, 0]])
    errors["micro_step"] = abs(training.mean_nats(logits, ids, labels) - by_hand / 3)
    errors["micro_step_masked"] = abs(training.mean_nats(logits, ids, masked) - by_hand_masked / 2)
    where = worst_at(errors)
    ok = all(e <= limits.abs_error_max for e in errors.values())
    return decide(
        ok,
        f"the loss differs from the value worked out by hand ({where})",
        abs_error=errors[where],
        worst=where,
    )


@decides("loss.partition-equivalence")
def partition_equivalence(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """One batch, its micro-batches of unequal token counts, its permuted rows and a repeated call
    give one gradient, with dropout off.
    """
    batch = ragged_rows(subject.model)
    ids, labels = batch.input_ids, batch.labels
    valid = (labels != IGNORE).sum(dim=1)
    if len(set(valid.tolist())) < len(ids):
        return failed(
            f"rows of {ids.shape[1]} tokens are too short to differ in their number of labels"
        )
    trainee = subject.training.trainee(TraineeOptions(exact=True))
    trainee.model.eval()
    whole_nats, whole = _accumulated(trainee, [batch])
    order = torch.arange(len(ids)).roll(1)
    partitions = {
        "rows one by one": [MicroBatch(ids[i : i + 1], labels[i : i + 1]) for i in range(len(ids))],
        "one and the rest": [MicroBatch(ids[:1], labels[:1]), MicroBatch(ids[1:], labels[1:])],
        "rows permuted": [MicroBatch(ids[order], labels[order])],
        "the same call again": [batch],
    }
    errors, loss_errors, worst_tensor = {}, {}, {}
    for name, parts in partitions.items():
        nats, gradients = _accumulated(trainee, parts)
        per_tensor = gradient_errors(gradients, whole, CANCELLED_FRAC)
        worst_tensor[name] = worst_at(per_tensor)
        errors[name] = per_tensor[worst_tensor[name]]
        loss_errors[name] = abs(nats - whole_nats) / abs(whole_nats)
    partition = worst_at(errors)
    # Every row twice leaves the mean and its gradient as they are; a missing division doubles them.
    _, doubled = _accumulated(trainee, [batch, batch])
    scale_error = worst(gradient_errors(doubled, whole, CANCELLED_FRAC).values())
    rel_error = worst((errors[partition], scale_error))
    loss_rel_error = worst(loss_errors.values())
    return decide(
        worst((rel_error, loss_rel_error)) <= limits.rel_error_max,
        f"the gradient depends on the partition: {partition} ({worst_tensor[partition]})",
        rel_error=rel_error,
        loss_rel_error=loss_rel_error,
        partition=partition,
        n_valid=int(valid.sum()),
    )


def ragged_rows(model: Model) -> MicroBatch:
    """Five rows of random tokens with a different number of labels each."""
    batch = random_rows(model, 5, seed=71)
    labels = batch.labels.clone()
    for row in range(5):
        labels[row, : row * labels.shape[1] // 6] = IGNORE
    return MicroBatch(batch.input_ids, labels)


def _accumulated(
    trainee: Trainee, batches: Sequence[MicroBatch]
) -> tuple[float, dict[str, Tensor]]:
    """(mean loss in nats, gradients by name) of accumulation."""
    nats = trainee.accumulate(batches)
    named = trainee.model.named_parameters()
    return nats, {n: p.grad.detach().clone() for n, p in named if p.grad is not None}


@decides("loss.nan-visible")
def nan_visible(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """A NaN in one feature of the last module's output in one of two micro-batches, or in the
    gradient at it alone, shows in the step's loss or gradient norm and moves nothing.
    """
    hidden = moved = 0
    batches = [random_rows(subject.model, 1, seed) for seed in (72, 73)]
    for which, backward in ((0, False), (1, False), (0, True)):
        trainee = subject.training.trainee(TraineeOptions(exact=True))
        before = {n: t.clone() for n, t in trainee.model.state_dict().items()}
        with _nan_in_pass(_last_module(trainee, batches[0]), which, backward=backward):
            report = trainee.step(batches)
        hidden += math.isfinite(report.loss_nats) and math.isfinite(report.grad_norm)
        after = trainee.model.state_dict()
        moved += report.applied or any(not torch.equal(t, after[n]) for n, t in before.items())
    ok = hidden <= limits.hidden_max and moved <= limits.moved_max
    return decide(
        ok,
        f"a NaN in one of two micro-batches or in a gradient: hidden {hidden} times, weights moved "
        f"{moved} times",
        hidden=hidden,
        moved=moved,
    )


@torch.no_grad()
def _last_module(trainee: Trainee, batch: MicroBatch) -> nn.Module:
    """The module that runs last in a forward pass."""
    ran: list[nn.Module] = []
    leaves = [m for m in trainee.model.modules() if not any(m.children())]
    hooks = [m.register_forward_hook(lambda module, *_: ran.append(module)) for m in leaves]
    trainee.loss_sum(batch)
    for hook in hooks:
        hook.remove()
    return ran[-1]


@contextmanager
def _nan_in_pass(module: nn.Module, which: int, *, backward: bool) -> Iterator[None]:
    """One feature of a module's output, or with `backward` of the gradient at it, is NaN in its
    `which`-th forward pass, counted from 0.
    """
    n_passes = 0

    def with_nan(x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD.clone()
        x_BTD[0, -1, 0] = torch.nan
        return x_BTD

    def plant(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        nonlocal n_passes
        n_passes += 1
        if n_passes - 1 != which:
            return output
        if not backward:
            return with_nan(output)
        output.register_hook(with_nan)
        return output

    hook = module.register_forward_hook(plant)
    try:
        yield
    finally:
        hook.remove()
