"""Public silent failures of trainers, each as a change of a small training, with the gate that must
see it. They can be made in a plain loop, in `transformers.Trainer` and in Lightning, but for those
that name the trainers in which they exist.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from tests.contracts.callbacks import stock
from tests.contracts.callbacks.merges import OTHER, OWN, encoded
from tests.contracts.callbacks.trainers import (
    Batch,
    Parts,
    adamw,
    long_rows,
    next_token_loss,
    with_parts,
)

LOOP, HF, LIGHTNING = "loop", "transformers", "lightning"
ALL, BY_HAND, ACCUMULATES = (LOOP, HF, LIGHTNING), (LOOP, LIGHTNING), (LOOP, HF)


@dataclass(frozen=True)
class Failure:
    """A change of a training; the gate that is red, empty where none can be, and where."""

    change: Callable[[Parts], Parts]
    gate_id: str
    trainers: tuple[str, ...] = ALL


def hooks(**calls: Callable) -> Callable[[Parts], Parts]:
    return with_parts(hooks=calls)


def at(step: int, do: Callable[[SimpleNamespace], Any]) -> Callable[[SimpleNamespace], None]:
    """A hook that acts after one step."""

    def hook(run: SimpleNamespace) -> None:
        if run.step == step:
            with torch.no_grad():
                do(run)

    return hook


# --- data and tokenizers --------------------------------------------------------------------------


def texts(trained: Any, scored: Any, keep: Callable[[int], int] = lambda i: i):
    """Rows of two tokenizers, in a trainer that was given the first of all."""
    rows = [{"input_ids": [*map(keep, r["input_ids"])]} for r in encoded(trained, 32, 1)]
    return with_parts(tokenizer=OWN, rows=rows, held_out=encoded(scored, 9, 2))


def rows_of(choose: Callable[[list[dict]], list[dict]]) -> Callable[[Parts], Parts]:
    return lambda parts: replace(parts, rows=choose(parts.rows))


def left(rows: list[dict]) -> Batch:
    return stock.collate(rows, "left")


def without_mask(model: nn.Module, batch: Batch, n_tokens: Any) -> Tensor:
    return next_token_loss(model, {k: batch[k] for k in ("input_ids", "labels")}, n_tokens)


def stop_is_padding(rows: list[dict]) -> Batch:
    made = stock.collate(rows)
    ids = torch.where(made["attention_mask"] == 0, stock.EOS, made["input_ids"])
    return made | {"input_ids": ids, "labels": torch.where(ids == stock.EOS, -100, ids)}


def inverted_mask(rows: list[dict]) -> Batch:
    made = stock.collate(rows)
    return made | {"attention_mask": 1 - made["attention_mask"]}


ROWS = "data.fresh-rows"
DATA = {
    "SF-D04 the order of the first epoch in all": Failure(with_parts(shuffled=False), ROWS),
    "SF-D05 workers draw equal rows": Failure(rows_of(lambda r: r[:16] + r[:16]), ROWS),
    "SF-D06 two workers read all rows": Failure(
        rows_of(lambda r: [x for x in r[:16] for _ in (0, 1)]), ROWS
    ),
    "SF-D08 held-out rows are trained on": Failure(
        lambda parts: replace(parts, held_out=parts.rows[:9]), ROWS
    ),
    "SF-D16 only the first rows of a source": Failure(rows_of(lambda r: r[:8] * 4), ROWS),
    "SF-R02 one row twelve times": Failure(rows_of(lambda r: r[:20] + r[:1] * 12), ROWS),
    "SF-E05 each evaluation has other rows": Failure(
        with_parts(held_out_at=lambda step: long_rows(9, 100 + step)), ROWS, (HF, LIGHTNING)
    ),
    "SF-T01 ids overflow": Failure(
        texts(OWN, OWN, lambda i: i if i < 4 else 4 + (i - 4) % 32), "tokenizer.own-ids"
    ),
    "SF-T02 another tokenizer of equal size": Failure(texts(OTHER, OTHER), "tokenizer.own-ids"),
    "SF-T02 another tokenizer in evaluations": Failure(texts(OWN, OTHER), "tokenizer.own-ids"),
    "SF-L07 the stop token is masked as padding": Failure(
        with_parts(model=lambda: stock.gpt2(pad_token_id=stock.EOS), collate=stop_is_padding),
        "data.learnable-batch",
    ),
    "the mask of left padding is dropped": Failure(
        with_parts(collate=left, loss=without_mask), "data.learnable-batch"
    ),
    "the mask is inverted": Failure(with_parts(collate=inverted_mask), "data.learnable-batch"),
}

# --- the model and its mode -----------------------------------------------------------------------


def peeks() -> nn.Module:
    model = stock.gpt2()
    for block in model.transformer.h:
        block.attn.forward = _seeing_one_ahead(block.attn.forward)
    return model


def _seeing_one_ahead(inner: Callable) -> Callable:
    def forward(hidden, *args, **kwargs):
        n = hidden.shape[1]
        mask = torch.full((1, 1, n, n), -1e9).triu(2)
        return inner(hidden, *args, **kwargs | {"attention_mask": mask})

    return forward


def untied() -> nn.Module:
    model = stock.llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


class Wrapped(nn.Module):
    """A GPT-2 with a further layer between body and head, of which `part` decides the effect."""

    def __init__(self, layer: nn.Module | list, effect: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.net, self.layer, self.effect = stock.gpt2(), layer, effect
        self.config = self.net.config
        self.get_input_embeddings = self.net.get_input_embeddings
        self.get_output_embeddings = self.net.get_output_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None):
        body = self.net.transformer(input_ids=input_ids, attention_mask=attention_mask)
        hidden = body.last_hidden_state
        logits = self.net.lm_head(hidden + self.effect(self.layer, hidden))
        return SimpleNamespace(logits=logits)


def in_a_list() -> nn.Module:
    return Wrapped([nn.Linear(32, 32)], lambda layer, hidden: layer[0](hidden))


def unused() -> nn.Module:
    return Wrapped(nn.Linear(32, 32), lambda layer, hidden: 0 * layer(hidden))


def detached() -> nn.Module:
    model = stock.gpt2()
    inner = model.transformer.h[1].mlp.forward
    model.transformer.h[1].mlp.forward = lambda hidden: inner(hidden).detach()
    return model


def evaluates_inside() -> nn.Module:
    model = stock.gpt2()
    inner = model.transformer.forward

    def forward(*args, **kwargs):
        was = model.transformer.training
        model.transformer.eval()
        made = inner(*args, **kwargs)
        model.transformer.train(was)
        return made

    model.transformer.forward = forward
    return model


def evaluation_in_loss(model: nn.Module, batch: Batch, n_tokens: Any) -> Tensor:
    was = model.training
    model.eval()
    loss = next_token_loss(model, batch, n_tokens)
    model.train(was)
    return loss


def no_more_dropout(run: SimpleNamespace) -> None:
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def gradient_zeroed() -> nn.Module:
    model = stock.gpt2()
    model.transformer.h[0].mlp.c_fc.weight.register_hook(torch.zeros_like)
    return model


def half_block() -> nn.Module:
    model = stock.gpt2()
    block = model.transformer.h[1].bfloat16()
    inner = block.forward

    def forward(hidden, *args, **kwargs):
        half = {k: v.bfloat16() if _is_real(v) else v for k, v in kwargs.items()}
        made = inner(hidden.bfloat16(), *args, **half)
        return made.float() if isinstance(made, Tensor) else (made[0].float(), *made[1:])

    block.forward = forward
    return model


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


MODE = "runtime.mode"
MODEL = {
    "SF-M03 the causal mask is off by one": Failure(with_parts(model=peeks), "model.causal"),
    "SF-M13 the head has come loose": Failure(with_parts(model=untied), "model.tied-head"),
    "SF-O02 a layer in a plain list": Failure(
        with_parts(model=in_a_list), "optim.parameter-groups", BY_HAND
    ),
    "SF-O05 an unused layer decays": Failure(with_parts(model=unused), "optim.movement", BY_HAND),
    "SF-O05 a detached branch decays": Failure(
        with_parts(model=detached, zeroes=lambda o: o.zero_grad(set_to_none=False)),
        "optim.movement",
        BY_HAND,
    ),
    "SF-K03 the backward pass gives zeros": Failure(
        with_parts(model=gradient_zeroed), "optim.movement"
    ),
    "SF-E02 evaluation with dropout": Failure(with_parts(evaluation_mode=False), MODE),
    "SF-E03 training stays in evaluation mode": Failure(
        with_parts(training_mode_after=False), MODE
    ),
    "SF-E03 evaluation mode inside the loss": Failure(with_parts(loss=evaluation_in_loss), MODE),
    "SF-E03 evaluation mode inside the forward pass": Failure(
        with_parts(model=evaluates_inside), MODE
    ),
    "SF-E03 dropout is 0 after an evaluation": Failure(hooks(evaluated=no_more_dropout), MODE),
    "SF-E03 one block in evaluation mode": Failure(
        hooks(forward=lambda run: run.model.transformer.h[0].eval()), MODE, BY_HAND
    ),
    "SF-E03 dropout by a function is off": Failure(
        with_parts(
            model=lambda: stock.llama(attention_dropout=0.1),
            hooks={"forward": lambda run: run.model.eval()},
        ),
        MODE,
        BY_HAND,
    ),
    "one seed in all steps": Failure(hooks(forward=lambda run: torch.manual_seed(0)), MODE),
    "SF-P02 weights in bfloat16": Failure(
        with_parts(model=lambda: stock.gpt2().bfloat16(), optimizer=lambda m: adamw(m, 1e-5)),
        "optim.lost-updates",
    ),
    "SF-P02 one block in bfloat16": Failure(
        with_parts(model=half_block, optimizer=lambda m: adamw(m, 1e-6)), "optim.lost-updates"
    ),
}

# --- the loss -------------------------------------------------------------------------------------


def summed(logits: Tensor, labels: Tensor, n_tokens: Any, **options: Any) -> Tensor:
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", **options)
    return total / ((labels != -100).sum() if n_tokens is None else n_tokens)


def loss(of: Callable[[Tensor, Tensor, Any], Tensor]) -> Callable[[Parts], Parts]:
    """A training whose loss is a function of logits (B, T, V), labels (B, T) and their number."""

    def computed(model: nn.Module, batch: Batch, n_tokens: Any) -> Tensor:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return of(logits, batch["labels"], n_tokens)

    return with_parts(loss=computed)


def scaled(factor: float, per_batch: bool = False) -> Callable[[Parts], Parts]:
    def computed(model: nn.Module, batch: Batch, n_tokens: Any) -> Tensor:
        own = next_token_loss(model, batch, None if per_batch else n_tokens)
        return own * factor if model.training else own

    return with_parts(loss=computed)


def with_z_loss(logits: Tensor, labels: Tensor, n: Any) -> Tensor:
    logits, labels = logits[:, :-1], labels[:, 1:]
    squares = (logits.logsumexp(-1).square() * (labels != -100)).sum()
    return summed(logits, labels, n) + 0.1 * squares / (n or (labels != -100).sum())


def across_rows(logits: Tensor, labels: Tensor, n: Any) -> Tensor:
    return summed(logits.flatten(0, 1)[None, :-1], labels.flatten()[None, 1:], n)


def stop_weighs(logits: Tensor, labels: Tensor, n: Any) -> Tensor:
    weight = torch.ones(stock.VOCAB)
    weight[stock.EOS] = 10
    return summed(logits[:, :-1], labels[:, 1:], n, weight=weight)


def in_turn(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Parts], Parts]:
    """A loss that is changed in the seventh training pass."""

    def computed(model: nn.Module, batch: Batch, n_tokens: Any) -> Tensor:
        model.passes = getattr(model, "passes", 0) + model.training
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        if model.training and model.passes == 7:
            return change(logits, batch["labels"])
        return summed(logits[:, :-1], batch["labels"][:, 1:], n_tokens)

    return with_parts(loss=computed)


def hidden_nan(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nan_to_num(summed(logits[:, :-1] * math.nan, labels[:, 1:], None))


def constant_after(model: nn.Module, batch: Batch, n_tokens: Any) -> Tensor:
    model.passes = getattr(model, "passes", 0) + model.training
    if model.training and model.passes > 12:
        return torch.tensor(1.0, requires_grad=True)
    return next_token_loss(model, batch, n_tokens)


GRADIENT = "loss.logit-gradient"
LOSS = {
    "SF-D01 a constant once the data ends": Failure(
        with_parts(loss=constant_after), "optim.movement"
    ),
    "SF-L01 mean of micro-batch means": Failure(scaled(0.5, True), GRADIENT, ACCUMULATES),
    "SF-L02 accumulation is not divided": Failure(scaled(1.0, True), GRADIENT, ACCUMULATES),
    "SF-L02 scaled twice": Failure(scaled(0.5), GRADIENT),
    "SF-L04 labels shifted twice": Failure(
        loss(lambda x, y, n: summed(x[:, :-2], y[:, 2:], n)), GRADIENT
    ),
    "SF-L04 labels not shifted": Failure(loss(summed), GRADIENT),
    "SF-L06 padding in the loss": Failure(
        loss(lambda x, y, n: summed(x[:, :-1], y[:, 1:].clamp_min(0), n)), GRADIENT
    ),
    "SF-L09 z-loss in the loss": Failure(loss(with_z_loss), GRADIENT),
    "SF-L11 targets of the next row": Failure(loss(across_rows), GRADIENT),
    "SF-P05 NaN becomes a number": Failure(in_turn(hidden_nan), "runtime.finite"),
    "SF-P05 a batch times zero": Failure(
        in_turn(lambda x, y: 0 * summed(x[:, :-1], y[:, 1:], None)), GRADIENT
    ),
    "smoothing that is not declared": Failure(
        loss(lambda x, y, n: summed(x[:, :-1], y[:, 1:], n, label_smoothing=0.1)), GRADIENT
    ),
    "the stop token weighs ten times": Failure(loss(stop_weighs), GRADIENT),
}

# --- the optimizer and the schedule ---------------------------------------------------------------


def partial(model: nn.Module) -> torch.optim.Optimizer:
    left_out = "h.1.mlp.c_fc.weight"
    return torch.optim.AdamW(
        [p for n, p in model.named_parameters() if not n.endswith(left_out)], lr=1e-3
    )


def freeze(run: SimpleNamespace) -> None:
    run.model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)


def zero_trained(optimizer: torch.optim.Optimizer) -> None:
    for p in (p for g in optimizer.param_groups for p in g["params"]):
        if p.requires_grad and p.grad is not None:
            p.grad.zero_()


class Twice(torch.optim.AdamW):
    """Takes two steps where one is asked for."""

    def step(self, closure=None):
        super().step(closure)
        return super().step()


class FirstGroup(torch.optim.lr_scheduler.CosineAnnealingLR):
    """Changes the rate of the first group only."""

    def step(self, *args):
        kept = [g["lr"] for g in self.optimizer.param_groups[1:]]
        super().step(*args)
        for group, lr in zip(self.optimizer.param_groups[1:], kept):
            group["lr"] = lr


def each_tensor_clipped(run: SimpleNamespace) -> None:
    for p in run.model.parameters():
        if p.grad is not None:
            nn.utils.clip_grad_norm_(p, 0.01)


def group_set(name: str, value: Any) -> Callable[[SimpleNamespace], None]:
    return lambda run: [g.update({name: value}) for g in run.optimizer.param_groups]


def of_micro_batches(optimizer: torch.optim.Optimizer, n: int) -> Any:
    return get_cosine_schedule_with_warmup(optimizer, 2, 2 * n)


OPTIMIZER = {
    "SF-O01 a parameter is in no group": Failure(
        with_parts(optimizer=partial), "optim.parameter-groups"
    ),
    "SF-O01 the optimizer owns a copy": Failure(
        with_parts(optimizer=lambda m: adamw(copy.deepcopy(m))), "optim.parameter-groups"
    ),
    "SF-O04 frozen later, moved by an old gradient": Failure(
        with_parts(hooks={"step": at(3, freeze)}, zeroes=zero_trained), "optim.movement", (LOOP,)
    ),
    "SF-O07 a decay that is stated is not used": Failure(
        with_parts(optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.0)),
        "optim.declared-settings",
        (HF,),
    ),
    "SF-S01 a warm-up that is stated is not used": Failure(
        with_parts(stated={"warmup_steps": 4}), "optim.declared-settings", (HF,)
    ),
    "decay on gains": Failure(
        with_parts(optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.1)),
        "optim.decay-groups",
    ),
    "SF-O08 nothing is clipped": Failure(with_parts(clips=False, clip_norm=0.1), "optim.clip-norm"),
    "SF-O08 each tensor is clipped alone": Failure(
        hooks(update=each_tensor_clipped), "optim.clip-norm"
    ),
    "SF-O09 gradients are kept": Failure(with_parts(zeroes=lambda o: None), "optim.gradient-kept"),
    "gradients are zeroed in each micro-step": Failure(
        hooks(forward=lambda run: run.optimizer.zero_grad()), "optim.gradient-kept", ACCUMULATES
    ),
    "SF-O11 the counter of updates stands": Failure(
        hooks(step=lambda run: [s["step"].fill_(1) for s in run.optimizer.state.values()]),
        "optim.movement",
    ),
    "two steps in one": Failure(
        with_parts(optimizer=lambda m: Twice(m.parameters(), 1e-3)), "optim.movement"
    ),
    "one gradient, two updates": Failure(
        hooks(update=lambda run: run.optimizer.step()), "optim.gradient-kept", ACCUMULATES
    ),
    "SF-S02 the schedule ticks in each micro-step": Failure(
        with_parts(ticks="micro"), "schedule.rate", ACCUMULATES
    ),
    "the schedule never ticks": Failure(with_parts(ticks="never"), "schedule.rate", BY_HAND),
    "the schedule counts micro-batches": Failure(
        with_parts(scheduler=of_micro_batches), "schedule.rate", (HF,)
    ),
    "the schedule moves one group": Failure(with_parts(scheduler=FirstGroup), "schedule.rate"),
    "SF-R06 a hook sets the rate": Failure(
        hooks(update=at(5, group_set("lr", 1e-2))), "schedule.rate"
    ),
    "SF-S04 the decay is lost": Failure(
        hooks(step=at(5, group_set("weight_decay", 0.0))), "optim.movement"
    ),
    "betas change": Failure(hooks(step=at(6, group_set("betas", (0.5, 0.9)))), "optim.movement"),
}

# --- what changes between updates -----------------------------------------------------------------


def weight(run: SimpleNamespace) -> Tensor:
    return run.model.transformer.h[0].mlp.c_fc.weight


def moments(run: SimpleNamespace) -> dict[str, Tensor]:
    return list(run.optimizer.state.values())[3]


def averaged(run: SimpleNamespace) -> None:
    for p in run.model.parameters():
        p.data.mul_(0.99)


class Reloads:
    """Keeps the weights of one step and loads them again at another."""

    def __call__(self, run: SimpleNamespace) -> None:
        if run.step == 2:
            self.kept = copy.deepcopy(run.model.state_dict())
        if run.step == 6:
            run.model.load_state_dict(self.kept)


def moments_rounded(run: SimpleNamespace) -> None:
    state = run.optimizer.state_dict()
    for one in state["state"].values():
        one["exp_avg"] = one["exp_avg"].bfloat16().float()
    run.optimizer.load_state_dict(state)


def moments_exchanged(run: SimpleNamespace) -> None:
    state = run.optimizer.state_dict()
    alike = [k for k, s in state["state"].items() if s["exp_avg"].shape == (32,)]
    held = [copy.deepcopy(state["state"][k]) for k in alike]
    state["state"] |= dict(zip(alike, held[1:] + held[:1]))
    run.optimizer.load_state_dict(state)


def head_loosened(run: SimpleNamespace) -> None:
    run.model.lm_head.weight = nn.Parameter(run.model.lm_head.weight.detach().clone())


BETWEEN = {
    "SF-C15 averaged weights stay after an evaluation": hooks(evaluated=at(4, averaged)),
    "one weight changes": hooks(step=at(5, lambda r: weight(r)[0, :1].add_(1e-3))),
    "one weight changes through data": hooks(
        step=at(5, lambda r: weight(r).data[0, :1].add_(1e-3))
    ),
    "weights are rounded": hooks(
        step=at(5, lambda r: [p.copy_(p.bfloat16()) for p in r.model.parameters()])
    ),
    "weights are clamped": hooks(
        step=lambda r: [p.data.clamp_(-0.03, 0.03) for p in r.model.parameters()]
    ),
    "old weights are loaded": lambda parts: replace(parts, hooks={"step": Reloads()}),
    "a moment is zeroed": hooks(step=at(5, lambda r: moments(r)["exp_avg"].zero_())),
    "one entry of a moment": hooks(
        step=at(5, lambda r: moments(r)["exp_avg_sq"].view(-1)[:1].mul_(4))
    ),
    "moments are dropped": hooks(step=at(5, lambda r: r.optimizer.state.clear())),
    "moments are rounded": hooks(step=at(5, moments_rounded)),
    "moments of other parameters": hooks(step=at(5, moments_exchanged)),
    "the head comes loose": hooks(step=at(5, head_loosened)),
}
FAILURES = (DATA | MODEL | LOSS | OPTIMIZER) | {
    name: Failure(change, "optim.movement") for name, change in BETWEEN.items()
}

# --- what no gate sees, with the reason in docs/anywhere.md ---------------------------------------


class Decays(torch.optim.AdamW):
    """Decays once more after the step."""

    def step(self, closure=None):
        made = super().step(closure)
        with torch.no_grad():
            for p in (p for g in self.param_groups for p in g["params"]):
                p.mul_(0.99)
        return made


def halved() -> nn.Module:
    model = stock.gpt2()
    model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient / 2)
    return model


def flipped(run: SimpleNamespace) -> None:
    weight(run).grad.view(torch.int32)[0, :1].bitwise_xor_(1 << 22)


UNSEEN = {
    "SF-K05 the backward pass halves one gradient": Failure(with_parts(model=halved), ""),
    "SF-HW1 a bit flips in a gradient": Failure(hooks(update=at(5, flipped)), ""),
    "SF-O13 an optimizer with a rule of its own": Failure(
        with_parts(optimizer=lambda m: Decays(m.parameters(), 1e-3), stated={}), ""
    ),
    "SF-P03 the loss is reduced in bfloat16": Failure(
        loss(lambda x, y, n: summed(x[:, :-1].bfloat16(), y[:, 1:], n)), ""
    ),
    "rows are cut before the stop token": Failure(
        rows_of(lambda rows: [{"input_ids": r["input_ids"][:-1]} for r in rows]), ""
    ),
    "the schedule counts micro-batches": Failure(
        with_parts(scheduler=of_micro_batches), "", (LOOP,)
    ),
}
