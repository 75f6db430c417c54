"""Clean trainings in ways that look unusual from outside, of which no gate may be red."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.contracts.callbacks import stock
from tests.contracts.callbacks.failures import (
    ACCUMULATES,
    ALL,
    BY_HAND,
    LOOP,
    Failure,
    hooks,
    rows_of,
    texts,
)
from tests.contracts.callbacks.merges import OWN
from tests.contracts.callbacks.trainers import (
    Batch,
    Parts,
    adamw,
    long_rows,
    next_token_loss,
    with_parts,
)


class Averaged:
    """Averaged weights are in the model while it is evaluated, and then its own again."""

    def __init__(self, write: Callable[[nn.Parameter, Tensor], Any]):
        self.write, self.mean, self.own = write, None, None

    def step(self, run: SimpleNamespace) -> None:
        now = [p.detach().clone() for p in run.model.parameters()]
        self.mean = self.mean or now
        self.mean = [old.lerp(new, 0.1) for old, new in zip(self.mean, now)]
        if run.step % 4 == 0:
            self.own = now
            self._put(run, self.mean)

    def evaluated(self, run: SimpleNamespace) -> None:
        if self.own is not None:
            self._put(run, self.own)
            self.own = None

    @torch.no_grad()
    def _put(self, run: SimpleNamespace, tensors: list[Tensor]) -> None:
        for p, value in zip(run.model.parameters(), tensors):
            self.write(p, value)


def averaged(write: Callable[[nn.Parameter, Tensor], Any]) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        swap = Averaged(write)
        return replace(parts, hooks={"step": swap.step, "evaluated": swap.evaluated})

    return change


def data_replaced(p: nn.Parameter, value: Tensor) -> None:
    p.data = value.clone()


def optimizer(make: Callable, **options: Any) -> Callable[[Parts], Parts]:
    return with_parts(optimizer=lambda m: make(m.parameters(), lr=1e-3, **options), stated={})


class Sub(torch.optim.AdamW):
    """An optimizer that adds nothing to its base class."""

    def step(self, closure=None):
        return super().step(closure)


def offloaded(run: SimpleNamespace) -> None:
    for state in run.optimizer.state.values():
        state.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})
    for p in run.model.parameters():
        p.data = p.data.clone()


def adapted(checkpointed: bool = False) -> nn.Module:
    import peft

    told = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    config = peft.LoraConfig(**told, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(stock.llama(), config)
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return model


def checkpointed() -> nn.Module:
    model = stock.gpt2()
    model.gradient_checkpointing_enable()
    return model


def half_frozen() -> nn.Module:
    model = stock.gpt2()
    model.transformer.h[0].requires_grad_(False)
    return model


def unfreeze(run: SimpleNamespace) -> None:
    run.model.transformer.h[0].requires_grad_(run.step >= 3)


def in_bfloat16(model: nn.Module, batch: Batch, n_tokens: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return next_token_loss(model, batch, n_tokens)


def two_passes(model: nn.Module, batch: Batch, n_tokens: Any) -> Tensor:
    """Two passes over one batch, with other masks of dropout."""
    first = next_token_loss(model, batch, n_tokens)
    return (first + next_token_loss(model, batch, n_tokens)) / 2 if model.training else first


def prompts_masked(rows: list[dict]) -> Batch:
    made = stock.collate(rows)
    prompt = made["attention_mask"].cumsum(1) <= 5
    return made | {"labels": made["labels"].masked_fill(prompt, -100)}


def one_cycle(optimizer: torch.optim.Optimizer, n: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=n + 1)


def decay_scheduled(run: SimpleNamespace) -> None:
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.1 * (1 - run.step / 50)


CHANGES = {
    "plain": (with_parts(), ALL),
    "ids of its tokenizer": (texts(OWN, OWN), ALL),
    "averaged weights are copied in": (averaged(lambda p, value: p.copy_(value)), ALL),
    "averaged weights by data": (averaged(lambda p, value: p.data.copy_(value)), ALL),
    "averaged weights as new tensors": (averaged(data_replaced), ALL),
    "state is offloaded and comes back": (hooks(step=offloaded), ALL),
    "rates and betas in one cycle": (with_parts(scheduler=one_cycle), ALL),
    "decay has a schedule": (hooks(step=decay_scheduled), ALL),
    "an optimizer of ones own": (optimizer(Sub), ALL),
    "fused": (optimizer(torch.optim.AdamW, fused=True), ALL),
    "amsgrad": (optimizer(torch.optim.AdamW, amsgrad=True), ALL),
    "Adafactor": (optimizer(torch.optim.Adafactor), (LOOP,)),
    "SGD": (optimizer(torch.optim.SGD, momentum=0.9), ALL),
    "RMSprop": (optimizer(torch.optim.RMSprop), (LOOP,)),
    "gradients stay as zeros": (
        with_parts(zeroes=lambda o: o.zero_grad(set_to_none=False)),
        BY_HAND,
    ),
    "adapters": (with_parts(model=adapted), ALL),
    "adapters with recomputation": (with_parts(model=lambda: adapted(True)), ALL),
    "recomputation": (with_parts(model=checkpointed), ALL),
    "a frozen block": (with_parts(model=half_frozen), ALL),
    "a frozen block in evaluation mode": (
        with_parts(
            model=half_frozen, hooks={"forward": lambda run: run.model.transformer.h[0].eval()}
        ),
        ALL,
    ),
    "a block is unfrozen": (
        with_parts(
            model=half_frozen,
            optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-3),
            hooks={"step": unfreeze},
            stated={},
        ),
        ALL,
    ),
    "no dropout, in evaluation mode": (
        with_parts(model=stock.llama, hooks={"forward": lambda run: run.model.eval()}),
        (LOOP,),
    ),
    "dropout by a function": (
        with_parts(model=lambda: stock.llama(attention_dropout=0.1)),
        ALL,
    ),
    "two passes over a batch": (
        with_parts(loss=two_passes, given={"skip": ("loss.logit-gradient",)}),
        ALL,
    ),
    "bfloat16 by autocast": (with_parts(loss=in_bfloat16), ALL),
    "bfloat16 at a large rate": (
        with_parts(model=lambda: stock.gpt2().bfloat16(), optimizer=adamw),
        ALL,
    ),
    "left padding": (with_parts(collate=lambda rows: stock.collate(rows, "left")), ALL),
    "masked prompts": (with_parts(collate=prompts_masked), ALL),
    "accumulation of four": (with_parts(accumulate=4), ACCUMULATES),
    "four epochs": (with_parts(epochs=4), ALL),
    "two rows are twice in the data": (rows_of(lambda rows: rows[:30] + rows[:2]), ALL),
    "two held-out sets": (
        with_parts(held_out_at=lambda step: long_rows(9, 2) + long_rows(9, 3)),
        ALL,
    ),
    "held-out rows are drawn in a loop": (
        with_parts(held_out_at=lambda step: long_rows(9, 100 + step)),
        (LOOP,),
    ),
    "a schedule beyond the run": (
        with_parts(scheduler=lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, 1000)),
        ALL,
    ),
}
CLEAN = {name: Failure(change, "", trainers) for name, (change, trainers) in CHANGES.items()}
