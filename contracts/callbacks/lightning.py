"""Gates inside `lightning.pytorch.Trainer`: `Trainer(…, callbacks=[GateCallback()])`."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stackproof.contracts.callbacks import digest
from stackproof.contracts.callbacks.probe import config_of, untouched
from stackproof.contracts.callbacks.record import LOG, RunRecord, how_it_ended, trainer_of
from stackproof.contracts.callbacks.session import Cost, Mode, Session
from stackproof.contracts.callbacks.settings import TrainerSettings
from stackproof.contracts.callbacks.subject import ForeignTraining, foreign_subject
from stackproof.contracts.callbacks.watch import Watch
from stackproof.contracts.gate import Verdict

STATE = "stack_gates"


class GateCallback(Callback):
    """Runs the preflight gates when fitting begins, then judges every step, validation, save and
    resume.

    The language model is the LightningModule itself, or its one child that maps ids (B, T) to
    logits (B, T, V); `model` names its attribute if there are several children. Raises GateFailed
    at the first red gate that halts; with `mode="log"` verdicts go to `log_path` (JSON lines,
    default `gates.jsonl` in the root folder) and to logging, and nothing is raised. `record` names
    a folder for the record of the run, written when it ends, also on an error. `reuses_rows`: rows
    come again in their order, or trained rows are scored, on purpose.
    """

    def __init__(
        self,
        mode: Mode = "raise",
        *,
        model: str = "",
        tokenizer: Any = None,
        log_path: str | Path | None = None,
        skip: Iterable[str] = (),
        only: Iterable[str] | None = None,
        record: str | Path | None = None,
        reuses_rows: bool = False,
    ):
        self._mode, self._name, self._tokenizer = mode, model, tokenizer
        self._skip, self._only, self._record, self._reuses_rows = (
            tuple(skip),
            only,
            record,
            reuses_rows,
        )
        self._log_path = log_path or (Path(record) / LOG if record else None)
        self.session: Session | None = None
        self._watch: Watch | None = None
        self._memory = digest.Memory()
        self._restored: dict | None = None

    def verdicts(self) -> dict[str, Verdict]:
        """Verdict of every gate so far, by id; empty before fitting begins."""
        return self.session.verdicts() if self.session else {}

    def first_failures(self) -> dict[str, int | None]:
        """Step of each red gate's first failure."""
        return self.session.first_failures() if self.session else {}

    def cost(self) -> Cost | None:
        """Time spent on gates so far; None before training begins."""
        return self.session.cost() if self.session else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self._watch = None
        log_path = self._log_path or Path(trainer.default_root_dir) / "gates.jsonl"
        self.session = Session(
            self._mode,
            log_path=log_path,
            skip=self._skip,
            only=self._only,
            reuses_rows=self._reuses_rows,
        )
        self.session.on_halt = self._detach

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = getattr(pl_module, self._name) if self._name else _language_model(pl_module)
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        if self._record and trainer.is_global_zero and optimizer is not None:
            configs, told = (
                trainer.lr_scheduler_configs,
                {"max_grad_norm": trainer.gradient_clip_val, "precision": trainer.precision},
            )
            parts = {
                "model": model,
                "optimizer": optimizer,
                "scheduler": configs[0].scheduler if configs else None,
            }
            described = trainer_of(type(trainer), "lightning")
            RunRecord(
                self._record,
                self.session,
                trainer=described,
                told=told,
                first_step=trainer.global_step,
                **parts,
            )
        with untouched(pl_module):
            # The optimizer may own parameters of the module around the model.
            training = ForeignTraining(pl_module, optimizer)
            subject = foreign_subject(model, None, self._tokenizer)
            self.session.preflight(replace(subject, training=training))
        if len(trainer.optimizers) != 1:
            return
        configs = trainer.lr_scheduler_configs
        self._watch = Watch(
            model,
            optimizer,
            self.session,
            scheduler=configs[0].scheduler if configs else None,
            settings=self._settings(trainer, model, configs),
            step=trainer.global_step,
            phase=lambda: _phase(trainer),
            update_hooks=False,
        )
        if self._restored is not None:
            restored, self._restored = self._restored, None
            self.session.observe(self._memory.restored(restored, self._parts()))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is None:
            return
        named = (
            batch
            if hasattr(batch, "keys")
            else dict(zip(("input_ids", "labels"), batch))
            if isinstance(batch, (list, tuple))
            else {}
        )
        self._watch.see_batch(dict(named))
        verdict, _ = self._memory.drawn(batch, trainer.current_epoch, trainer.global_step)
        if verdict is not None:
            self.session.observe(verdict)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self._watch is not None and loss is not None and not math.isfinite(float(loss)):
            self._watch.tell_loss(loss)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict
    ) -> None:
        if self._watch is not None:
            checkpoint[STATE] = self._memory.saved(self._parts())

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict
    ) -> None:
        self._restored = checkpoint.get(STATE)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self.session.on_end(*how_it_ended(None))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._detach()
        if self.session is not None:
            self.session.on_end(*how_it_ended(exception))

    def _parts(self) -> dict[str, Any]:
        return digest.of_run(
            self._watch.model, self._watch.optimizer, self._watch.rates.scheduler, self._watch.step
        )

    def _detach(self) -> None:
        if self._watch:
            self._watch.detach()

    def _settings(self, trainer: Trainer, model: Any, configs: list) -> TrainerSettings:
        config = config_of(model)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return TrainerSettings(
            pad_id=getattr(self._tokenizer, "pad_token_id", getattr(config, "pad_token_id", None)),
            eos_id=getattr(self._tokenizer, "eos_token_id", getattr(config, "eos_token_id", None)),
            max_grad_norm=math.inf
            if not trainer.gradient_clip_val
            else float(trainer.gradient_clip_val),
            clips_values=trainer.gradient_clip_algorithm == "value",
            ticks_per_update=bool(configs)
            and configs[0].interval == "step"
            and configs[0].frequency == 1
            and scaler is None,
            loss_scale=scaler.get_scale if scaler is not None else lambda: 1.0,
            absolute=trainer.world_size == 1,
        )


def _phase(trainer: Trainer) -> str:
    if trainer.validating or trainer.sanity_checking or trainer.testing:
        return "evaluation"
    return "training" if trainer.training else ""


def _language_model(pl_module: LightningModule) -> Any:
    """The one child with parameters, or the module itself if several children are parts of the
    model.
    """
    children = [m for m in pl_module.children() if any(True for _ in m.parameters())]
    return children[0] if len(children) == 1 and hasattr(children[0], "forward") else pl_module
