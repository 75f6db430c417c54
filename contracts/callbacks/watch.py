"""Observes a trainer that is not ours: hooks on the model's forward pass, on the gradient at its
logits and on the update.

B batch, T tokens, V vocab
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks import probe
from stackproof.contracts.callbacks.gradients import GradientReader
from stackproof.contracts.callbacks.inputs import InputReader
from stackproof.contracts.callbacks.losses import LossPlace, LossReader
from stackproof.contracts.callbacks.movement import MovementTracker
from stackproof.contracts.callbacks.rates import RateReader
from stackproof.contracts.callbacks.reading import IGNORE, resolve, silent_places
from stackproof.contracts.callbacks.session import Session, timed
from stackproof.contracts.callbacks.settings import TrainerSettings
from stackproof.contracts.events import ModuleModes, Started, StepTaken

# Weights are compared between updates after an evaluation, and at every update of this number.
COMPARED_EVERY = 16
Phase = Callable[[], str]


def phase_by_grad() -> str:
    """The phase of a forward pass, by whether gradients are on."""
    return "training" if torch.is_grad_enabled() else "evaluation"


class Watch:
    """One observed model and optimizer. Each reader measures one part of a step; their events go to
    the session. `phase()` is training, evaluation or empty, where nothing is to be observed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        session: Session,
        *,
        scheduler: Any = None,
        settings: TrainerSettings | None = None,
        step: int = 0,
        phase: Phase = phase_by_grad,
        update_hooks: bool = True,
    ):
        self.model, self.optimizer, self.session = model, optimizer, session
        self.settings = settings = settings or TrainerSettings()
        self.step, self.updates, self._judged = step, 0, False
        self.inputs = InputReader(model, settings)
        self.loss = LossReader(settings)
        self.gradients = GradientReader(model, settings)
        self.movement = MovementTracker(model)
        self.rates = RateReader(optimizer, scheduler, settings)
        self.forward = ForwardHooks(self, phase)
        self._leave_out_gates()
        plan = {"warmup_steps": settings.warmup_steps, "random_loss_nats": math.inf}
        session.observe(Started(step, plan))
        self._handles = [*self.forward.attach(), *self._attach(update_hooks)]

    def _leave_out_gates(self) -> None:
        """Take out the gates that cannot be judged in this run."""
        leave_out = self.session.forget
        if self.settings.max_grad_norm is None:
            leave_out("optim.clip-norm", "the maximum gradient norm was not given")
        if any(p.requires_grad and p.element_size() < 4 for p in self.model.parameters()):
            leave_out(
                "optim.clip-norm",
                "gradients are in half precision, whose norm is rounded by more than the limit",
            )
        if self.rates.scheduler is None:
            leave_out("schedule.rate", "no scheduler was given")

    def _attach(self, update_hooks: bool) -> list:
        """Hooks on the update. Without `update_hooks` the trainer runs the backward pass inside the
        optimizer's step, so that the step is judged after its update.
        """
        before = self.before_update if update_hooks else self.compare_weights
        return [
            self.optimizer.register_step_pre_hook(lambda *_: before()),
            self.optimizer.register_step_post_hook(
                lambda *_: self.after_update(also_before=not update_hooks)
            ),
        ]

    def detach(self) -> None:
        """Remove all hooks. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def restored(self, step: int) -> None:
        """The weights were just loaded from a checkpoint of this step."""
        self.step = step
        self.movement.settle()

    def see_batch(self, batch: Mapping[str, Any]) -> None:
        """The batch that the trainer has drawn, by name."""
        self.inputs.batch = batch

    def tell_loss(self, loss: Tensor | float) -> None:
        """The loss of one micro-step as the trainer computed it, before any logger."""
        self.loss.tell(loss)

    @timed
    def backward(
        self, place: LossPlace, values: Tensor, gradient: Tensor, head: Tensor | None
    ) -> None:
        """The gradient at the logits, or at what enters a head of weight `head`, is computed."""
        if place.done:
            return
        place.done = True
        if not self.gradients.in_backward:
            if event := self.gradients.begin_pass(self.step + 1):
                self.session.observe(event)
            # Queued twice, as a wrapper may average gradients in a callback of its own.
            _when_done(lambda: _when_done(self._end_pass))
        self.loss.add(place, values, gradient, head)

    @timed
    def _end_pass(self) -> None:
        self.gradients.end_pass()

    @timed
    def before_update(self, *, late: bool = False) -> None:
        """Judge everything that is known before weights change. Raises GateFailed in mode `raise`,
        so that a bad update never lands. `late`: the update was made already.
        """
        if not self._judged:
            self.rates.read()
            self.movement.prepare(self.optimizer)
        if not self.gradients.passes or self._judged:
            return
        self._judged = True
        if not late:
            self.compare_weights()
        step, observe = self.step + 1, self.session.observe
        scale = self.settings.loss_scale()
        # Everything is fetched with one copy from the device.
        unread, told = self.loss.pending()
        readings, values = resolve(unread, [*self.gradients.pending(), *told])
        (after, used, stale, lost), told = values[:4], values[4:]
        loss = self.loss.fetched(readings, told)
        norm, clipped = float(after.norm()) / scale, float(used.norm())
        observe(self._step_taken(step, loss, norm, clipped))
        if self.loss.finite and math.isfinite(norm):
            observe(self.loss.measured(step))
            observe(self.gradients.accumulated(step, after, used, stale, lost))

    @timed
    def compare_weights(self) -> None:
        """Compare the weights with those after the last update, where that is due."""
        if self.forward.evaluated or not (self.updates + 1) % COMPARED_EVERY:
            self.forward.evaluated = False
            self.session.observe(self.movement.between(self.step + 1))

    def _step_taken(self, step: int, loss: float, norm: float, clipped: float) -> StepTaken:
        maximum = self.settings.max_grad_norm
        return StepTaken(
            step=step,
            loss_nats=loss,
            grad_norm=norm,
            clipped_grad_norm=clipped,
            max_grad_norm=math.inf if maximum is None else maximum,
            lr=self.rates.used[0],
            n_valid_tokens=self.loss.n_expected,
            n_expected_tokens=self.loss.n_expected,
            tokens_seen=0,
            wall_s=0.0,
            flops=0.0,
            peak_flops=0.0,
        )

    @timed
    def after_update(self, also_before: bool = False) -> None:
        """Judge what the update changed, and its rate."""
        if also_before:
            self.before_update(late=True)
        self.step, self.updates = self.step + 1, self.updates + 1
        self.session.steps = self.updates
        self.session.observe(self.movement.judge(self.step, self.optimizer, self.rates.used))
        if event := self.rates.event(self.step, self.updates):
            self.session.observe(event)
        self._forget_step()

    def close(self, skipped: bool = False) -> None:
        """The trainer ends a step. An update that did not come changed nothing; a skipped step is
        forgotten.
        """
        if not self.gradients.passes:
            return
        if skipped:
            self._forget_step()
        else:
            self.after_update()

    def _forget_step(self) -> None:
        self.loss.reset()
        self.gradients.reset()
        self._judged = False


class ForwardHooks:
    """Hooks on the forward passes of a model, and of its children where it is called by parts.
    The outermost module that is called counts.
    """

    def __init__(self, watch: Watch, phase: Phase):
        self.watch, self.session, self.phase = watch, watch.session, phase
        self.evaluated = False  # since the weights were compared last
        self._inside: nn.Module | None = None
        self._repeating, self._repeat_due = False, True
        self._head_output: Tensor | None = None
        self._hidden: Tensor | None = None

    def attach(self) -> list:
        """Register all hooks; returns their handles."""
        model = self.watch.model
        # Observing is no part of a compiled graph.
        eager = torch.compiler.disable if "torch._dynamo" in sys.modules else lambda hook: hook
        parts = (nn.Embedding, nn.ModuleList)
        candidates = [model, *(m for m in model.children() if not isinstance(m, parts))]
        handles = [
            m.register_forward_pre_hook(eager(self._before), with_kwargs=True) for m in candidates
        ]
        handles += [
            m.register_forward_hook(eager(self._after), with_kwargs=True) for m in candidates
        ]
        if (head := probe.head_of(model)) is not None:
            handles.append(head.register_forward_hook(eager(self._keep_head_output)))
        base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
        if isinstance(base, nn.Module):
            handles.append(base.register_forward_hook(eager(self._keep_hidden)))
        return handles

    @timed
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._repeating or self._inside not in (None, module) or not (phase := self.phase()):
            return
        named = probe.arguments_of(module, args, kwargs)
        ids = probe.ids_of(named)
        if ids is None:
            return
        self._inside, self._head_output = module, None
        inputs, step, observe = self.watch.inputs, self.watch.step, self.session.observe
        if phase == "evaluation":
            self.evaluated = True
            observe(inputs.modes_of_evaluation(step))
            if event := inputs.evaluation(step, module, named, ids):
                observe(event)
        elif torch.is_grad_enabled():
            for event in inputs.training(step + 1, module, named, ids):
                observe(event)

    def _keep_hidden(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._inside is not None:
            self._hidden = getattr(output, "last_hidden_state", None)

    def _keep_head_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._inside is not None and isinstance(output, Tensor):
            self._head_output = output

    @timed
    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._repeating or self._inside is not module:
            return
        self._inside, logits = None, probe.logits_of(output)
        hidden, self._hidden = self._hidden, None
        if self.phase() == "evaluation":
            if logits is not None:
                self._repeat(module, args, kwargs, logits)
            return
        sources = self._sources(logits, hidden)
        if not (torch.is_grad_enabled() and sources):
            return
        self._repeat_due = True
        named = probe.arguments_of(module, args, kwargs)
        ids = probe.ids_of(named)
        if ids is None or ids.shape != sources[0][0].shape[:2]:
            return
        place = self._place(ids, named, probe.loss_of(output))
        for tensor, head in sources:
            tensor.register_hook(
                lambda gradient, values=tensor.detach(), head=head: self.watch.backward(
                    place, values, gradient, head
                )
            )

    def _place(self, ids: Tensor, named: Mapping[str, Any], loss: Tensor | None) -> LossPlace:
        mask, labels = self.watch.inputs.mask_and_labels(ids, named)
        settings = self.watch.settings
        return LossPlace(
            ids,
            silent=silent_places(ids, mask, labels, settings.pad_id, settings.eos_id),
            n_labels=None if labels is None else (labels != IGNORE).sum(),
            loss=None if loss is None else loss.detach(),
        )

    def _sources(
        self, logits: Tensor | None, hidden: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Tensors at whose gradient the loss can be read, each with the weight of the head that
        comes after it. The first that has a gradient counts.

        The logits; the head's own output, where the trainer has converted it and may take the loss
        before that; and, where there are no logits, as with a fused loss, the input of the head, if
        the head is a matrix and nothing comes after it.
        """
        raw, self._head_output = self._head_output, None
        if logits is None:
            head, config = probe.head_of(self.watch.model), probe.config_of(self.watch.model)
            bent = any(
                getattr(config, name, None)
                for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
            )
            plain = isinstance(head, nn.Linear) and head.bias is None and not bent
            readable = plain and hidden is not None and hidden.requires_grad
            return [(hidden, head.weight.detach())] if readable else []
        if not logits.requires_grad:
            return []
        if raw is None or raw is logits or raw.shape != logits.shape or not raw.requires_grad:
            return [(logits, None)]
        same = torch.equal(raw.detach().float(), logits.detach().float())
        return [(logits, None), (raw, None)] if same else [(logits, None)]

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
        repeat = float((again.float() - logits.float()).abs().nan_to_num(torch.inf).max())
        self.session.observe(ModuleModes(self.watch.step, "evaluation", (), repeat))


def _when_done(call: Callable[[], None]) -> None:
    """Call when the backward pass is over, after all callbacks that were queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(call)
