"""Gates inside `transformers.Trainer` and trainers built on it, such as those of TRL:
`Trainer(…, callbacks=[GateCallback()])`.
"""

import inspect
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback

from stackproof.contracts.callbacks import digest
from stackproof.contracts.callbacks.probe import untouched
from stackproof.contracts.callbacks.record import End, trainer_of
from stackproof.contracts.callbacks.run import GatedRun
from stackproof.contracts.callbacks.session import ROWS_GATES
from stackproof.contracts.callbacks.settings import Trained, TrainerSettings
from stackproof.contracts.callbacks.watch import Watch, phase_by_grad
from stackproof.contracts.subject import SavedCheckpoint

PRIVATE = ("output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id")
LOSS_GATES = (
    "loss.logit-gradient",
    "loss.first",
    "data.learnable-batch",
    "runtime.trend",
    "runtime.loss-spike",
    "distributed.one-process-step",
)


class GateCallback(GatedRun, TrainerCallback):
    """Runs the preflight gates when training begins, then judges every step, evaluation, save and
    resume of its Trainer.

    The options are `Options`; verdicts go to `gates.jsonl` in the output folder by default.
    The first process writes the record when training ends or a gate halts it. `reuses_rows` follows
    from `num_iterations` above 1 in trainers of TRL.
    """

    _trainer: Trainer | None = None
    _phase, _reloaded = "", False

    # --- events of the trainer --------------------------------------------------------------------

    def on_train_begin(self, args, state, control, *, model, optimizer, lr_scheduler, **kwargs):
        self._open(args.output_dir)
        self._reloaded = False
        self._trainer, resumed = _caller()
        tokenizer = kwargs.get("processing_class")
        tokenizer = tokenizer if hasattr(tokenizer, "eos_token_id") else None
        optimizer = getattr(optimizer, "optimizer", optimizer)
        stated = _stated(args, state)
        trained = Trained(model, optimizer, lr_scheduler, tokenizer, state.global_step, stated)
        self._leave_out_gates(args)
        kind = type(self._trainer) if self._trainer else Trainer
        configured = _configured(args) | _data(self._trainer)
        self._open_record(trained, trainer_of(kind, "transformers"), configured)
        self._preflight(trained)
        phase = (lambda: self._phase) if self._trainer else phase_by_grad
        self._watch = Watch(trained, self.session, self._settings(args, trained), phase=phase)
        if self._trainer:
            self._wrap(self._trainer)
        last = f"{args.output_dir}/checkpoint-{state.global_step}"
        folder = Path(resumed if isinstance(resumed, str) else last)
        if (resumed or state.global_step) and (document := digest.read(folder)):
            self._restored(document)

    def on_optimizer_step(self, args, state, control, *, optimizer=None, **kwargs):
        # An optimizer whose step is replaced calls no hooks; its gradients are still there.
        waits = self._watch is not None and self._watch.gradients.passes > 0
        if waits and not getattr(optimizer, "step_was_skipped", False):
            self._watch.before_update()

    def on_step_end(self, args, state, control, *, optimizer=None, **kwargs):
        if self._watch is not None:
            self._watch.close(skipped=bool(getattr(optimizer, "step_was_skipped", False)))

    def on_save(self, args, state, control, *, model, **kwargs):
        step = state.global_step
        folder = Path(args.output_dir) / f"checkpoint-{step}"
        if self._watch is None or not (folder.is_dir() or args.world_size > 1):
            return
        # All processes compare their replicas after the first has written the folder.
        if not self._watch.ranks.saving(step) and (other := digest.other_replica(model)):
            with self.session.alike():
                self.session.artifact(other, step)
        self._saved(step, folder if args.process_index == 0 else None)
        if not self._reloaded:
            with untouched(model):
                self.session.artifact(self._reload(model, folder), step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._watch is not None and logs and "loss" in logs:
            self._watch.ranks.logged(float(logs["loss"]))

    def on_train_end(self, args, state, control, **kwargs):
        if self.session is None:
            return
        if self._watch is not None:
            self._watch.ranks.end(state.global_step)
        end = End.of(None)
        if state.global_step < state.max_steps:
            reason = f"the trainer stopped at step {state.global_step} of {state.max_steps}"
            end = End("early_stopped", reason)
        self._detach()
        self.session.end(end)

    def _leave_out_gates(self, args) -> None:
        """Remove the gates that do not apply to the objective of this trainer."""
        if _other_objective(self._trainer):
            name = type(self._trainer).__name__
            for gate_id in LOSS_GATES:
                self.session.leave_out(
                    gate_id, f"{name} does not learn the next token by cross-entropy"
                )
        if (passes := getattr(args, "num_iterations", 1)) > 1:
            for gate_id in ROWS_GATES:
                self.session.leave_out(
                    gate_id,
                    f"num_iterations = {passes}: the trainer goes over each buffer of rows again "
                    "on purpose",
                )

    def _reload(self, model: PreTrainedModel, folder: Path) -> SavedCheckpoint:
        """The checkpoint, loaded by the class of the model."""
        if not (folder / "config.json").is_file() or not hasattr(model, "from_pretrained"):
            why = "the checkpoint is not a whole model that its class can load, as with adapters"
            return digest.NotReloaded(model, why)
        self._reloaded = True
        return digest.reloaded(model, type(model).from_pretrained(folder, dtype=model.dtype))

    # --- what the trainer does not pass to its callbacks ------------------------------------------

    def _wrap(self, trainer: Trainer) -> None:
        """Wrap two methods of this trainer, which have the batch, the loss before the logger, and
        the phase.
        """
        step, predict = trainer.training_step, trainer.prediction_step

        def training_step(model, inputs, *args, **kwargs):
            state = trainer.state
            self._drawn(inputs, math.floor(state.epoch or 0), state.global_step)
            loss = self._during("training", step, model, inputs, *args, **kwargs)
            self._watch.loss.tell(loss)
            return loss

        def prediction_step(*args, **kwargs):
            return self._during("evaluation", predict, *args, **kwargs)

        trainer.training_step, trainer.prediction_step = training_step, prediction_step

    def _during(self, phase: str, call, *args, **kwargs) -> Any:
        before, self._phase = self._phase, phase
        try:
            return call(*args, **kwargs)
        finally:
            self._phase = before

    def _detach(self) -> None:
        super()._detach()
        if self._trainer is not None:
            for name in ("training_step", "prediction_step"):
                vars(self._trainer).pop(name, None)
        self._watch = self._trainer = None

    def _settings(self, args, trained: Trained) -> TrainerSettings:
        trainer = self._trainer
        scaler = getattr(getattr(trainer, "accelerator", None), "scaler", None)
        clips = args.max_grad_norm and args.max_grad_norm > 0
        return TrainerSettings.of(
            trained,
            scaler,
            smoothing=float(args.label_smoothing_factor),
            max_grad_norm=args.max_grad_norm if clips else math.inf,
            ticks_per_update=scaler is None,
            absolute=args.world_size <= 1,
            mean_of_ranks=not args.average_tokens_across_devices,
            held_out_declared=trainer is not None,
            updates=trainer.state.max_steps if trainer else 0,
            accumulates=args.gradient_accumulation_steps,
            warmup_steps=args.get_warmup_steps(trainer.state.max_steps) if trainer else 0,
        )


def _stated(args, state) -> dict[str, float]:
    """The settings of the optimizer among the arguments that differ from their defaults. A resumed
    schedule shows no warm-up.
    """
    names = ("learning_rate", "weight_decay")
    defaults = {f.name: f.default for f in fields(args)}
    found = {n: getattr(args, n) for n in names if getattr(args, n) != defaults[n]}
    warmup = 0 if state.global_step else args.get_warmup_steps(state.max_steps)
    return found | ({"warmup_steps": warmup} if warmup else {})


def _configured(args) -> dict[str, Any]:
    """The arguments of a trainer that differ from their defaults, without private ones."""
    defaults = {f.name: f.default for f in fields(args)}
    given = args.to_sanitized_dict().items()
    return {k: v for k, v in given if k not in PRIVATE and str(v) != str(defaults.get(k))}


def _data(trainer: Trainer | None) -> dict[str, Any]:
    """The number of rows of the training data, and their fingerprint if they are of `datasets`."""
    data = getattr(trainer, "train_dataset", None)
    found = {
        "rows": len(data) if hasattr(data, "__len__") else None,
        "data_fingerprint": getattr(data, "_fingerprint", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _caller() -> tuple[Trainer | None, Any]:
    """(the calling trainer, its argument `resume_from_checkpoint`). The Trainer passes no reference
    to itself to its callbacks.
    """
    frame = inspect.currentframe()
    while frame is not None:
        own = frame.f_locals.get("self")
        if isinstance(own, Trainer) and "resume_from_checkpoint" in frame.f_locals:
            return own, frame.f_locals["resume_from_checkpoint"]
        frame = frame.f_back
    return None, None


def _other_objective(trainer: Trainer | None) -> bool:
    """Whether a trainer of TRL has another objective than the next token; all but SFT do."""
    names = {c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")}
    return bool(names) and not any(n.startswith("SFT") for n in names)
