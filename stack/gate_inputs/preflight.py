"""Inputs of the preflight gates: the run's own model, data, loss, optimizer and checkpoints,
with fewer rows.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.config import AuxiliaryLoss, RunConfig
from stackproof.data.prepare import Dataset
from stackproof.data.reader import Batch, eval_batches, model_inputs
from stackproof.evaluate.ingredients import model_ingredients
from stackproof.evaluate.stopping import batches_needed
from stackproof.gate_inputs import operations
from stackproof.gate_inputs.compiled import compiled_ingredients
from stackproof.gate_inputs.head import head_ingredients
from stackproof.gate_inputs.kernels import kernel_calls
from stackproof.gate_inputs.shadow import shadow_ingredients
from stackproof.model import moe
from stackproof.model.build import build_model
from stackproof.spec.errors import DataError
from stackproof.subject.assemble import subject_of
from stackproof.subject.run import small_run as shrunk
from stackproof.subject.training import advance
from stackproof.train import checkpoint, losses
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.rng import generator, stream_seed
from stackproof.train.state import TrainState, build_state

PROBE_WINDOWS = 24


def gather(
    cfg: RunConfig, dataset: Dataset, device: torch.device, *, n_eval_batches: int | None = None
) -> tuple[int, dict[str, Any]]:
    """All ingredients of all preflight gates, and the number of held-out batches
    the power check asks for.
    """
    vocab_size = dataset.tokenizer.vocab_size
    build = lambda: build_model(  # noqa: E731
        cfg.model, vocab_size, seed=stream_seed(cfg.seed, "init"), device=device
    )
    ingredients: dict[str, Any] = model_ingredients(cfg, build(), dataset.tokenizer)
    ingredients |= _training_ingredients(cfg, dataset, device, build)
    ingredients |= compiled_ingredients(cfg, dataset, device)
    ingredients |= shadow_ingredients(cfg, device)
    ingredients |= operations.flops_ingredients(cfg, vocab_size, build, device)
    ingredients |= {"kernel_calls": kernel_calls(cfg, dataset, device, build)}
    ingredients |= head_ingredients(device)
    available = dataset.validation.n_windows(cfg.model.max_seq_len) // cfg.eval.batch_size
    if available < 2:
        raise DataError(
            "the held-out split is too short to evaluate on",
            value=(
                f"{dataset.validation.n_windows(cfg.model.max_seq_len)} windows of "
                f"{cfg.model.max_seq_len} tokens"
            ),
            allowed=f"at least two batches of {cfg.eval.batch_size} (eval.batch_size)",
            next_step=(
                "add text, raise data.split.validation_frac, or lower eval.batch_size or "
                "model.max_seq_len"
            ),
        )
    difference_std = paired_difference_std(cfg, dataset, device)
    n_batches = n_eval_batches or min(
        max(cfg.eval.batches, _wanted_batches(cfg, difference_std)), available
    )
    ingredients |= {"paired_difference_std": difference_std, "n_eval_batches": n_batches}
    ingredients |= {"subject": subject_of(cfg, dataset, device, n_eval_batches=n_batches)}
    return n_batches, ingredients


def _wanted_batches(cfg: RunConfig, difference_std: float) -> int:
    # what is not finite, the gates say better
    if cfg.stop.kind != "patience" or not math.isfinite(difference_std):
        return cfg.eval.batches
    return batches_needed(
        difference_std,
        min(x for x in (cfg.stop.expected_gain_nats, cfg.stop.min_delta_nats) if x > 0),
    )


def paired_difference_std(cfg: RunConfig, dataset: Dataset, device: torch.device) -> float:
    """Standard deviation of the per-batch loss difference between two evaluations
    around a few updates, nats.

    Measured per window on the run's own model at the start, where it is largest,
    and scaled to the batch size.
    """
    state = build_state(shrunk(cfg), dataset, device)
    windows = eval_batches(
        dataset.validation,
        cfg.model.max_seq_len,
        1,
        min(PROBE_WINDOWS, dataset.validation.n_windows(cfg.model.max_seq_len)),
    )
    rounds = []
    for _ in range(2):
        advance(state)
        rounds.append(torch.tensor([_window_nats(state, w) for w in windows]))
    return float((rounds[1] - rounds[0]).std()) / cfg.eval.batch_size**0.5


@torch.no_grad()
def _window_nats(state: TrainState, window: Batch) -> float:
    state.model.eval()
    with state.autocast():
        x_BTD, _ = state.model.hidden_states(*model_inputs(window, state.device))
        nats = losses.linear_cross_entropy_sum(
            x_BTD, state.model.head_weight, window.labels.to(state.device)
        )
    state.model.train()
    return float(nats) / losses.count_valid(window.labels)


def _training_ingredients(
    cfg: RunConfig, dataset: Dataset, device: torch.device, build: Callable[[], nn.Module]
) -> dict[str, Any]:
    vocab_size = dataset.tokenizer.vocab_size
    return {
        "build_model": build,
        "make_optimizer": lambda model: opt.make_optimizer(model, cfg.optim),
        "balance_gradients": lambda weight, n_micro: balance_gradients(
            cfg, device, vocab_size, weight, n_micro
        ),
        "bias_step": lambda n_micro: bias_step(cfg, device, vocab_size, n_micro),
    }


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


def balance_gradients(
    cfg: RunConfig, device: torch.device, vocab_size: int, weight: float, n_micro: int
) -> tuple:
    """Accumulation over equal micro-batches of one row, with the balance term at this weight:
    (weights, ids_T, router gradients).
    """
    ffn = cfg.model.ffn.model_copy(
        update={"balance": AuxiliaryLoss(weight=weight), "capacity_factor": None}
    )
    model = build_model(
        cfg.model.model_copy(update={"ffn": ffn, "dropout": 0.0}),
        vocab_size,
        seed=cfg.seed,
        device=device,
    )
    batches = _equal_rows(cfg, vocab_size, n_micro)
    steps.accumulate(_bench(model, torch.optim.SGD(model.parameters(), lr=0.0), device), batches)
    routers = {
        n: p.grad.clone() for n, p in model.named_parameters() if n.endswith("ffn.router.weight")
    }
    return checkpoint.model_tensors(model), batches[0].input_ids[0], routers


def bias_step(
    cfg: RunConfig, device: torch.device, vocab_size: int, n_micro: int
) -> tuple[Tensor, Tensor]:
    """One update of a fresh model in `n_micro` micro-batches: (loads of the update, selection
    biases after it), both (L, E).
    """
    model = build_model(cfg.model, vocab_size, seed=cfg.seed, device=device).train()
    bench = _bench(model, opt.make_optimizer(model, cfg.optim), device, cfg)
    _update(bench, _equal_rows(cfg, vocab_size, n_micro, step=1))
    return torch.stack(moe.totals(bench.loads)), torch.stack(
        [block.ffn.selection_bias for block in model.layers]
    )


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
