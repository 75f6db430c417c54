"""A stock Trainer script on every rank of a pool, and what goes wrong in it silently. A plant is
code of these processes: no argument of the script applies one.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate import DistributedType, PartialState
from torch.distributed import distributed_c10d
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import TrainerCallback

from stackproof.contracts.callbacks import ranks
from stackproof.contracts.callbacks.plain import gated
from stackproof.spec.errors import StackproofError
from tests.contracts.callbacks import stock
from tests.contracts.callbacks.stock import BOS, EOS, VOCAB, GateCallback, Trainer

N_ROWS = 32
PLAN = {"max_steps": 3, "ddp_backend": "gloo", "logging_strategy": "steps", "logging_steps": 2}


def long_rows(n: int) -> list[dict]:
    """Rows that are long enough for a hash, of different lengths."""
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(16, 30, (n,), generator=draw).tolist()
    return [
        {"input_ids": [BOS, *torch.randint(4, VOCAB, (k,), generator=draw).tolist(), EOS]}
        for k in lengths
    ]


def rank() -> int:
    return int(os.environ["RANK"])


# --- plants ---------------------------------------------------------------------------------------


class SameRows(Trainer):
    """The data loader of a script for one process."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, 2, collate_fn=self.data_collator)


class OwnOrder(Trainer):
    """A sampler of its own on each rank, with the number of the rank in its seed."""

    def get_train_dataloader(self):
        draw = torch.Generator().manual_seed(11 * (1 + rank()))
        sampler = RandomSampler(self.train_dataset, generator=draw)
        return DataLoader(self.train_dataset, 2, sampler=sampler, collate_fn=self.data_collator)


class OneOrder(Trainer):
    """The order of an epoch is drawn once."""

    def _get_train_sampler(self, *given):
        return SequentialSampler(self.train_dataset)


class NeverReduced(Trainer):
    """The loss is that of the original model, beside its wrapper."""

    def compute_loss(self, model, *args, **kwargs):
        return super().compute_loss(self.model, *args, **kwargs)


class MeanOfRanks(Trainer):
    """Each rank divides by its own tokens, and the trainer states a mean over all."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits, labels)
        return (loss, outputs) if return_outputs else loss


class DividedTwice(Trainer):
    """What the trainer multiplies with the number of ranks is divided by it again."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return found / self.args.world_size


class UnshiftedOnOne(Trainer):
    """On the last rank every logit is compared with its own token."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if rank() == 0:
            return super().compute_loss(model, inputs, *args, **kwargs)
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


class Moves(TrainerCallback):
    """One rank alone changes a weight after a step, or before the first."""

    def __init__(self, step: int):
        self.step = step

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters())[5, 0] += 0.5 * rank()

    on_step_end = on_train_begin


def own_loss_logged() -> None:
    transformers.trainer.nested_gather = lambda loss, *given: loss


def not_connected() -> None:
    """The framework finds no launcher, as where it looks for variables that are not set."""
    PartialState._prepare_backend = lambda *given, **named: (None, DistributedType.NO)


class Case:
    """A run of the script: the trainer that it uses, what is changed before it, the gates
    that are left out, its arguments.
    """

    def __init__(
        self,
        trainer: type[Trainer] = Trainer,
        before: Callable[[], None] = lambda: None,
        first: tuple[TrainerCallback, ...] = (),
        skip: tuple[str, ...] = (),
        **plan: Any,
    ):
        self.trainer, self.before, self.first, self.plan = trainer, before, first, plan
        self.skip = skip


def cases() -> dict[str, Case]:
    """Every run by name."""
    saves = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    epochs = {"max_steps": -1, "num_train_epochs": 2}
    return {
        "clean": Case(gradient_accumulation_steps=2, **saves | epochs),
        "declared mean of ranks": Case(average_tokens_across_devices=False),
        "not connected": Case(before=not_connected, ddp_backend=None),
        "same rows": Case(SameRows, max_steps=6),
        "own order": Case(OwnOrder, **epochs),
        "one order": Case(OneOrder, per_device_train_batch_size=13, **epochs),
        "never reduced": Case(NeverReduced),
        "mean of ranks": Case(MeanOfRanks),
        "divided twice": Case(DividedTwice),
        "own loss logged": Case(before=own_loss_logged),
        "own weights": Case(first=(Moves(0),)),
        "moved on one": Case(first=(Moves(1),), skip=("optim.movement",), max_steps=4),
        "moved before a save": Case(first=(Moves(2),), **saves),
        "moved, not compared": Case(first=(Moves(2),), skip=("distributed.replicas",), **saves),
        "unshifted on one": Case(UnshiftedOnOne),
    }


# --- the script -----------------------------------------------------------------------------------


def run(name: str, folder: Path, gated: str = "every rank") -> dict[str, Any]:
    """Train once on this rank: the error that ended it, the first failures, the outcome and message
    of every gate, and the measurements of those of several ranks.
    """
    case = cases()[name]
    case.before()
    callback = GateCallback(record=folder / "record", skip=case.skip)
    watched = (*case.first, callback) if gated == "every rank" or rank() == 0 else ()
    data = long_rows(52 if name == "one order" else N_ROWS)
    trainer = case.trainer(
        stock.llama(),
        stock.arguments(folder, **PLAN | case.plan),
        train_dataset=data,
        eval_dataset=long_rows(6),
        data_collator=stock.collate,
        callbacks=list(watched),
    )
    error = None
    try:
        trainer.train()
    except StackproofError as e:
        error = e
    verdicts = callback.verdicts()
    return {
        "error": error and f"{type(error).__name__}: {error.what}",
        "red": callback.first_failures(),
        "outcomes": {g: v.outcome for g, v in verdicts.items()},
        "messages": {g: v.message for g, v in verdicts.items()},
        "measured": {g: dict(v.measured) for g, v in verdicts.items() if "distributed" in g},
        "weights": float(sum(p.detach().double().sum() for p in trainer.model.parameters())),
    }


def run_on_one(folder: Path) -> dict[str, Any]:
    """The script with the callback on rank 0 alone."""
    ranks.JOIN_TIMEOUT = timedelta(seconds=4)
    return run("clean", folder, gated="rank 0")


def loop(n_steps: list[int]) -> dict[str, Any]:
    """A loop by hand in which every rank takes a number of steps of its own. `groups` are those
    that the gates leave behind.
    """
    torch.distributed.init_process_group("gloo")
    groups = set(distributed_c10d._world.pg_map)
    model, batch = stock.llama(), stock.collate(long_rows(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gated(model, optimizer, mode="log", only=("distributed.replicas",)) as gate:
        for _ in range(n_steps[rank()]):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    verdict = gate.verdicts()["distributed.replicas"]
    left = len(set(distributed_c10d._world.pg_map) - groups)
    return {"red": gate.first_failures(), "message": verdict.message, "groups": left}


def lightning(folder: Path, sampler: bool) -> dict[str, Any]:
    """A Lightning trainer, with its distributed sampler or without."""
    import lightning.pytorch as pl

    from stackproof.contracts.callbacks.lightning import GateCallback as Gates

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = stock.llama()

        def training_step(self, batch, batch_idx):
            return self.net(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    os.environ["TORCHELASTIC_RUN_ID"] = "tests"  # by which Lightning knows its launcher
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    gates = Gates(record=folder / "record")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=6,
        use_distributed_sampler=sampler,
        callbacks=[gates],
        default_root_dir=folder,
        **dict.fromkeys(quiet, False),
    )
    error = None
    try:
        trainer.fit(Module(), DataLoader(long_rows(N_ROWS), 2, collate_fn=stock.collate))
    except StackproofError as e:
        error = str(e)
    verdicts = gates.verdicts()
    return {
        "error": error,
        "red": gates.first_failures(),
        "outcomes": {g: v.outcome for g, v in verdicts.items()},
        "messages": {g: v.message for g, v in verdicts.items()},
    }
