"""Gates inside `transformers.Trainer` and trainers built on it, such as those of TRL:
`Trainer(…, callbacks=[GateCallback()])`.
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from stackproof.contracts.callbacks import digest
from stackproof.contracts.callbacks.probe import config_of, untouched
from stackproof.contracts.callbacks.record import LOG, RunRecord, how_it_ended, trainer_of
from stackproof.contracts.callbacks.session import ROWS_GATE, Cost, Mode, Session
from stackproof.contracts.callbacks.settings import TrainerSettings
from stackproof.contracts.callbacks.subject import foreign_subject
from stackproof.contracts.callbacks.watch import Watch
from stackproof.contracts.gate import Verdict

PRIVATE = ("output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id")
LOSS_GATES = (
    "loss.logit-gradient",
    "loss.first",
    "data.learnable-batch",
    "runtime.trend",
    "runtime.loss-spike",
)


class GateCallback(TrainerCallback):
    """Runs the preflight gates when training begins, then judges every step, evaluation, save and
    resume of its Trainer.

    Raises GateFailed at the first red gate that halts; with `mode="log"` verdicts go to `log_path`
    (JSON lines, default `gates.jsonl` in the output folder) and to logging, and nothing is raised.
    `skip` leaves out gates by id. `record` names a folder for the record of the run; the first
    process writes it when training ends or a gate halts it. `reuses_rows`: rows come again in their
    order, or trained rows are scored, on purpose; it follows from `num_iterations` above 1 in
    trainers of TRL.
    """

    def __init__(
        self,
        mode: Mode = "raise",
        *,
        log_path: str | Path | None = None,
        skip: Iterable[str] = (),
        only: Iterable[str] | None = None,
        record: str | Path | None = None,
        reuses_rows: bool = False,
    ):
        self._mode, self._skip, self._only, self._record, self._reuses_rows = (
            mode,
            tuple(skip),
            only,
            record,
            reuses_rows,
        )
        self._log_path = log_path or (Path(record) / LOG if record else None)
        self.session: Session | None = None
        self._watch: Watch | None = None
        self._trainer: Trainer | None = None
        self._memory = digest.Memory()
        self._folders: dict[int, Path] = {}
        self._phase, self._reloaded = "", False

    def verdicts(self) -> dict[str, Verdict]:
        """Verdict of every gate so far, by id; empty before training begins."""
        return self.session.verdicts() if self.session else {}

    def first_failures(self) -> dict[str, int | None]:
        """Step of each red gate's first failure."""
        return self.session.first_failures() if self.session else {}

    def cost(self) -> Cost | None:
        """Time spent on gates so far; None before training begins."""
        return self.session.cost() if self.session else None

    # --- events of the trainer --------------------------------------------------------------------

    def on_train_begin(
        self,
        args,
        state,
        control,
        *,
        model,
        optimizer,
        lr_scheduler,
        processing_class=None,
        **kwargs,
    ):
        self._detach()
        log_path = self._log_path or Path(args.output_dir) / "gates.jsonl"
        self.session = Session(
            self._mode,
            log_path=log_path,
            skip=self._skip,
            only=self._only,
            reuses_rows=self._reuses_rows,
        )
        self.session.on_halt = self._detach
        self._trainer, resumed = _caller()
        inner = getattr(optimizer, "optimizer", optimizer)
        tokenizer = processing_class if hasattr(processing_class, "eos_token_id") else None
        if _other_objective(self._trainer):
            for gate_id in LOSS_GATES:
                self.session.forget(
                    gate_id,
                    f"{type(self._trainer).__name__} does not learn the next token by "
                    "cross-entropy",
                )
        if (passes := getattr(args, "num_iterations", 1)) > 1:
            self.session.forget(
                ROWS_GATE,
                f"num_iterations = {passes}: the trainer goes over each buffer of rows again on "
                "purpose",
            )
        if self._record and args.process_index == 0:
            self._open_record(args, state, model, inner, lr_scheduler)
        with untouched(model):
            self.session.preflight(foreign_subject(model, inner, tokenizer))
        self._watch = Watch(
            model,
            inner,
            self.session,
            scheduler=lr_scheduler,
            settings=self._settings(args, model, tokenizer),
            step=state.global_step,
            **({"phase": lambda: self._phase} if self._trainer else {}),
        )
        if self._trainer:
            self._wrap(self._trainer)
        folder = (
            Path(resumed)
            if isinstance(resumed, str)
            else Path(args.output_dir) / f"checkpoint-{state.global_step}"
        )
        if (resumed or state.global_step) and (document := digest.read(folder)):
            self.session.observe(
                self._memory.restored(
                    document, digest.of_run(model, inner, lr_scheduler, state.global_step)
                )
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._watch is not None:
            self._watch.before_update()

    def on_step_end(self, args, state, control, *, optimizer=None, **kwargs):
        if self._watch is not None:
            self._watch.close(skipped=bool(getattr(optimizer, "step_was_skipped", False)))

    def on_save(self, args, state, control, *, model, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._watch is None or not (folder.is_dir() or args.world_size > 1):
            return
        watch = self._watch
        # All processes compare their weights before the first writes.
        if (replicas := digest.replicas(model)) is not None:
            self.session.artifact(replicas, state.global_step)
        document = self._memory.saved(
            digest.of_run(model, watch.optimizer, watch.rates.scheduler, state.global_step)
        )
        if args.process_index == 0:
            digest.write(folder, document)
            self._folders[id(document)] = folder
        if not (folder / "config.json").is_file() and args.world_size == 1:
            self.session.forget(
                "checkpoint.reloads", "the checkpoint is no whole model, as with adapters"
            )
        elif (
            not self._reloaded
            and (folder / "config.json").is_file()
            and hasattr(model, "from_pretrained")
        ):
            self._reloaded = True
            with untouched(model):
                other = type(model).from_pretrained(folder, dtype=model.dtype)
                self.session.artifact(digest.reloaded(model, other), state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._detach()
        if self.session is None:
            return
        status, reason, exit_code = how_it_ended(None)
        if state.global_step < state.max_steps:
            status, reason = (
                "early_stopped",
                f"the trainer stopped at step {state.global_step} of {state.max_steps}",
            )
        self.session.on_end(status, reason, exit_code)

    def _open_record(self, args, state, model, optimizer, scheduler) -> None:
        plain, defaults = args.to_sanitized_dict(), {f.name: f.default for f in fields(args)}
        told = {
            k: v for k, v in plain.items() if k not in PRIVATE and str(v) != str(defaults.get(k))
        }
        trainer = trainer_of(type(self._trainer) if self._trainer else Trainer, "transformers")
        parts = {
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "first_step": state.global_step,
        }
        RunRecord(self._record, self.session, trainer=trainer, told=told, **parts)

    # --- what the trainer does not pass to its callbacks ------------------------------------------

    def _wrap(self, trainer: Trainer) -> None:
        """Wrap two methods of this trainer, which have the batch, the loss before the logger, and
        the phase.
        """
        step, predict = trainer.training_step, trainer.prediction_step

        def training_step(model, inputs, *args, **kwargs):
            with self.session.clock:
                verdict, complete = self._memory.drawn(
                    inputs, math.floor(trainer.state.epoch or 0), trainer.state.global_step
                )
            for document in complete:
                if folder := self._folders.pop(id(document), None):
                    digest.write(folder, document)
            if verdict is not None:
                self.session.observe(verdict)
            # prompts are a list and not a mapping
            self._watch.see_batch(dict(inputs) if isinstance(inputs, Mapping) else {})
            loss = self._during("training", step, model, inputs, *args, **kwargs)
            self._watch.tell_loss(loss)
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
        if self._watch:
            self._watch.detach()
        for name in ("training_step", "prediction_step"):
            if self._trainer is not None:
                vars(self._trainer).pop(name, None)
        self._watch = self._trainer = None

    def _settings(self, args, model, tokenizer) -> TrainerSettings:
        config, trainer = config_of(model), self._trainer
        scaler = getattr(getattr(trainer, "accelerator", None), "scaler", None)
        return TrainerSettings(
            pad_id=getattr(tokenizer, "pad_token_id", getattr(config, "pad_token_id", None)),
            eos_id=getattr(tokenizer, "eos_token_id", getattr(config, "eos_token_id", None)),
            smoothing=float(args.label_smoothing_factor),
            max_grad_norm=args.max_grad_norm
            if args.max_grad_norm and args.max_grad_norm > 0
            else math.inf,
            ticks_per_update=scaler is None,
            loss_scale=scaler.get_scale if scaler is not None else lambda: 1.0,
            absolute=args.world_size <= 1,
            warmup_steps=args.get_warmup_steps(trainer.state.max_steps) if trainer else 0,
        )


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
