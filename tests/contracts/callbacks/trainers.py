"""One small training in three trainers: a plain loop, `transformers.Trainer` and Lightning. Its
parts are plain functions, so that one mistake can be made in each of them.
"""

import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from stackproof.contracts.callbacks import huggingface, lightning
from stackproof.contracts.callbacks.plain import gated
from stackproof.spec.errors import GateFailed
from tests.contracts.callbacks import stock

Batch = dict[str, Tensor]
Hook = Callable[[SimpleNamespace], Any]


def long_rows(n: int, seed: int) -> list[dict]:
    """Rows of 17 to 22 drawn ids, between BOS and EOS: long enough to be told apart."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(15, 21, (n,), generator=draw).tolist()
    ids = [torch.randint(4, stock.VOCAB, (k,), generator=draw).tolist() for k in lengths]
    return [{"input_ids": [stock.BOS, *row, stock.EOS]} for row in ids]


def next_token_loss(model: nn.Module, batch: Batch, n_tokens: int | Tensor | None) -> Tensor:
    """Summed cross-entropy over the tokens of an update; over those of the batch with None."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / ((labels != -100).sum() if n_tokens is None else n_tokens)


def adamw(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr)


def cosine(optimizer: torch.optim.Optimizer, n_updates: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_updates)


@dataclass(frozen=True)
class Parts:
    """What a training consists of. `hooks` are called with the objects of the run: `forward` before
    each micro-batch, `backward` after it, `update` before the optimizer's step, `step` after it,
    `evaluated` after each evaluation. `data(epoch)` gives the rows of an epoch in their order.
    """

    model: Callable[[], nn.Module] = stock.gpt2
    rows: list[dict] = field(default_factory=lambda: long_rows(32, 1))
    held_out: list[dict] = field(default_factory=lambda: long_rows(9, 2))
    held_out_at: Callable[[int], list[dict]] | None = None
    shuffled: bool = True
    collate: Callable[[list[dict]], Batch] = stock.collate
    loss: Callable[[nn.Module, Batch, Any], Tensor] = next_token_loss
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    scheduler: Callable[[torch.optim.Optimizer, int], Any] | None = cosine
    hooks: dict[str, Hook] = field(default_factory=dict)
    evaluation_mode: bool = True
    training_mode_after: bool = True
    tokenizer: Any = None
    epochs: int = 2
    accumulate: int = 2
    evaluates_every: int = 4
    clip_norm: float = 1.0
    clips: bool = True
    zeroes: Callable[[torch.optim.Optimizer], Any] = torch.optim.Optimizer.zero_grad
    ticks: str = "update"
    given: dict[str, Any] = field(default_factory=dict)  # options of the gates
    stated: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.1})

    @property
    def n_updates(self) -> int:
        return len(self.rows) // (2 * self.accumulate) * self.epochs

    def call(self, event: str, run: SimpleNamespace) -> None:
        if hook := self.hooks.get(event):
            hook(run)


def with_parts(**changes: Any) -> Callable[[Parts], Parts]:
    return lambda parts: replace(parts, **changes)


class Ordered(torch.utils.data.Sampler):
    """Another order in each epoch, or the same in all."""

    def __init__(self, parts: Parts):
        self.parts, self.epoch = parts, 0

    def __len__(self) -> int:
        return len(self.parts.rows)

    def __iter__(self):
        seed = self.epoch if self.parts.shuffled else 0
        self.epoch += 1
        draw = torch.Generator().manual_seed(seed)
        return iter(torch.randperm(len(self.parts.rows), generator=draw).tolist())


def loader(parts: Parts) -> torch.utils.data.DataLoader:
    made = torch.utils.data.DataLoader
    return made(parts.rows, 2, sampler=Ordered(parts), collate_fn=parts.collate)


# --- a plain loop ---------------------------------------------------------------------------------


def in_a_loop(parts: Parts, folder: Path) -> Any:
    torch.manual_seed(0)
    model = parts.model()
    optimizer = parts.optimizer(model)
    scheduler = parts.scheduler(optimizer, parts.n_updates) if parts.scheduler else None
    told = {"scheduler": scheduler, "tokenizer": parts.tokenizer, "max_grad_norm": parts.clip_norm}
    run = SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler, step=0)
    model.train()
    gate = None  # a gate may halt before the block begins
    try:
        with gated(model, optimizer, **told, **parts.given) as gate:
            _loop(parts, run, gate)
    except GateFailed as e:
        before = SimpleNamespace(first_failures={e.gate_id: 0}.copy)
        return gate or before, e
    return gate, None


def _loop(parts: Parts, run: SimpleNamespace, gate: Any) -> None:
    batches, model, optimizer = loader(parts), run.model, run.optimizer
    for epoch in range(parts.epochs):
        drawn = iter(batches)
        while micro := list(itertools.islice(drawn, parts.accumulate)):
            n_tokens = sum((b["labels"][:, 1:] != -100).sum() for b in micro)
            for batch in micro:
                gate.batch(batch, epoch=epoch)
                parts.call("forward", run)
                gate.loss(parts.loss(model, batch, n_tokens)).backward()
                parts.call("backward", run)
                if parts.ticks == "micro":
                    run.scheduler.step()
            if parts.clips:
                nn.utils.clip_grad_norm_(model.parameters(), parts.clip_norm)
            parts.call("update", run)
            optimizer.step()
            if run.scheduler and parts.ticks == "update":
                run.scheduler.step()
            parts.zeroes(optimizer)
            run.step += 1
            parts.call("step", run)
            if run.step % parts.evaluates_every == 0:
                _evaluate(parts, run)


def _evaluate(parts: Parts, run: SimpleNamespace) -> None:
    run.model.train(not parts.evaluation_mode)
    held_out = parts.held_out_at(run.step) if parts.held_out_at else parts.held_out
    with torch.no_grad():
        for i in range(0, len(held_out), 4):
            parts.loss(run.model, parts.collate(held_out[i : i + 4]), None)
    run.model.train(parts.training_mode_after)
    parts.call("evaluated", run)


# --- transformers ---------------------------------------------------------------------------------


class InParts(Trainer):
    """A Trainer whose order, loss and moments are those of its `parts`."""

    parts: Parts
    run: SimpleNamespace

    def _get_train_sampler(self, *args, **kwargs):
        return Ordered(self.parts)

    def get_eval_dataloader(self, eval_dataset=None):
        if self.parts.held_out_at:
            eval_dataset = self.parts.held_out_at(self.state.global_step)
        return super().get_eval_dataloader(eval_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not return_outputs:
            return self.parts.loss(model, inputs, num_items_in_batch)
        loss, output = self.parts.loss(model, inputs, None), model(**inputs)
        return loss, output

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.run.step = self.state.global_step
        if self.parts.training_mode_after is False and self.run.step >= 4:
            model.train = lambda mode=True: nn.Module.train(model, False)
        self.parts.call("forward", self.run)
        # Only the first label of a row is never predicted.
        n_tokens = num_items_in_batch
        loss = super().training_step(model, inputs, n_tokens)
        self.parts.call("backward", self.run)
        if self.parts.ticks == "micro":
            self.lr_scheduler.step()
        return loss

    def _clip_grad_norm(self, model):
        return super()._clip_grad_norm(model) if self.parts.clips else torch.tensor(0.1)

    def get_batch_samples(self, iterator, num_batches, device):
        batches, _ = super().get_batch_samples(iterator, num_batches, device)
        return batches, sum((b["labels"][:, 1:] != -100).sum() for b in batches)

    def evaluate(self, *args, **kwargs):
        if not self.parts.evaluation_mode:
            self.model.eval = lambda: self.model.train(True)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.parts.call("evaluated", self.run)


class Hooks(TrainerCallback):
    def __init__(self, parts: Parts, run: SimpleNamespace):
        self.parts, self.run = parts, run

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.parts.call("update", self.run)

    def on_step_end(self, args, state, control, **kwargs):
        self.run.step = state.global_step
        self.parts.call("step", self.run)


def in_transformers(parts: Parts, folder: Path, *, resume=None, **plan: Any) -> Any:
    torch.manual_seed(0)
    model = parts.model()
    optimizer = parts.optimizer(model)
    scheduler = parts.scheduler(optimizer, parts.n_updates) if parts.scheduler else None
    if parts.zeroes is not torch.optim.Optimizer.zero_grad:
        model.zero_grad = lambda *a, **k: parts.zeroes(optimizer)
    callback = huggingface.GateCallback(**parts.given)
    run = SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler, step=0)
    plan = (
        {
            "max_steps": parts.n_updates,
            "gradient_accumulation_steps": parts.accumulate,
            "eval_strategy": "steps",
            "eval_steps": parts.evaluates_every,
            "max_grad_norm": parts.clip_norm,
            "per_device_eval_batch_size": 4,
        }
        | plan
        | parts.stated
    )
    trainer = InParts(
        model,
        stock.arguments(folder, **plan),
        train_dataset=parts.rows,
        eval_dataset=parts.held_out,
        data_collator=parts.collate,
        callbacks=[callback, Hooks(parts, run)],
        optimizers=(optimizer, scheduler),
        processing_class=parts.tokenizer,
    )
    trainer.parts, trainer.run, trainer.model_accepts_loss_kwargs = parts, run, True
    if parts.scheduler is None:
        trainer.create_scheduler = lambda *a, **k: None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except GateFailed as e:
        return callback, e
    return callback, None


# --- Lightning ------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    def __init__(self, parts: Parts):
        super().__init__()
        self.net, self.parts = parts.model(), parts
        self.run = SimpleNamespace(model=self.net, step=0)

    def training_step(self, batch, batch_idx):
        self.run.step = self.global_step
        return self.parts.loss(self.net, batch, None)

    def validation_step(self, batch, batch_idx):
        self.parts.loss(self.net, batch, None)

    def configure_optimizers(self):
        run, parts = self.run, self.parts
        run.optimizer = parts.optimizer(self.net)
        if not parts.scheduler:
            run.scheduler = None
            return run.optimizer
        run.scheduler = parts.scheduler(run.optimizer, parts.n_updates)
        interval = {"scheduler": run.scheduler, "interval": "step"}
        return {"optimizer": run.optimizer, "lr_scheduler": interval}

    def lr_scheduler_step(self, scheduler, metric):
        if self.parts.ticks == "update":
            scheduler.step()

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.parts.zeroes(optimizer)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        if self.parts.clips:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def on_train_batch_start(self, batch, batch_idx):
        self.parts.call("forward", self.run)

    def on_after_backward(self):
        self.parts.call("backward", self.run)
        if self.parts.ticks == "micro":
            self.run.scheduler.step()

    def on_before_optimizer_step(self, optimizer):
        self.parts.call("update", self.run)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.run.step = self.global_step
        self.parts.call("step", self.run)

    def on_validation_model_eval(self):
        self.train(not self.parts.evaluation_mode)

    def on_validation_model_train(self):
        self.train(self.parts.training_mode_after)

    def on_validation_end(self):
        self.parts.call("evaluated", self.run)

    def val_dataloader(self):
        held_out = self.parts.held_out
        if self.parts.held_out_at:
            held_out = self.parts.held_out_at(self.global_step)
        return torch.utils.data.DataLoader(held_out, 4, collate_fn=self.parts.collate)


def in_lightning(parts: Parts, folder: Path, **plan: Any) -> Any:
    torch.manual_seed(0)
    parts = replace(parts, accumulate=1)
    callback = lightning.GateCallback(tokenizer=parts.tokenizer, **parts.given)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback],
        num_sanity_val_steps=0,
        max_epochs=parts.epochs,
        val_check_interval=parts.evaluates_every,
        gradient_clip_val=parts.clip_norm,
        reload_dataloaders_every_n_epochs=int(bool(parts.held_out_at)),
        **quiet | plan,
    )
    module = Module(parts)
    batches = loader(parts)
    module.train_dataloader = lambda: batches
    try:
        trainer.fit(module)
    except GateFailed as e:
        return callback, e
    return callback, None


TRAINERS = {"loop": in_a_loop, "transformers": in_transformers, "lightning": in_lightning}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
