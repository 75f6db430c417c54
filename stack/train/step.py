"""One optimizer step, top to bottom in the order of the algorithm."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from stackproof.contracts.conditions import require
from stackproof.data.reader import Batch
from stackproof.model import moe
from stackproof.spec.errors import DataError
from stackproof.train import losses
from stackproof.train import optimizer as opt
from stackproof.train.schedule import lr_at
from stackproof.train.state import TrainState

MAX_OVERFLOW_RETRIES = 24


@dataclass(frozen=True)
class StepReport:
    """What one update measured. Norms are global L2; `grad_norm` is before clipping,
    `clipped_grad_norm` is left after the update.

    `group_lrs` is what the optimizer's groups held, `expert_shares` the share of choices by layer
    and expert, `sample_ids` the windows that it learned from.
    """

    step: int
    loss_nats: float
    grad_norm: float
    clipped_grad_norm: float
    lr: float
    group_lrs: dict[str, float]
    n_valid_tokens: int
    changed_tensor_frac: float
    overflow_retries: int
    expert_shares: tuple[tuple[float, ...], ...] = ()
    sample_ids: tuple[int, ...] = ()

    @property
    def applied(self) -> bool:
        """Whether the optimizer moved: never on a loss or gradient that is not finite."""
        return losses.is_finite(self.loss_nats, self.grad_norm)


def backward(state: TrainState, batch: Batch, n_valid: int, n_tokens: int) -> Tensor:
    """Forward and backward of one micro-batch.
    Its loss is divided by `n_valid`, its balance term by `n_tokens`: counts of the whole step.

    Returns the micro-batch's summed loss in nats, shape (), detached.
    """
    with state.autocast():
        x_BTD, report = state.features(*on_device(batch, state.device))
        nats = losses.linear_cross_entropy_sum(
            x_BTD, state.model.head_weight, batch.labels.to(state.device, non_blocking=True)
        )
    objective = (
        nats / n_valid + losses.balance_term(report.loads, state.model.balance_weight) / n_tokens
    )
    state.scaler.scale(objective).backward()
    state.loads.append(report.loads)
    return nats.detach()


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """What the model takes of a batch: its ids, and where documents are kept apart (ids, no cache,
    document ids).
    """
    ids_BT = batch.input_ids.to(device, non_blocking=True)
    documents_BT = getattr(batch, "document_ids", None)
    return (
        (ids_BT,)
        if documents_BT is None
        else (ids_BT, None, documents_BT.to(device, non_blocking=True))
    )


def on_host(*tensors: Tensor) -> list[tuple[float, ...]]:
    """The values of tensors of any shape, one transfer from their device for all."""
    values = iter(torch.cat([t.flatten().double() for t in tensors]).tolist())
    return [tuple(islice(values, t.numel())) for t in tensors]


@require(lambda batches: len(batches) >= 1, "a step has at least one micro-batch")
def accumulate(state: TrainState, batches: Sequence[Batch]) -> tuple[float, int]:
    """Gradients of the mean loss over all valid labels of all micro-batches, left unscaled in
    `.grad`; expert loads in `state.loads`.

    Returns (mean loss in nats, number of valid labels). Raises DataError if no label is valid.
    """
    n_valid = sum(losses.count_valid(b.labels) for b in batches)
    if n_valid == 0:
        raise DataError(
            "no label of this step is valid, so there is nothing to learn",
            value="0 valid labels",
            next_step="check the label mask",
        )
    state.optimizer.zero_grad(set_to_none=True)
    state.loads.clear()
    n_tokens = sum(b.input_ids.numel() for b in batches)
    total_nats = sum(backward(state, b, n_valid, n_tokens) for b in batches)
    state.scaler.unscale_(state.optimizer)
    return float(total_nats) / n_valid, n_valid


@dataclass(frozen=True)
class Gradients:
    """What a step knows of its gradients before it moves: `norm` is global L2, shape (), on the
    device, and `grad_norm` its value.
    """

    loss_nats: float
    n_valid_tokens: int
    norm: Tensor
    grad_norm: float
    overflow_retries: int

    @property
    def finite(self) -> bool:
        """Whether loss and norm are numbers."""
        return losses.is_finite(self.loss_nats, self.grad_norm)


def finite_gradients(state: TrainState, batches: Sequence[Batch]) -> Gradients:
    """`accumulate`, again at a lower loss scale as long as gradients overflow, some times.
    Loss or norm may be no number all the same.

    The scale waits for its next update, which is the caller's.
    """
    for retries in range(MAX_OVERFLOW_RETRIES):
        loss_nats, n_valid = accumulate(state, batches)
        norm = opt.global_norm(opt.gradients(state.model))
        found = Gradients(loss_nats, n_valid, norm, float(norm), retries)
        last = retries == MAX_OVERFLOW_RETRIES - 1
        if (
            losses.is_finite(found.grad_norm)
            or not state.scaler.is_enabled()
            or not losses.is_finite(loss_nats)
            or last
        ):
            break
        state.scaler.update()
    return found


def apply_gradients(state: TrainState, grads: list[Tensor], norm: Tensor) -> None:
    """Clip, move, and what follows an update.
    `grads` stay behind as the optimizer had them, for whoever measures them.
    """
    opt.clip_gradients(grads, norm, state.cfg.optim.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.model.after_update(state.loads)


def train_step(state: TrainState, batches: Sequence[Batch]) -> StepReport:
    """One update. A non-finite loss or gradient leaves parameters untouched; an fp16 overflow of
    gradients is retried at a lower scale.
    """
    step = state.step + 1
    scheduled = partial(
        lr_at, step, schedule=state.cfg.schedule, max_steps=state.cfg.train.max_steps
    )
    opt.set_lr(state.optimizer, lambda peak: scheduled(peak=peak))
    found = finite_gradients(state, batches)
    grads = opt.gradients(state.model)
    if found.finite:
        apply_gradients(state, grads, found.norm)
    else:
        state.scaler.update()  # it holds that gradients were unscaled, and these are dropped
    shares = [load_E / load_E.sum() for load_E in moe.totals(state.loads)]
    (clipped,), (changed,), *expert_shares = on_host(
        opt.global_norm(grads), state.probe.changed_frac(), *shares
    )
    state.step = step
    state.tokens_seen += sum(b.input_ids.numel() for b in batches)
    lr, group_lrs = scheduled(peak=state.cfg.optim.lr), opt.group_lrs(state.optimizer)
    ids = tuple(i for b in batches for i in b.sample_ids)
    measured = (
        found.loss_nats,
        found.grad_norm,
        clipped,
        lr,
        group_lrs,
        found.n_valid_tokens,
        changed,
        found.overflow_retries,
    )
    return StepReport(step, *measured, tuple(expert_shares), ids)


def nonfinite_parts(model: nn.Module) -> dict[str, list[str]]:
    """Names of parameters and gradients that hold a NaN or infinity."""
    return {
        "parameters": [n for n, p in model.named_parameters() if not bool(p.isfinite().all())],
        "gradients": [
            n
            for n, p in model.named_parameters()
            if p.grad is not None and not bool(p.grad.isfinite().all())
        ],
    }
