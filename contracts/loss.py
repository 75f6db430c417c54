"""Gates of the loss: hand-computed values, and a gradient that does not
depend on how a batch is cut.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from stackproof.contracts.gate import Verdict, decide, decides, failed

IGNORE = -100


# Softmax does not feel a key bias where positions are not rotated: that gradient is rounding alone,
# measured at 2e-11 of the whole one, while the least that carries anything was 6e-5 of it.
ROUNDING_FRAC = 1e-6
# Sums over all tokens that nearly cancel keep the rounding of their terms: the gradients of
# differential attention's λ, a millionth of the whole, differ by up to 2.9e-4 of themselves, which
# is 6.2e-10 of the whole, as the order of the rows does.
CANCELLED_FRAC = 5e-5


def gradient_errors(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], least_frac: float = ROUNDING_FRAC
) -> dict[str, float]:
    """‖got − wanted‖ / ‖wanted‖ by name, in float64; infinity for what is absent or not a number.

    A tensor is held against no less than `least_frac` of the norm of all `wanted` together.
    """
    least = least_frac * math.hypot(*(float(g.double().norm()) for g in wanted.values()))
    errors = {}
    for name, gradient in wanted.items():
        off = float((got[name].double() - gradient.double()).norm()) if name in got else math.inf
        scale = max(float(gradient.double().norm()), least)
        error = off / scale if scale else (0.0 if off == 0 else math.inf)
        errors[name] = error if error == error else math.inf
    return errors


@decides("loss.golden")
def golden(
    limits: SimpleNamespace, *, cross_entropy_sum, micro_batch_nats, ignore_index: int = IGNORE
) -> Verdict:
    """The loss equals values worked out by hand, from logits and through the whole micro-step.

    `cross_entropy_sum(logits_BTV, labels_BT)` is the stack's loss. `micro_batch_nats(logits_BTV,
    input_ids_BT, labels_BT)` sends the same numbers through the real backward path with a model
    that returns these logits, and gives the reported mean.
    """
    # Three positions over V=4 with logits ln of (1,2,3,4)/10: −log p = ln(10/k) for label k−1.
    row = torch.log(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    logits = row.expand(1, 3, 4).clone()
    logits[0, 1] = logits[0, 1].roll(1)
    labels = torch.tensor([[0, 0, 2]])
    by_hand = math.log(10 / 1) + math.log(10 / 4) + math.log(10 / 3)
    errors = {"sum": abs(float(cross_entropy_sum(logits, labels)) - by_hand)}

    masked = torch.tensor([[0, ignore_index, 2]])
    errors["masked"] = abs(
        float(cross_entropy_sum(logits, masked)) - (math.log(10) + math.log(10 / 3))
    )

    padded = torch.cat([logits, torch.full((1, 5, 4), 3.0)], dim=1)
    padding = torch.cat([labels, torch.full((1, 5), ignore_index)], dim=1)
    errors["padding"] = abs(float(cross_entropy_sum(padded, padding)) - by_hand)

    # The same probabilities from logits that are not normalised: whatever is made of the log
    # normaliser must not be in the loss.
    errors["shifted"] = abs(float(cross_entropy_sum(logits + 3.0, labels)) - by_hand)

    ids = torch.tensor([[3, 0, 0]])
    errors["micro_step"] = abs(micro_batch_nats(logits, ids, labels) - by_hand / 3)
    errors["micro_step_masked"] = abs(
        micro_batch_nats(logits, ids, masked) - (math.log(10) + math.log(10 / 3)) / 2
    )
    worst = max(errors, key=lambda k: errors[k] if math.isfinite(errors[k]) else math.inf)
    ok = all(e <= limits.abs_error_max for e in errors.values())
    return decide(
        ok,
        f"the loss differs from the value worked out by hand ({worst})",
        abs_error=errors[worst],
        worst=worst,
    )


@decides("loss.partition-equivalence")
def partition_equivalence(
    limits: SimpleNamespace, *, gradient_of, ragged_batch, eval_mode=True
) -> Verdict:
    """One batch, its micro-batches of unequal token counts, its permuted rows and a
    repeated call give one gradient.

    `gradient_of(list of (input_ids_BT, labels_BT)) -> (mean nats, dict name → gradient)` is the
    stack's own accumulation with dropout off; `ragged_batch` is (input_ids, labels) with ≥ 4 rows
    and a different number of valid labels per row.
    """
    ids, labels = ragged_batch
    valid = (labels != IGNORE).sum(dim=1)
    if len(ids) < 4 or len(set(valid.tolist())) < len(ids):
        return failed("the batch given to the gate is not ragged", rows=len(ids))
    whole_nats, whole = gradient_of([(ids, labels)])
    order = torch.arange(len(ids)).roll(1)
    partitions = {
        "rows one by one": [(ids[i : i + 1], labels[i : i + 1]) for i in range(len(ids))],
        "one and the rest": [(ids[:1], labels[:1]), (ids[1:], labels[1:])],
        "rows permuted": [(ids[order], labels[order])],
        "the same call again": [(ids, labels)],
    }
    errors, loss_errors, worst_tensor = {}, {}, {}
    for name, parts in partitions.items():
        nats, grads = gradient_of(parts)
        per_tensor = gradient_errors(grads, whole, CANCELLED_FRAC)
        worst_tensor[name] = max(per_tensor, key=per_tensor.get)
        errors[name], loss_errors[name] = (
            per_tensor[worst_tensor[name]],
            abs(nats - whole_nats) / abs(whole_nats),
        )
    worst = max(errors, key=errors.get)
    n_valid = int(valid.sum())
    scale_error = _scale_error(gradient_of, ids, labels, whole)
    ok = (
        errors[worst] <= limits.rel_error_max
        and max(loss_errors.values()) <= limits.rel_error_max
        and scale_error <= limits.rel_error_max
    )
    return decide(
        ok,
        f"the gradient depends on the partition: {worst} ({worst_tensor[worst]})",
        rel_error=max(errors[worst], scale_error),
        loss_rel_error=max(loss_errors.values()),
        partition=worst,
        n_valid=n_valid,
    )


def _scale_error(gradient_of, ids, labels, whole) -> float:
    """Repeating every row must leave the mean's gradient as it is;
    a missing division doubles it.
    """
    _, doubled = gradient_of([(ids, labels), (ids, labels)])
    return max(gradient_errors(doubled, whole, CANCELLED_FRAC).values())


@decides("loss.own-batch")
def own_batch(
    limits: SimpleNamespace, *, own_step: Callable[[], tuple[float, Sequence[tuple], Callable]]
) -> Verdict:
    """The mean loss that a step reports on the run's own rows, whole and as they are packed, is the
    one its logits give in float64.

    `own_step()` accumulates one step of drawn batches with dropout off and gives (its mean loss in
    nats, (input_ids_BT, labels_BT, document_ids_BT or None) of every micro-batch, the model's
    logits (B, T, V) by ids and document ids).
    """
    reported, parts, logits_of = own_step()
    nats = n_valid = n_rows = 0
    with torch.no_grad():
        for batch in parts:
            for ids_T, labels_T, own_T in zip(
                *(batch if batch[2] is not None else (*batch[:2], [None] * len(batch[0])))
            ):
                log_p_TV = (
                    logits_of(ids_T[None], None if own_T is None else own_T[None])[0]
                    .cpu()
                    .double()
                    .log_softmax(-1)
                )
                kept_T = labels_T != IGNORE
                nats -= float(log_p_TV[kept_T].gather(1, labels_T[kept_T, None]).sum())
                n_valid, n_rows = n_valid + int(kept_T.sum()), n_rows + 1
    mean = nats / max(n_valid, 1)
    error = abs(reported - mean) / max(mean, 1e-30)
    text = (
        f"a step on {n_rows} rows of {parts[0][0].shape[1]} tokens reports {reported:.6g} nats, "
        f"its logits give {mean:.6g}"
    )
    return decide(
        error <= limits.rel_error_max and n_valid > 0,
        text,
        rel_error=error,
        rows=n_rows,
        n_valid=n_valid,
    )


@decides("loss.nan-visible")
def nan_visible(limits: SimpleNamespace, *, poisoned_step) -> Verdict:
    """One number that is not one, in one of two micro-batches,
    shows in the step's loss or gradient norm and moves nothing.

    `poisoned_step(which) -> (report, moved)` makes one whole train step; the report has
    `loss_nats`, `grad_norm` and `applied`.
    """
    hidden = moved = 0
    for which in (0, 1):
        report, weights_moved = poisoned_step(which)
        hidden += math.isfinite(report.loss_nats) and math.isfinite(report.grad_norm)
        moved += bool(weights_moved or report.applied)
    ok = hidden <= limits.hidden_max and moved <= limits.moved_max
    return decide(
        ok,
        f"a NaN in one of two micro-batches: hidden {hidden} times, weights moved {moved} times",
        hidden=hidden,
        moved=moved,
    )
