"""One optimizer step, top to bottom in the order of the algorithm."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stackproof.contracts.conditions import require
from stackproof.data.data_loader import Batch
from stackproof.distributed.communication import Communication
from stackproof.distributed.tensors import local_part
from stackproof.evaluate.bits_per_byte import Evaluation
from stackproof.evaluate.memorization import Memorization
from stackproof.model import moe
from stackproof.spec.errors import DataError
from stackproof.train import losses
from stackproof.train import optimizer as opt
from stackproof.train.schedule import lr_at
from stackproof.train.state import TrainState

MAX_OVERFLOW_RETRIES = 24


@dataclass(kw_only=True)
class StepReport:
    """All measurements of one step: the source of its log line and of the events for the gates.

    Norms are global L2; `grad_norm` is before clipping, `clipped_grad_norm` after the update.
    `group_lrs` are the learning rates held by the optimizer's groups, `expert_shares` the share of
    choices by layer and expert, `dropped_choice_fracs` those by layer that found no room in their
    expert, `sample_ids` the windows trained on. The loop adds `wall_s` and,
    after an evaluation, `evaluation` and `memorization`; a profiled step has its `communication`.
    """

    step: int
    loss_nats: float
    ema_loss_nats: float
    lr: float
    group_lrs: dict[str, float]
    grad_norm: float
    clipped_grad_norm: float
    changed_tensor_frac: float
    overflow_retries: int
    expert_shares: tuple[tuple[float, ...], ...]
    dropped_choice_fracs: tuple[float, ...]
    sample_ids: tuple[int, ...]
    epoch: int
    n_tokens: int
    n_valid_tokens: int
    tokens_seen: int
    wall_s: float = 0.0
    communication: Communication | None = None
    evaluation: Evaluation | None = None
    memorization: Memorization | None = None

    @property
    def applied(self) -> bool:
        """Whether the optimizer was stepped: never on a loss or gradient that is not finite."""
        return losses.is_finite(self.loss_nats, self.grad_norm)

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second of the step."""
        return self.n_tokens / self.wall_s

    def log_line(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        names = (
            "step loss_nats ema_loss_nats lr grad_norm clipped_grad_norm tokens_seen tokens_per_s "
            "epoch"
        ).split()
        line = {name: getattr(self, name) for name in names}
        if fracs := self.dropped_choice_fracs:
            line["dropped_choice_frac"] = max(fracs)
        if (profile := self.communication) is not None:
            line |= {
                "communication_frac": profile.communication_frac,
                "exposed_communication_frac": profile.exposed_frac,
            }
        if (val := self.evaluation) is not None:
            line |= {
                "val_loss_nats": val.loss_nats,
                "val_bits_per_byte": val.bits_per_byte,
                "val_stderr_nats": val.stderr_nats,
            }
        if (found := self.memorization) is not None:
            line |= {
                "passages": found.n_passages,
                "recited": found.n_recited,
                "matched_tokens": found.matched_tokens,
            }
        return line


def train_step(state: TrainState, batches: Sequence[Batch]) -> StepReport:
    """One update from the micro-batches of one step.
    A loss or gradient that is not finite leaves the parameters untouched.
    """
    # The rate is a function of the step number alone, so there is no scheduler to save or forget.
    step = state.step + 1
    scheduled_lr = partial(
        lr_at, step, schedule=state.cfg.schedule, max_steps=state.cfg.train.max_steps
    )
    opt.set_lr(state.optimizer, lambda peak: scheduled_lr(peak=peak))

    # fp16 gradients may overflow under a finite loss: lower the loss scale and compute them again.
    for retries in range(MAX_OVERFLOW_RETRIES):
        loss_nats, n_valid, n_tokens = accumulate(state, batches)
        grads = opt.gradients(state.model)
        norm = opt.global_norm(grads)
        grad_norm = float(norm)
        if retries == MAX_OVERFLOW_RETRIES - 1 or not overflowed(state, loss_nats, grad_norm):
            break
        state.scaler.update()

    # Check before the update: a single NaN in the gradients would destroy all weights.
    if losses.is_finite(loss_nats, grad_norm):
        apply_gradients(state, grads, norm)
    else:
        state.scaler.update()  # the scaler must forget that these gradients were unscaled

    # Every read of a GPU value waits for the device, so all that is reported is one transfer.
    shares = [load_E / load_E.sum() for load_E in moe.totals(state.loads)]
    (clipped,), (changed,), dropped_fracs, *expert_shares = on_host(
        opt.global_norm(grads), state.probe.changed_frac(), moe.dropped_fracs(state.loads), *shares
    )
    # Count last, since `step` counts finished updates.
    state.step = step
    state.tokens_seen += n_tokens
    state.update_ema(loss_nats)
    return StepReport(
        step=step,
        loss_nats=loss_nats,
        ema_loss_nats=state.ema_loss_nats,
        lr=scheduled_lr(peak=state.cfg.optim.lr),
        group_lrs=opt.group_lrs(state.optimizer),
        grad_norm=grad_norm,
        clipped_grad_norm=clipped,
        changed_tensor_frac=changed,
        overflow_retries=retries,
        expert_shares=tuple(expert_shares),
        dropped_choice_fracs=dropped_fracs,
        sample_ids=tuple(window for window, _, _ in state.drawn_by_all(batches).rows),
        epoch=batches[-1].epoch,
        n_tokens=n_tokens,
        n_valid_tokens=n_valid,
        tokens_seen=state.tokens_seen,
    )


class Accumulated(NamedTuple):
    """Mean loss, nats, and the counts of valid labels and of tokens, over all data ranks."""

    loss_nats: float
    n_valid: int
    n_tokens: int


@require(lambda batches: len(batches) >= 1, "a step has at least one micro-batch")
def accumulate(state: TrainState, batches: Sequence[Batch]) -> Accumulated:
    """Gradients of the mean loss over all valid labels of all data ranks, left unscaled in `.grad`;
    expert loads are left in `state.loads`. `batches` are those of this rank.

    Raises DataError if no label is valid.
    """
    n_valid, n_tokens, n_read = state.ranks.total(
        sum(losses.count_valid(b.labels) for b in batches),
        sum(b.input_ids.numel() for b in batches),
        sum(b.n_tokens for b in batches),
    )
    if n_valid == 0:
        raise DataError(
            "no label of this step is valid",
            value="0 valid labels",
            next_step="check the label mask",
        )
    state.optimizer.zero_grad(set_to_none=True)
    state.loads.clear()
    total_nats = 0.0
    for i, batch in enumerate(batches):
        state.ranks.reduce_gradients(state.model, now=i == len(batches) - 1)
        with state.autocast():
            x_BTD, report = state.features(*state.inputs(batch, batches[0]))
            labels_BT = batch.labels.to(state.device, non_blocking=True)
            nats = losses.linear_cross_entropy_sum(x_BTD, state.model.head_weight, labels_BT)
        # Divide by the counts of the whole step: else short micro-batches would weigh too much.
        balance = losses.balance_term(report.loads, state.model.balance_weight)
        state.scaler.scale(nats / n_valid + balance / n_read).backward()
        total_nats = total_nats + nats.detach()
        state.loads.append(report.loads)
    moe.add_over_ranks(state.loads, state.ranks.sum)
    state.scaler.unscale_(state.optimizer)
    return Accumulated(float(state.ranks.sum(total_nats)) / n_valid, n_valid, n_tokens)


def overflowed(state: TrainState, loss_nats: float, grad_norm: float) -> bool:
    """Whether fp16 gradients overflowed under a finite loss, so that a
    lower loss scale may help.
    """
    return (
        state.scaler.is_enabled()
        and losses.is_finite(loss_nats)
        and not losses.is_finite(grad_norm)
    )


def apply_gradients(state: TrainState, grads: list[Tensor], norm: Tensor) -> None:
    """Clip gradients, step optimizer and scaler, update expert biases.
    `grads` keeps the clipped values.
    """
    opt.clip_gradients(grads, norm, state.cfg.optim.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.model.after_update(state.loads)


def on_host(*tensors: Tensor) -> list[tuple[float, ...]]:
    """The values of tensors of any shape, in one transfer from their device."""
    values = iter(torch.cat([t.flatten().double() for t in tensors]).tolist())
    return [tuple(islice(values, t.numel())) for t in tensors]


def nonfinite_parts(model: nn.Module) -> dict[str, list[str]]:
    """Names of parameters and gradients that hold a NaN or infinity, of divided ones in the part of
    this rank: no collective operation, since one rank alone may call it.
    """
    parameters = list(model.named_parameters())
    return {
        "parameters": [n for n, p in parameters if not bool(local_part(p).isfinite().all())],
        "gradients": [
            n
            for n, p in parameters
            if p.grad is not None and not bool(local_part(p.grad).isfinite().all())
        ],
    }
