"""Observes a trainer that is not ours: hooks on the model's forward pass, on the gradient at its
logits and on the update.

B batch, T tokens, V vocab
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks import probe
from stackproof.contracts.callbacks.gradients import GradientReader
from stackproof.contracts.callbacks.inputs import InputReader
from stackproof.contracts.callbacks.losses import LossPlace, LossReader
from stackproof.contracts.callbacks.movement import MovementTracker
from stackproof.contracts.callbacks.rank_watch import RankWatch
from stackproof.contracts.callbacks.rates import RateReader
from stackproof.contracts.callbacks.reading import IGNORE, is_closed, resolve, silent_places
from stackproof.contracts.callbacks.repeat import Call
from stackproof.contracts.callbacks.session import Session, timed
from stackproof.contracts.callbacks.settings import Trained, TrainerSettings
from stackproof.contracts.causality import difference
from stackproof.contracts.events import ModuleModes, RowHashes, Started, StepTaken

# All weights are compared after an evaluation, and at every update of this number.
COMPARED_EVERY = 16
# Operations between the head and the loss, by the names of configurations.
AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
Phase = Callable[[], str]


def phase_by_grad() -> str:
    """The phase of a forward pass, by whether gradients are on."""
    return "training" if torch.is_grad_enabled() else "evaluation"


class Watch:
    """One observed model and optimizer. Each reader measures one part of a step; their events go to
    the session. `phase()` is training, evaluation or empty, where nothing is to be observed.

    With `backward_in_step` the trainer runs the backward pass inside the optimizer's step, so that
    the step is judged after its update.
    """

    def __init__(
        self,
        trained: Trained,
        session: Session,
        settings: TrainerSettings,
        *,
        phase: Phase = phase_by_grad,
        backward_in_step: bool = False,
    ):
        self.trained, self.session, self.settings = trained, session, settings
        self.model, self.optimizer = model, optimizer = trained.model, trained.optimizer
        self._late, self._depth = backward_in_step, 0
        self.step, self.updates, self._judged = trained.first_step, 0, False
        self._used: Tensor | None = None  # norms of the gradients of this update
        self.inputs = InputReader(model, settings, trained.tokenizer)
        self.loss = LossReader(settings)
        self.gradients = GradientReader(model, settings)
        self.movement = MovementTracker(model, optimizer)
        self.rates = RateReader(optimizer, trained.scheduler, settings)
        self.ranks = RankWatch(session, trained, settings, late=backward_in_step)
        self.forward = ForwardHooks(self, phase)
        self._leave_out_gates()
        plan = {"warmup_steps": settings.warmup_steps, "random_loss_nats": math.inf}
        session.observe(Started(self.step, plan))
        self.ranks.begin()
        self._handles = [
            *self.forward.attach(),
            *self.inputs.watch_modes(),
            optimizer.register_step_pre_hook(lambda *_: self._enter()),
            optimizer.register_step_post_hook(lambda *_: self._leave()),
        ]

    def _leave_out_gates(self) -> None:
        """Remove the gates that cannot be judged in this run."""
        leave_out = self.session.leave_out
        if self.settings.max_grad_norm is None:
            leave_out("optim.clip-norm", "the maximum gradient norm was not given")
        if any(p.requires_grad and p.element_size() < 4 for p in self.model.parameters()):
            leave_out(
                "optim.clip-norm",
                "gradients are in half precision, whose norm is rounded by more than the limit",
            )
        if not self.movement.lost.judges:
            leave_out("optim.lost-updates", "the optimizer is not one of torch")
        if self.inputs.text.tokenizer is None:
            leave_out("tokenizer.own-ids", "no tokenizer that decodes and encodes was given")
        if self.trained.scheduler is None:
            leave_out("schedule.rate", "no scheduler was given")

    def detach(self) -> None:
        """Remove all hooks. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def restored(self, step: int) -> None:
        """The weights were just loaded from a checkpoint of this step."""
        self.step = step
        self.movement.settle()

    @timed
    def backward(
        self, place: LossPlace, head: Tensor | None, values: Tensor, gradient: Tensor
    ) -> None:
        """The gradient at the logits, or at what enters a head of weight `head`, is computed."""
        if place.done:
            return
        place.done = True
        if not self.gradients.in_backward:
            self._depth = self._depth if self._late else 0  # a step that raised has no end
            if event := self.gradients.begin_pass(self.step + 1):
                self.session.observe(event)
            # Queued twice, as a wrapper may average gradients in a callback of its own.
            _when_done(lambda: _when_done(self._end_pass))
        self.loss.add(place, values, gradient, head)
        if place.call is not None:
            self.ranks.repeat.add(place.call, gradient, head, place.autocast)

    @timed
    def _end_pass(self) -> None:
        self.gradients.end_pass()

    def _enter(self) -> None:
        """An optimizer that calls the step of its base class calls these hooks for both; the
        outermost counts.
        """
        self._depth += 1
        if self._depth == 1:
            self.before_update()

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.after_update()

    @timed
    def before_update(self) -> None:
        """Judge everything that is known before weights change. Raises GateFailed in mode `raise`,
        so that a bad update never lands.
        """
        if self._late or (self.gradients.passes and not self._judged):
            self._compare_state()
        if not self._late:
            self._judge_step()
        self.movement.begin()

    def _compare_state(self) -> None:
        """Compare weights and optimizer state with those after the last update. Before the first,
        a script may still load them.
        """
        whole = self.forward.evaluated or not (self.updates + 1) % COMPARED_EVERY
        if whole or self.updates:
            self.forward.evaluated = False
            self.session.observe(self.movement.state.compare(self.step + 1, whole=whole))

    def _judge_step(self) -> None:
        """Judge loss and gradients, once per step, and what the ranks have found."""
        if self._judged:
            return
        self.rates.read()
        self.movement.prepare()
        loss, factor = math.nan, 1.0
        if self.gradients.passes:
            self._judged = True
            loss, factor = self._judge_own()
        elif event := self.gradients.reused(self.step + 1):
            self.session.observe(event)
        if (repeat := self.ranks.repeat) and repeat.wanted:
            self.forward.repeat_passes()
        self.ranks.before_update(self.step + 1, self.loss.readings, loss, factor)

    def _judge_own(self) -> tuple[float, float]:
        """Judge what this process has computed. Returns its loss, and what gradients were divided
        by after the last backward pass.
        """
        step, observe = self.step + 1, self.session.observe
        scale, maximum = self.settings.loss_scale(), self.settings.max_grad_norm
        # Everything is fetched with one copy from the device.
        unread, losses = self.loss.pending()
        readings, values = resolve(unread, [*self.gradients.pending(), *losses])
        after, used, stale, lost, *losses = values
        self._used = used
        loss = self.loss.fetched(readings, losses)
        norm = float(after.norm()) / scale
        observe(
            StepTaken(
                step=step,
                loss_nats=loss,
                grad_norm=norm,
                clipped_grad_norm=float(used.norm()),
                max_grad_norm=math.inf if maximum is None else maximum,
                lr=self.rates.used[0],
                n_valid_tokens=self.loss.n_expected,
                n_expected_tokens=self.loss.n_expected,
                tokens_seen=0,
                wall_s=0.0,
                flops=0.0,
                peak_flops=0.0,
            )
        )
        if self.loss.finite and math.isfinite(norm):
            observe(self.loss.measured(step))
            observe(self.gradients.accumulated(step, after, used, stale, lost))
        return loss, float(after.norm() / used.norm())

    @timed
    def after_update(self) -> None:
        """Judge what the update changed, and its rate."""
        self._judge_step()
        self.step, self.updates = self.step + 1, self.updates + 1
        self.session.steps = self.updates
        self.session.observe(self.movement.judge(self.step, self.rates.used, self._used))
        if event := self.rates.event(self.step, self.updates, self.inputs.epoch):
            self.session.observe(event)
        self._end_step()

    def close(self, skipped: bool = False) -> None:
        """The trainer ends a step. An update that did not come changed nothing; a skipped step is
        forgotten.
        """
        if not self.gradients.passes:
            return
        if skipped:
            self._end_step()
        else:
            self.after_update()

    def _end_step(self) -> None:
        self.loss.reset()
        self.gradients.reset()
        self._judged, self._used = False, None


class ForwardHooks:
    """Hooks on the forward passes of a model, and of its children where it is called by parts.
    The outermost module that is called counts.
    """

    def __init__(self, watch: Watch, phase: Phase):
        self.watch, self.session, self.phase = watch, watch.session, phase
        self.evaluated = False  # since the weights were compared last
        self._outermost: nn.Module | None = None
        self._call: Call | None = None  # the pass, where it is to be made again
        self._repeating, self._repeat_due = False, True
        self._inner: dict[str, Any] = {}  # outputs of modules inside of the current forward pass

    def attach(self) -> list:
        """Register all hooks; returns their handles."""
        model = self.watch.model
        # A compiled graph leaves out the hooks.
        eager = torch.compiler.disable if "torch._dynamo" in sys.modules else lambda hook: hook
        parts, handles = (nn.Embedding, nn.ModuleList), []
        for m in (model, *(m for m in model.children() if not isinstance(m, parts))):
            handles += [
                m.register_forward_pre_hook(eager(self._before), with_kwargs=True),
                m.register_forward_hook(eager(self._after), with_kwargs=True),
            ]
        base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
        for name, module in (("head", probe.head_of(model)), ("base", base)):
            if isinstance(module, nn.Module):
                handles.append(module.register_forward_hook(eager(partial(self._keep, name))))
        return handles

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self._outermost is not None:
            self._inner[name] = output

    @timed
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        inside = self._outermost not in (None, module)
        if self._repeating or inside or not (phase := self.phase()):
            return
        named = probe.arguments_of(module, args, kwargs)
        if (ids := probe.ids_of(named)) is None:
            return
        self._outermost, self._inner = module, {}
        self._call, repeat = None, self.watch.ranks.repeat
        inputs, step, events = self.watch.inputs, self.watch.step, ()
        if phase == "evaluation":
            self.evaluated = True
            events = inputs.evaluation(step, module, named, ids)
        elif torch.is_grad_enabled():
            events = inputs.training(step + 1, module, named, ids)
            if repeat is not None and repeat.wanted:
                self.repeat_passes()
                self._call = Call.of(module, args, kwargs)
        for event in events:
            self.session.observe(event)
            if isinstance(event, RowHashes) and phase == "training":
                self.watch.ranks.rows += event.rows

    def repeat_passes(self) -> None:
        """Make the passes of earlier micro-steps again, unseen by these hooks."""
        outermost, self._outermost, self._repeating = self._outermost, None, True
        try:
            self.watch.ranks.repeat.settle()
        finally:
            self._outermost, self._repeating = outermost, False

    @timed
    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._repeating or self._outermost is not module:
            return
        self._outermost, logits = None, probe.logits_of(output)
        inner, self._inner = self._inner, {}
        if self.phase() == "evaluation":
            if logits is not None:
                self._repeat(module, args, kwargs, logits)
            return
        sources = self._sources(logits, inner)
        if not (torch.is_grad_enabled() and sources):
            return
        self._repeat_due = True
        named = probe.arguments_of(module, args, kwargs)
        ids = probe.ids_of(named)
        if ids is None or ids.shape != sources[0][0].shape[:2]:
            return
        place = self._place(ids, named, probe.loss_of(output))
        for values, head in sources:
            values.register_hook(partial(self.watch.backward, place, head, values.detach()))

    def _place(self, ids: Tensor, named: Mapping[str, Any], loss: Tensor | None) -> LossPlace:
        mask, labels = self.watch.inputs.mask_and_labels(ids, named)
        settings = self.watch.settings
        return LossPlace(
            ids,
            silent=silent_places(ids, mask, labels, settings.pad_id, settings.eos_id),
            n_labels=None if labels is None else (labels != IGNORE).sum(),
            loss=None if loss is None else loss.detach(),
            closed=None if labels is None else is_closed(ids, labels),
            autocast=(
                torch.get_autocast_dtype(ids.device.type)
                if torch.is_autocast_enabled(ids.device.type)
                else None
            ),
            call=self._call,
        )

    def _sources(
        self, logits: Tensor | None, inner: Mapping[str, Any]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Tensors at whose gradient the loss can be read, each with the weight of the head that
        comes after it. The first that has a gradient counts.

        The logits; the head's own output, where the trainer has converted it and may take the loss
        before that; and, where there are no logits, as with a fused loss, the input of the head, if
        the head is a matrix and nothing comes after it.
        """
        if logits is None:
            head, config = probe.head_of(self.watch.model), probe.config_of(self.watch.model)
            hidden = getattr(inner.get("base"), "last_hidden_state", None)
            matrix = isinstance(head, nn.Linear) and head.bias is None
            last = not any(getattr(config, name, None) for name in AFTER_HEAD)
            readable = matrix and last and hidden is not None and hidden.requires_grad
            return [(hidden, head.weight.detach())] if readable else []
        if not logits.requires_grad:
            return []
        raw = inner.get("head")
        if (
            isinstance(raw, Tensor)
            and raw is not logits
            and raw.shape == logits.shape
            and raw.requires_grad
            and torch.equal(raw.detach().float(), logits.detach().float())
        ):
            return [(logits, None), (raw, None)]
        return [(logits, None)]

    @torch.no_grad()
    def _repeat(self, module: nn.Module, args: tuple, kwargs: dict, logits: Tensor) -> None:
        """Once after each stretch of training: evaluate the batch again, with other random numbers,
        and compare the logits.
        """
        if not self._repeat_due or kwargs.get("past_key_values") is not None:
            return
        self._repeat_due, self._repeating = False, True
        try:
            with probe.random_kept():
                again = probe.logits_of(module(*args, **kwargs))
        finally:
            self._repeating = False
        repeat = difference(logits.float(), again.float(), relative=False)
        self.session.observe(ModuleModes(self.watch.step, "evaluation", (), repeat))


def _when_done(call: Callable[[], None]) -> None:
    """Call when the backward pass is over, after all callbacks that were queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(call)
