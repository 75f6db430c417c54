"""Inputs of the preflight gates: the run's own model, data, loss, optimizer and checkpoints,
with fewer rows.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.config import Optim, RunConfig
from stackproof.contracts.keeper import Gatekeeper
from stackproof.data.ingredients import data_ingredients
from stackproof.data.prepare import Dataset
from stackproof.data.reader import Batch, model_inputs
from stackproof.evaluate.ingredients import model_ingredients
from stackproof.gate_inputs.digest import digest, live_sha256
from stackproof.gate_inputs.dropout import branch_draws
from stackproof.gate_inputs.head import loss_scale_ingredients
from stackproof.gate_inputs.reporting import (
    applied_steps,
    begun,
    computed_dtypes,
    own_step,
    reported_steps,
)
from stackproof.model import moe
from stackproof.model.build import build_model
from stackproof.model.forward_context import Report
from stackproof.spec.formulas import parameter_count
from stackproof.subject.assemble import subject_of
from stackproof.subject.run import small_run as shrunk
from stackproof.train import checkpoint, losses
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.rng import generator, stream_seed
from stackproof.train.state import TrainState, build_state


def micro(cfg: RunConfig) -> RunConfig:
    """A model of a few hundred parameters, for gates that judge files and not arithmetic."""
    model = cfg.model.model_copy(
        update={
            "d_model": 16,
            "n_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 1,
            "head_dim": 8,
            "d_ff": 16,
            "max_seq_len": min(16, cfg.model.max_seq_len),
        }
    )
    train = cfg.train.model_copy(
        update={"micro_batch_size": 1, "tokens_per_step": model.max_seq_len, "compile": False}
    )
    return cfg.model_copy(
        update={
            "model": model,
            "train": train,
            "data": cfg.data.model_copy(update={"on_exhausted": "wrap"}),
        }
    )


def preflight(
    cfg: RunConfig,
    dataset: Dataset,
    device: torch.device,
    keeper: Gatekeeper,
    progress: Callable[..., None],
    *,
    n_eval_batches: int | None,
) -> int:
    """Run every preflight gate. torch's random state is the same afterwards.
    Returns the number of held-out batches to use.

    Raises GateFailed for the first red gate that halts, after all were asked.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        n_eval_batches, ingredients = gather(cfg, dataset, device, n_eval_batches=n_eval_batches)
        keeper.preflight(ingredients, progress)
    return n_eval_batches


def gather(
    cfg: RunConfig, dataset: Dataset, device: torch.device, *, n_eval_batches: int | None = None
) -> tuple[int, dict[str, Any]]:
    """All ingredients of all preflight gates, and the number of held-out batches
    the power check asks for.
    """
    vocab_size = dataset.tokenizer.vocab_size
    n_params = parameter_count(cfg.model.model_dump(), vocab_size)
    build = lambda: build_model(  # noqa: E731
        cfg.model, vocab_size, seed=stream_seed(cfg.seed, "init"), device=device
    )
    ingredients: dict[str, Any] = data_ingredients(
        cfg,
        dataset,
        n_params=n_params,
        planned_tokens=cfg.train.max_steps * cfg.train.tokens_per_step,
        order_seed=stream_seed(cfg.seed, "order"),
    )
    ingredients |= model_ingredients(cfg, build(), dataset.tokenizer)
    ingredients |= _training_ingredients(cfg, dataset, device, build)
    ingredients |= _checkpoint_ingredients(cfg, dataset, device)
    ingredients |= loss_scale_ingredients(shrunk(cfg), dataset, device)
    subject = subject_of(cfg, dataset, device, n_eval_batches=n_eval_batches)
    return subject.stopping.n_eval_batches, ingredients | {"subject": subject}


def advance(state: TrainState) -> float:
    """Draw one step's batches and make one update; returns the loss in nats."""
    batches = [state.reader.draw() for _ in range(state.cfg.accumulation())]
    return steps.train_step(state, batches).loss_nats


def advance_and_judge(state: TrainState) -> float:
    """`advance`, and what an evaluation after it would change: running means, the stop rule's
    memory and the best step.
    """
    nats = advance(state)
    state.last_val_nats = nats
    state.stopper.update((nats, 1.01 * nats))
    state.best = {"step": state.step, "val_loss_nats": nats}
    return nats


def _training_ingredients(
    cfg: RunConfig, dataset: Dataset, device: torch.device, build: Callable[[], nn.Module]
) -> dict[str, Any]:
    vocab_size, seq_len = dataset.tokenizer.vocab_size, min(cfg.model.max_seq_len, 64)
    draw = generator(cfg.seed, "preflight")
    ids = torch.randint(0, vocab_size, (5, seq_len), generator=draw)
    ragged = torch.randint(0, vocab_size, (5, seq_len), generator=draw)
    for row in range(5):
        ragged[row, : row * seq_len // 6] = losses.IGNORE_INDEX
    census = Batch(
        ids[:4],
        torch.randint(0, vocab_size, (4, seq_len), generator=draw),
        tuple(range(4)),
        0,
        0,
        4,
    )
    exact = shrunk(cfg).model_copy(
        update={"train": shrunk(cfg).train.model_copy(update={"dtype": "float32"})}
    )
    return {
        "build_model": build,
        "make_optimizer": lambda model: opt.make_optimizer(model, cfg.optim),
        "train_on": lambda model, optimizer, batch: train_on(cfg, device, model, optimizer, batch),
        "census_update": lambda model, optimizer, batch: census_update(
            cfg, device, model, optimizer, batch
        ),
        "loss_of": lambda model, batch: loss_of(device, model, batch),
        "census_batch": census,
        "declared_law": declared_law(cfg.optim),
        "cross_entropy_sum": lambda logits_BTV, labels_BT: _cross_entropy_sum(
            logits_BTV, labels_BT, device
        ),
        "micro_batch_nats": lambda logits_BTV, ids_BT, labels_BT: _micro_batch_nats(
            logits_BTV, ids_BT, labels_BT, device
        ),
        "gradient_of": _gradient_of(exact, dataset, device),
        "poisoned_step": lambda which: poisoned_step(exact, dataset, device, which),
        "accumulated_gradients": lambda model, parts: accumulated_gradients(
            cfg, device, model, parts
        ),
        "ragged_batch": (ids, ragged),
        "clip": lambda grads: _clip(cfg, grads)[1],
        "reported_steps": lambda: reported_steps(exact, dataset, device),
        "computed_dtypes": lambda: computed_dtypes(shrunk(cfg), dataset, device),
        "declared_dtype": cfg.train.dtype,
        "begun": lambda offset: begun(shrunk(cfg), dataset, device, offset),
        "own_step": lambda: own_step(exact, dataset, device),
        "applied_steps": lambda: applied_steps(exact, dataset, device, declared_law(cfg.optim)),
        "declared_updates": {
            "schedule": cfg.schedule.model_dump(),
            "max_steps": cfg.train.max_steps,
            "max_grad_norm": cfg.optim.max_grad_norm,
        },
        "clip_model": lambda model: _clip(cfg, opt.gradients(model)),
        "branch_draws": lambda: branch_draws(shrunk(cfg), dataset, device),
        "dropout": cfg.model.dropout,
        "n_layers": cfg.model.n_layers,
    }


def declared_law(optim: Optim) -> Callable[[str, Tensor], dict[str, Any]]:
    """What the configuration promises each parameter, told by its shape and place and not by
    the optimizer's own table.
    """
    adamw = {
        "rule": "adamw",
        "lr": getattr(optim, "adamw_lr", optim.lr),
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.eps,
    }

    def law(name: str, parameter: Tensor) -> dict[str, Any]:
        decay = {"weight_decay": optim.weight_decay if parameter.ndim >= 2 else 0.0}
        in_block = parameter.ndim == 2 and name.startswith("layers.") and ".router." not in name
        return (
            optim.model_dump() | {"rule": "muon"} if optim.kind == "muon" and in_block else adamw
        ) | decay

    return law


def _bench(
    model: Any, optimizer: torch.optim.Optimizer, device: torch.device, cfg: RunConfig | None = None
) -> SimpleNamespace:
    """The part of a TrainState that `accumulate` and, given `cfg`, `apply_gradients` use, around
    another model, in float32.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return SimpleNamespace(
        features=model.hidden_states,
        optimizer=optimizer,
        device=device,
        autocast=nullcontext,
        scaler=scaler,
        model=model,
        loads=[],
        cfg=cfg,
    )


def _update(bench: SimpleNamespace, batches: list[Batch]) -> float:
    """One update by the stack's own steps; returns the loss in nats."""
    loss_nats, _ = steps.accumulate(bench, batches)
    grads = opt.gradients(bench.model)
    steps.apply_gradients(bench, grads, opt.global_norm(grads))
    return loss_nats


def train_on(
    cfg: RunConfig,
    device: torch.device,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
) -> float:
    """One update of any model by the stack's own accumulation, clipping and what follows;
    returns the loss in nats.
    """
    return _update(_bench(model, optimizer, device, cfg), [batch])


def census_update(
    cfg: RunConfig,
    device: torch.device,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
) -> set[str]:
    """One update; returns the names of the parameters of experts that no
    token of the batch chose.
    """
    bench = _bench(model, optimizer, device, cfg)
    _update(bench, [batch])
    idle = [
        (layer, e)
        for layer, n_E in enumerate(moe.totals(bench.loads))
        for e in range(len(n_E))
        if not n_E[e]
    ]
    prefixes = tuple(f"layers.{layer}.ffn.experts.{e}." for layer, e in idle)
    return {n for n, _ in model.named_parameters() if prefixes and n.startswith(prefixes)}


def loss_of(device: torch.device, model: nn.Module, batch: Batch) -> Tensor:
    """Summed loss of a batch in nats, shape (), with its graph:
    every weight that the run's own forward uses.
    """
    x_BTD, report = model.hidden_states(*model_inputs(batch, device))
    nats = losses.linear_cross_entropy_sum(x_BTD, model.head_weight, batch.labels.to(device))
    return nats + losses.balance_term(report.loads, model.balance_weight)


def accumulated_gradients(
    cfg: RunConfig,
    device: torch.device,
    model: nn.Module,
    parts: Sequence[tuple[Tensor, Tensor, Tensor | None]],
) -> tuple[float, dict[str, Tensor]]:
    """(mean loss in nats, gradients by name) of any model by the stack's own accumulation over
    micro-batches of ids, labels, documents.
    """
    model.activation_checkpointing = cfg.train.activation_checkpointing == "blocks"
    batches = [
        Batch(ids, labels, tuple(range(len(ids))), 0, 0, len(ids), documents)
        for ids, labels, documents in parts
    ]
    nats, _ = steps.accumulate(
        _bench(model, torch.optim.SGD(model.parameters(), lr=0.0), device), batches
    )
    return nats, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _equal_rows(cfg: RunConfig, vocab_size: int, n_micro: int, step: int = 0) -> list[Batch]:
    """Micro-batches of one row each; all alike, unless `step` makes each its own."""
    seq_len = min(cfg.model.max_seq_len, 64)
    rows = [
        torch.randint(
            0, vocab_size, (1, seq_len + 1), generator=generator(cfg.seed, "experts", step * i)
        )
        for i in range(n_micro)
    ]
    return [Batch(row[:, :-1], row[:, 1:], (i,), 0, i, i + 1) for i, row in enumerate(rows)]


def _clip(cfg: RunConfig, grads: list[Tensor]) -> tuple[float, float]:
    """Clip gradients as the train step does: (norm before, declared maximum)."""
    norm = opt.global_norm(grads)
    opt.clip_gradients(grads, norm, cfg.optim.max_grad_norm)
    return float(norm), cfg.optim.max_grad_norm


def _micro_batch_nats(
    logits_BTV: Tensor, ids_BT: Tensor, labels_BT: Tensor, device: torch.device
) -> float:
    """The mean the real accumulation reports when the model answers `logits_BTV`."""
    answer = logits_BTV.to(device, copy=True).requires_grad_(True)
    model = SimpleNamespace(
        hidden_states=lambda ids: (answer * 1.0, Report((), ())),
        head_weight=torch.eye(logits_BTV.shape[-1], device=device),
        balance_weight=0.0,
    )
    bench = _bench(model, torch.optim.SGD([answer], lr=0.0), device)
    return steps.accumulate(bench, [Batch(ids_BT, labels_BT, (0,), 0, 0, 1)])[0]


def _cross_entropy_sum(logits_BTV: Tensor, labels_BT: Tensor, device: torch.device) -> Tensor:
    """The loss in terms of logits, by the kernel of `device`: the head is the identity."""
    head_VV = torch.eye(logits_BTV.shape[-1], device=device)
    return losses.linear_cross_entropy_sum(logits_BTV.to(device), head_VV, labels_BT.to(device))


def _gradient_of(cfg: RunConfig, dataset: Dataset, device: torch.device) -> Callable:
    state = build_state(cfg, dataset, device)
    state.model.eval()

    def gradient_of(parts: list[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, Tensor]]:
        batches = [
            Batch(ids, labels, tuple(range(len(ids))), 0, 0, len(ids)) for ids, labels in parts
        ]
        nats, _ = steps.accumulate(state, batches)
        return nats, {n: p.grad.detach().clone() for n, p in state.model.named_parameters()}

    return gradient_of


def poisoned_step(
    cfg: RunConfig, dataset: Dataset, device: torch.device, which: int
) -> tuple[steps.StepReport, bool]:
    """A train step of two micro-batches, in one of which, 0 or 1, a single feature is NaN: (its
    report, whether any weight moved).
    """
    state = build_state(cfg, dataset, device)
    before, passes = live_sha256(state.model), []

    def features(*inputs: Tensor | None) -> tuple[Tensor, Report]:
        x_BTD, report = state.model.hidden_states(*inputs)
        passes.append(x_BTD)
        if len(passes) - 1 == which:
            x_BTD = x_BTD.clone()
            x_BTD[0, -1, 0] = torch.nan
        return x_BTD, report

    state.features = features
    report = steps.train_step(state, _equal_rows(cfg, dataset.tokenizer.vocab_size, 2, step=1))
    return report, live_sha256(state.model) != before


def _checkpoint_ingredients(
    cfg: RunConfig, dataset: Dataset, device: torch.device
) -> dict[str, Any]:
    small, tiny = shrunk(cfg), micro(cfg)

    def save(state: TrainState, root: Path) -> Path:
        document = checkpoint.state_document(
            state,
            tokenizer_sha256=dataset.tokenizer.sha256,
            vocab_size=dataset.tokenizer.vocab_size,
            gates={},
            record="preflight",
        )
        return checkpoint.save(root, state, document)

    # one for all the saves of a check: what is judged is what happens to files
    kept: list[TrainState] = []

    def save_at(root: Path, step: int) -> Path:
        if not kept:
            kept.append(build_state(tiny, dataset, device))
        kept[0].step = step
        return save(kept[0], root)

    def resume(root: Path) -> TrainState:
        state = build_state(small, dataset, device)
        with torch.no_grad():
            checkpoint.restore(state, checkpoint.load(checkpoint.find(root)))
        return state

    return {
        "save_checkpoint": save_at,
        "load_checkpoint": lambda root: checkpoint.load(checkpoint.find(root)).state["step"],
        "fresh_state": lambda cursor: build_state(small, dataset, device, cursor=cursor or 0),
        "advance": advance_and_judge,
        "save_state": lambda state, root: save(state, root),
        "resume_state": resume,
        "digest": digest,
        "epoch_samples": dataset.train.n_windows(cfg.model.max_seq_len),
    }
