"""Takes numbers at the source inside a trainer that is not ours: hooks on the model's forward, on
its logits' gradient and on the update.

B batch, T tokens, V vocab
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from stackproof.contracts.callbacks import batch, probe
from stackproof.contracts.callbacks.movement import Movement
from stackproof.contracts.callbacks.reading import (
    IGNORE,
    Reading,
    Unread,
    read,
    resolve,
    silent_places,
)
from stackproof.contracts.callbacks.session import Session, timed
from stackproof.contracts.events import (
    GradientsAccumulated,
    LossMeasured,
    ModuleModes,
    RatesUsed,
    Started,
    StepTaken,
)

BETWEEN_EVERY = 16  # updates; after an evaluation it is asked as well
# backward passes without an update, from where on it is asked at each power of
# two whether one will come
WAITING = 32


@dataclass
class Facts:
    """What only the trainer can say.
    `max_grad_norm` is None where unknown and infinity where nothing is clipped.

    `ticks_per_update`: the schedule ticks once an update; otherwise it may tick more rarely.
    `loss_scale()` is what a loss scaler multiplies with. `absolute`: the weight of a token can be
    told, as in one process. `warmup_steps` are those of the learning rate.
    """

    pad_id: int | None = None
    eos_id: int | None = None
    smoothing: float = 0.0
    max_grad_norm: float | None = None
    clips_values: bool = False
    ticks_per_update: bool = False
    loss_scale: Callable[[], float] = lambda: 1.0
    absolute: bool = True
    warmup_steps: int = 12


@dataclass
class _Step:
    """What one optimizer step has shown so far."""

    unread: list[Unread] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    losses: list[Tensor | float] = field(default_factory=list)
    stale: Tensor | None = None
    lost: Tensor | int = 0
    passes: int = 0
    judged: bool = False


def _fitting(value: Any, ids: Tensor) -> Tensor | None:
    """A tensor with one entry for each id, on the device of the ids; None for anything else."""
    return value.to(ids.device) if isinstance(value, Tensor) and value.shape == ids.shape else None


class Watch:
    """Hooks on one model and one optimizer; shows events to a session.
    `phase()` is training, evaluation or empty (look away).

    `heads` are the modules whose call gives the logits; the outermost that is called counts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        session: Session,
        *,
        scheduler: Any = None,
        facts: Facts | None = None,
        step: int = 0,
        phase: Callable[[], str] = lambda: "training" if torch.is_grad_enabled() else "evaluation",
        update_hooks: bool = True,
    ):
        self.model, self.optimizer, self.session, self.scheduler = (
            model,
            optimizer,
            session,
            scheduler,
        )
        self.facts, self.step, self.phase = facts or Facts(), step, phase
        self.batch: Mapping[str, Any] = {}
        self.updates, self.first_tick = 0, getattr(scheduler, "last_epoch", 0)
        self.max_length = probe.max_length_of(model)
        embedding = probe.embedding_of(model)
        self.embedding_rows = int(embedding.weight.shape[0]) if embedding is not None else 0
        self.drops = bool(probe.dropout_names(model))
        self._now, self._inside, self._busy, self._in_backward, self._repeat_due = (
            _Step(),
            None,
            False,
            False,
            True,
        )
        self._turn, self._evaluated, self._asks_between = 0, False, update_hooks
        self._head_output: Tensor | None = None
        self._hidden: Tensor | None = None
        self._parameters, self._movement = list(model.parameters()), Movement(model)
        self._norms_after: Tensor | None = None
        self._rates: tuple[float, ...] = ()
        if self.facts.max_grad_norm is None:
            session.forget("optim.clip-norm", "the largest gradient norm was not told")
        if any(p.requires_grad and p.element_size() < 4 for p in self._parameters):
            session.forget(
                "optim.clip-norm",
                "gradients are held in half precision, whose norm is rounded by more than the "
                "limit",
            )
        if scheduler is None:
            session.forget("schedule.rate", "no schedule was told")
        self._most_passes = 0
        session.observe(
            Started(step, {"warmup_steps": self.facts.warmup_steps, "random_loss_nats": math.inf})
        )
        self._handles = self._attach(update_hooks)

    def _attach(self, update_hooks: bool) -> list:
        # looking is no part of a compiled graph
        shy = torch.compiler.disable if "torch._dynamo" in sys.modules else lambda hook: hook
        candidates = [
            self.model,
            *(m for m in self.model.children() if not isinstance(m, (nn.Embedding, nn.ModuleList))),
        ]
        handles = [
            m.register_forward_pre_hook(shy(self._before), with_kwargs=True) for m in candidates
        ]
        handles += [m.register_forward_hook(shy(self._after), with_kwargs=True) for m in candidates]
        if (head := probe.head_of(self.model)) is not None:
            handles.append(head.register_forward_hook(shy(self._head)))
        base = getattr(self.model, getattr(self.model, "base_model_prefix", "") or "-", None)
        if isinstance(base, nn.Module):
            handles.append(base.register_forward_hook(shy(self._base)))
        if update_hooks:
            handles.append(self.optimizer.register_step_pre_hook(lambda *_: self.before_update()))
        handles.append(
            self.optimizer.register_step_post_hook(
                lambda *_: self.after_update(also_before=not update_hooks)
            )
        )
        return handles

    def detach(self) -> None:
        """Take all hooks off; harmless when done twice."""
        while self._handles:
            self._handles.pop().remove()

    def restored(self, step: int) -> None:
        """The weights were just loaded from a checkpoint of this step."""
        self.step = step
        self._movement.settle()

    def tell_loss(self, loss: Tensor | float) -> None:
        """The loss of one micro-step as the trainer has it, before any logger."""
        self._now.losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    # --- forward ----------------------------------------------------------------------------------

    @timed
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._busy or self._inside not in (None, module) or not (phase := self.phase()):
            return
        named = probe.arguments_of(module, args, kwargs)
        ids = probe.ids_of(named)
        if ids is None:
            return
        self._inside, self._head_output = module, None
        if phase == "evaluation":
            self._evaluated = True
            wrong = tuple(n for n, m in self.model.named_modules() if m.training)
            self.session.observe(ModuleModes(self.step, phase, wrong))
            if (
                not module.training
                and named.get("past_key_values") is None
                and ids.shape[1] >= batch.SHORT
            ):
                told = batch.read_rows(ids, _fitting(named.get(probe.MASK), ids))
                self.session.observe(batch.rows_seen(told, step=self.step, phase=phase))
            return
        if not torch.is_grad_enabled():
            return
        places = (
            named.get("position_ids") if isinstance(named.get("position_ids"), Tensor) else None
        )
        mask, labels = self._mask_and_labels(ids, named)
        # a mask of another shape tells of padding what is not read here
        unread = mask is None and named.get(probe.MASK) is not None
        pad_id, places = (None, None) if unread else (self.facts.pad_id, places)
        told = batch.read(ids, mask, labels, places, pad_id=pad_id, eos_id=self.facts.eos_id)
        facts = {"max_length": self.max_length, "embedding_rows": self.embedding_rows}
        self.session.observe(batch.batch_seen(told, step=self.step + 1, **facts))
        self.session.observe(batch.rows_seen(told.rows, step=self.step + 1, phase=phase))
        idle = self.drops and not module.training
        self.session.observe(ModuleModes(self.step + 1, phase, ("",) if idle else ()))

    def _mask_and_labels(
        self, ids: Tensor, named: Mapping[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mask and labels of a batch: those the model is given, else those of
        the batch the trainer drew.
        """
        mask, labels = named.get(probe.MASK), probe.labels_of(named)
        own = probe.ids_of(self.batch) if self.batch else None
        if own is not None and own.shape == ids.shape and torch.equal(own.to(ids.device), ids):
            mask = self.batch.get(probe.MASK) if mask is None else mask
            labels = probe.labels_of(self.batch) if labels is None else labels
        return _fitting(mask, ids), _fitting(labels, ids)

    def _base(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._inside is not None:
            self._hidden = getattr(output, "last_hidden_state", None)

    def _head(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._inside is not None and isinstance(output, Tensor):
            self._head_output = output

    @timed
    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._busy or self._inside is not module:
            return
        self._inside, logits = None, probe.logits_of(output)
        hidden, self._hidden = self._hidden, None
        if self.phase() == "evaluation":
            if logits is not None:
                self._ask_twice(module, args, kwargs, logits)
            return
        sources = self._sources(logits, hidden)
        if not (torch.is_grad_enabled() and sources):
            return
        self._repeat_due = True
        named = probe.arguments_of(module, args, kwargs)
        ids = probe.ids_of(named)
        if ids is None or ids.shape != sources[0][0].shape[:2]:
            return
        mask, labels = self._mask_and_labels(ids, named)
        place = {
            "ids": ids,
            "silent": silent_places(ids, mask, labels, self.facts.pad_id, self.facts.eos_id),
            "done": False,
        }
        place["labels"] = None if labels is None else (labels != IGNORE).sum()
        loss = probe.loss_of(output)
        place["loss"] = None if loss is None else loss.detach()
        for tensor, weight in sources:
            tensor.register_hook(
                lambda g, tensor=tensor.detach(), weight=weight: self._backward(
                    place, tensor, g, weight
                )
            )

    def _sources(
        self, logits: Tensor | None, hidden: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Where a loss can be read: (tensor, weight of the head it has yet to pass).
        The first that gets a gradient counts.

        The logits; the head's own output, where the trainer has converted it and the loss may have
        been taken before that; and where there are no logits, as with a fused loss, what enters the
        head, if the head is a matrix and nothing comes after it.
        """
        raw, self._head_output = self._head_output, None
        if logits is None:
            head, config = probe.head_of(self.model), probe.config_of(self.model)
            bent = any(
                getattr(config, name, None)
                for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
            )
            plain = isinstance(head, nn.Linear) and head.bias is None and not bent
            return (
                [(hidden, head.weight.detach())]
                if plain and hidden is not None and hidden.requires_grad
                else []
            )
        if not logits.requires_grad:
            return []
        if raw is None or raw is logits or raw.shape != logits.shape or not raw.requires_grad:
            return [(logits, None)]
        same = torch.equal(raw.detach().float(), logits.detach().float())
        return [(logits, None), (raw, None)] if same else [(logits, None)]

    @torch.no_grad()
    def _ask_twice(self, module: nn.Module, args: tuple, kwargs: dict, logits: Tensor) -> None:
        """Once after each stretch of training: the same batch again, with other random numbers,
        gives the same logits.
        """
        if not self._repeat_due or kwargs.get("past_key_values") is not None:
            return
        self._repeat_due, self._busy = False, True
        try:
            with probe.random_kept():
                again = probe.logits_of(module(*args, **kwargs))
        finally:
            self._busy = False
        repeat = float((again.float() - logits.float()).abs().nan_to_num().max())
        self.session.observe(ModuleModes(self.step, "evaluation", (), repeat))

    # --- backward ---------------------------------------------------------------------------------

    @timed
    def _backward(self, place: dict, values: Tensor, gradient: Tensor, head: Tensor | None) -> None:
        if place["done"] or self._busy:
            return
        place["done"] = True
        if not self._in_backward:
            self._in_backward = True
            self._begin_pass()
            # once more, as a wrapper may average gradients in one of its own
            self._when_done(lambda: self._when_done(self._end_pass))
        told = {
            "scale": self.facts.loss_scale(),
            "smoothing": self.facts.smoothing,
            "n_labels": place["labels"],
            "loss": place["loss"],
        }
        self._turn += 1
        self._now.unread.append(
            read(
                values, gradient, place["ids"], place["silent"], head=head, turn=self._turn, **told
            )
        )

    def _begin_pass(self) -> None:
        norms, now = self._norms(), self._now
        if now.passes == 0:
            now.stale = norms
        elif self._norms_after is not None:
            now.lost = now.lost + (norms.nan_to_num() != self._norms_after.nan_to_num()).any()
        now.passes += 1
        if now.passes > WAITING and now.passes & (now.passes - 1) == 0:
            self.session.observe(
                GradientsAccumulated(self.step + 1, now.passes, 0.0, 0, 0.0, self._most_passes)
            )

    @staticmethod
    def _when_done(call: Callable[[], None]) -> None:
        """Call when the backward pass is over, after whatever asked for that before."""
        torch.autograd.Variable._execution_engine.queue_callback(call)

    @timed
    def _end_pass(self) -> None:
        self._in_backward = False
        self._norms_after = self._norms()

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """(P,) float64: the norm of each parameter's gradient, 0 where there is none;
        on the device of the first parameter.
        """
        home = self._parameters[0].device
        held = [(i, p.grad) for i, p in enumerate(self._parameters) if p.grad is not None]
        norms = torch.zeros(len(self._parameters), dtype=torch.float64, device=home)
        if held:
            places, gradients = zip(*held)
            found = torch._foreach_norm([g.detach() for g in gradients], 2, dtype=torch.float32)
            norms[list(places)] = torch.stack([n.to(home) for n in found]).double()
        return norms

    # --- update -----------------------------------------------------------------------------------

    @timed
    def before_update(self) -> None:
        """Everything that is known before weights move.
        Raises GateFailed in mode `raise`, so that a bad update never lands.
        """
        now = self._now
        if not now.judged:
            self._rates = tuple(float(g["lr"]) for g in self.optimizer.param_groups)
            self._tick = getattr(self.scheduler, "last_epoch", 0)
            self._movement.prepare(self.optimizer)
        if not now.passes or now.judged:
            return
        now.judged = True
        if self._asks_between and (self._evaluated or not (self.updates + 1) % BETWEEN_EVERY):
            self._evaluated = False
            self.session.observe(self._movement.between(self.step + 1))
        step, scale = self.step + 1, self.facts.loss_scale()
        lost = torch.as_tensor(now.lost).double().reshape(1)
        losses = [torch.as_tensor(x).double().reshape(1) for x in now.losses]
        now.readings, told = resolve(
            now.unread, [self._norms_after, self._norms(), now.stale, lost, *losses]
        )
        after, used, stale, lost, *losses = told
        norm, clipped = float(after.norm()) / scale, float(used.norm())
        finite = all(r.finite for r in now.readings)
        loss = float(sum(losses)) if losses else self._mean_nats()
        self.session.observe(self._step_taken(step, loss if finite else math.nan, norm, clipped))
        if not (finite and math.isfinite(norm)):
            return
        self._observe_loss(step)
        spread = self._factor_spread(after, used)
        self.session.observe(
            GradientsAccumulated(
                step, now.passes, float(stale.norm()), int(lost), spread, self._most_passes
            )
        )
        self._most_passes = max(self._most_passes, now.passes)

    def _step_taken(self, step: int, loss: float, norm: float, clipped: float) -> StepTaken:
        n = sum(r.n_expected for r in self._now.readings)
        maximum = math.inf if self.facts.max_grad_norm is None else self.facts.max_grad_norm
        return StepTaken(step, loss, norm, clipped, maximum, self._rates[0], n, n, 0, 0.0, 0.0, 0.0)

    def _mean_nats(self) -> float:
        nats = [x for r in self._now.readings for x in r.nats]
        return sum(nats) / len(nats) if nats else math.nan

    def _observe_loss(self, step: int) -> None:
        readings = self._now.readings
        offsets = [o for r in readings for o in r.offsets]
        wrong = [o for o in offsets if o != 1]
        learned, expected = sum(r.n_learned for r in readings), sum(r.n_expected for r in readings)
        weights = [w for r in readings for w in r.weights] or [math.nan]
        # What a loss leaves out beyond labels and mask, such as a prompt, is not ours to judge: N
        # is then what it does learn. A trainer may count the first label of each row, which no
        # logit predicts, as transformers 5.23 does for GPT-2 (26 of 28 on short rows).
        counts = (expected, learned, sum(r.n_labels for r in readings))
        n = min(counts, key=lambda n: abs(max(weights) * n - 1))
        self.session.observe(
            LossMeasured(
                step=step,
                n_learned=learned,
                n_judged=len(offsets),
                n_off_target=len(wrong),
                offset=max(set(wrong), key=wrong.count) if wrong else 1,
                n_masked_learned=sum(r.n_masked_learned for r in readings),
                weight_min=min(weights) * n,
                weight_max=max(weights) * n,
                mean_nats=self._mean_nats(),
                vocab_size=max((r.vocab_size for r in readings), default=0),
                absolute=self.facts.absolute,
            )
        )

    def _factor_spread(self, after: Tensor, used: Tensor) -> float:
        """How unequally tensors were scaled between the last backward pass and the update; 0 where
        values are clipped one by one.
        """
        seen = after > 1e-6 * after.norm()
        if self.facts.clips_values or not bool(seen.any()):
            return 0.0
        factors = used[seen] / after[seen]
        return (
            float((factors.max() - factors.min()) / factors.max())
            if float(factors.max()) > 0
            else 1.0
        )

    @timed
    def after_update(self, also_before: bool = False) -> None:
        """What the update moved, and at which rate."""
        if also_before:
            self.before_update()
        self.step, self.updates = self.step + 1, self.updates + 1
        self.session.steps = self.updates
        self.session.observe(self._movement.judge(self.step, self.optimizer, self._rates))
        if self.scheduler is not None and self._rates:
            self.session.observe(self._rates_used())
        self._now, self._norms_after = _Step(), None

    def close(self, skipped: bool = False) -> None:
        """Told by a trainer that says when a step is over: an update that never came moved nothing,
        one that was skipped is forgotten.
        """
        if not self._now.passes:
            return
        if skipped:
            self._now, self._norms_after = _Step(), None
        else:
            self.after_update()

    def _rates_used(self) -> RatesUsed:
        ticks, done = self._tick - self.first_tick, self.updates - 1
        if isinstance(self.scheduler, LambdaLR):
            at = self.step - 1 if self.facts.ticks_per_update else self._tick
            declared = [
                float(base * rule(at))
                for base, rule in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas)
            ]
        else:
            declared = (
                [float(lr) for lr in self.scheduler.get_last_lr()]
                if hasattr(self.scheduler, "get_last_lr")
                else []
            )
        return RatesUsed(self.step, _by_group(self._rates), _by_group(declared), ticks, done)


def _by_group(rates: Sequence[float]) -> dict[str, float]:
    return {f"group {i}": rate for i, rate in enumerate(rates)}
