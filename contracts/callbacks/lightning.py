"""Gates inside `lightning.pytorch.Trainer`: `Trainer(…, callbacks=[GateCallback()])`."""

import math
from typing import Any, Unpack

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from stackproof.contracts.callbacks.record import End, trainer_of
from stackproof.contracts.callbacks.run import GatedRun
from stackproof.contracts.callbacks.session import Mode, Options
from stackproof.contracts.callbacks.settings import Trained, TrainerSettings
from stackproof.contracts.callbacks.watch import Watch

STATE = "stack_gates"


class GateCallback(GatedRun, Callback):
    """Runs the preflight gates when fitting begins, then judges every step, validation, save and
    resume.

    The language model is the LightningModule itself, or its one child that maps ids (B, T) to
    logits (B, T, V); `model` names its attribute if there are several children. The other options
    are `Options`; verdicts go to `gates.jsonl` in the root folder by default. The record is
    written when the run ends, also on an error.
    """

    def __init__(
        self,
        mode: Mode = "raise",
        *,
        model: str = "",
        tokenizer: Any = None,
        **options: Unpack[Options],
    ):
        super().__init__(mode, **options)
        self._name, self._tokenizer = model, tokenizer
        self._document: dict | None = None

    def on_fit_start(self, trainer, pl_module):
        self._open(trainer.default_root_dir)

    def on_train_start(self, trainer, pl_module):
        model = getattr(pl_module, self._name) if self._name else _language_model(pl_module)
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        schedule = trainer.lr_scheduler_configs[0] if trainer.lr_scheduler_configs else None
        scheduler = schedule.scheduler if schedule else None
        trained = Trained(model, optimizer, scheduler, self._tokenizer, trainer.global_step)
        if optimizer is not None:
            configured = {
                "max_grad_norm": trainer.gradient_clip_val,
                "precision": trainer.precision,
            }
            self._open_record(trained, trainer_of(type(trainer), "lightning"), configured)
        # The optimizer may own parameters of the module around the model.
        self._preflight(trained, owner=pl_module)
        if len(trainer.optimizers) != 1:
            return
        self._watch = Watch(
            trained,
            self.session,
            _settings(trainer, trained, schedule),
            phase=lambda: _phase(trainer),
            backward_in_step=True,
        )
        if self._document is not None:
            document, self._document = self._document, None
            self._restored(document)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self._watch is not None:
            self._drawn(batch, trainer.current_epoch, trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self._watch is not None and loss is not None and not math.isfinite(float(loss)):
            self._watch.loss.tell(loss)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self._watch is not None:
            checkpoint[STATE] = self._saved()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self._document = checkpoint.get(STATE)

    def on_fit_end(self, trainer, pl_module):
        if self._watch is not None:
            self._watch.ranks.end(trainer.global_step)
        self._detach()
        self.session.end(End.of(None))

    def on_exception(self, trainer, pl_module, exception):
        self._detach()
        if self.session is not None:
            self.session.end(End.of(exception))


def _settings(trainer: Trainer, trained: Trained, schedule: Any) -> TrainerSettings:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    each_step = schedule is not None and (schedule.interval, schedule.frequency) == ("step", 1)
    return TrainerSettings.of(
        trained,
        scaler,
        max_grad_norm=float(trainer.gradient_clip_val or math.inf),
        clips_values=trainer.gradient_clip_algorithm == "value",
        ticks_per_update=each_step and scaler is None,
        absolute=trainer.world_size == 1,
        held_out_declared=True,
        updates=int(trainer.estimated_stepping_batches),
        accumulates=trainer.accumulate_grad_batches,
    )


def _phase(trainer: Trainer) -> str:
    if trainer.validating or trainer.sanity_checking or trainer.testing:
        return "evaluation"
    return "training" if trainer.training else ""


def _language_model(pl_module: LightningModule) -> nn.Module:
    """The one child with parameters, or the module itself if several children are parts of the
    model.
    """
    children = [m for m in pl_module.children() if any(True for _ in m.parameters())]
    return children[0] if len(children) == 1 and hasattr(children[0], "forward") else pl_module
