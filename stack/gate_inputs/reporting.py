"""Inputs of `optim.step-report` and `optim.applied-update`:
real steps with independent measurements.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.config import RunConfig
from stackproof.contracts.optim import Applied, Move
from stackproof.data.prepare import Dataset
from stackproof.evaluate.ingredients import talkative
from stackproof.gate_inputs.digest import live_sha256, tensor_sha256
from stackproof.train import losses
from stackproof.train import step as steps
from stackproof.train.state import TrainState, build_state

LOW_NORM, FIRST_DRAWS = 1e-2, 8
# entries looked at: of a tensor one by one, and of matrices as a whole together
APPLIED_STEPS, SAMPLED, MUON_ENTRIES = 3, 4096, 2**21


def reported_steps(
    cfg: RunConfig, dataset: Dataset, device: torch.device
) -> list[tuple[steps.StepReport, Mapping[str, Any]]]:
    """Two steps of a run, the second with its first matrix held still: (report,
    what was measured beside it) of each.

    The declared maximum of the gradient norm is so low that clipping has something to do.
    """
    clipped = cfg.optim.model_copy(update={"max_grad_norm": min(cfg.optim.max_grad_norm, LOW_NORM)})
    state = build_state(cfg.model_copy(update={"optim": clipped}), dataset, device)
    first = _beside(state)
    next(p for p in state.model.parameters() if p.ndim >= 2).requires_grad_(False)
    return [first, _beside(state)]


def _beside(state: TrainState) -> tuple[steps.StepReport, Mapping[str, Any]]:
    """One step. Each gradient is looked at when autograd has added the last to it,
    before anybody scales it.
    """
    squares: dict[int, float] = {}
    trained = [p for p in state.model.parameters() if p.requires_grad]
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: squares.update({id(p): _square(p.grad)}))
        for p in trained
    ]
    before = [p.detach().clone() for p in state.model.parameters()]
    batches = [state.reader.draw() for _ in range(state.cfg.accumulation())]
    report = steps.train_step(state, batches)
    for hook in hooks:
        hook.remove()
    moved = [not torch.equal(p.detach(), kept) for p, kept in zip(state.model.parameters(), before)]
    return report, {
        "norm_before": sum(squares.values()) ** 0.5 / state.scaler.get_scale(),
        "norm_after": sum(_square(p.grad) for p in trained if p.grad is not None) ** 0.5,
        "group_lrs": {g["name"]: g["lr"] for g in state.optimizer.param_groups},
        "n_valid_tokens": int(sum((b.labels != losses.IGNORE_INDEX).sum() for b in batches)),
        "changed_tensor_frac": sum(moved) / len(moved),
    }


def _square(gradient: Tensor) -> float:
    return float(gradient.detach().double().square().sum())


def begun(cfg: RunConfig, dataset: Dataset, device: torch.device, offset: int) -> dict[str, Any]:
    """What a run begins with under its seed plus `offset`: hash of its weights, window numbers of
    its first rows, hash of its masks' state.

    torch's random state is left as this run would have it; preflight puts it back.
    """
    seeded = cfg.model_copy(update={"seed": cfg.seed + offset})
    state = build_state(seeded, dataset, device)
    rows = [n for _ in range(FIRST_DRAWS) for n in state.reader.draw().sample_ids]
    return {
        "weights": live_sha256(state.model),
        "order": rows,
        "masks": tensor_sha256(torch.get_rng_state()),
    }


def computed_dtypes(cfg: RunConfig, dataset: Dataset, device: torch.device) -> dict[str, str]:
    """Type of what each linear layer returned in one real step, by the layer's name; "mixed" where
    it was not always the same.
    """
    state, found = build_state(cfg, dataset, device), {}

    def note(name: str, output: Tensor) -> None:
        dtype = str(output.dtype).removeprefix("torch.")
        found[name] = dtype if found.get(name, dtype) == dtype else "mixed"

    for name, module in state.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: note(name, output)
            )
    steps.train_step(state, [state.reader.draw() for _ in range(cfg.accumulation())])
    return found


def own_step(
    cfg: RunConfig, dataset: Dataset, device: torch.device
) -> tuple[float, list[tuple], Callable]:
    """One step's batches of a run, accumulated with dropout off: (mean loss in nats, what was read,
    logits by ids and document ids).

    Under weights that make something of the context: at step 0 every label costs ln V, and no row
    would be told from another.
    """
    state = build_state(cfg, dataset, device)
    state.model.eval()
    state.model.load_state_dict(talkative(state.model))
    batches = [state.reader.draw() for _ in range(cfg.accumulation())]
    loss_nats, _ = steps.accumulate(state, batches)

    def logits_of(ids_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        return state.model(
            ids_BT.to(device),
            document_ids_BT=None if document_ids_BT is None else document_ids_BT.to(device),
        )

    return loss_nats, [(b.input_ids, b.labels, b.document_ids) for b in batches], logits_of


def applied_steps(
    cfg: RunConfig,
    dataset: Dataset,
    device: torch.device,
    law: Callable[[str, Tensor], Mapping[str, Any]],
) -> list[Applied]:
    """Steps of a run around the end of its warm-up, from fresh moments: what backward left,
    and what each parameter did.

    Of a parameter under AdamW SAMPLED entries are kept, evenly spread; of matrices under Muon the
    smallest, MUON_ENTRIES entries or one. Muon multiplies in float32 here: in bfloat16 the
    gradients of a few rows, which span few directions, end 0.13 of the way apart.
    """
    state = build_state(cfg.model_copy(update={"optim": cfg.optim.in_float32()}), dataset, device)
    state.step = max(0, min(cfg.schedule.warmup_steps - 1, cfg.train.max_steps - APPLIED_STEPS))
    seen, budget = {}, MUON_ENTRIES
    for name, p in sorted(state.model.named_parameters(), key=lambda item: item[1].numel()):
        declared = law(name, p)
        if declared["rule"] == "adamw":
            seen[name] = (p, declared, slice(None, None, max(1, p.numel() // SAMPLED)))
        elif budget == MUON_ENTRIES or p.numel() <= budget:
            seen[name], budget = (p, declared, None), budget - p.numel()
    return [_applied(state, seen) for _ in range(APPLIED_STEPS)]


def _applied(
    state: TrainState, seen: Mapping[str, tuple[Tensor, Mapping[str, Any], slice | None]]
) -> Applied:
    """One step. Gradients are taken when autograd has added the last to them,
    before anybody scales or replaces them.
    """
    squares: dict[int, float] = {}
    gradients: dict[int, Tensor] = {}
    places = {id(p): place for p, _, place in seen.values()}

    def keep(p: Tensor) -> None:
        squares[id(p)] = _square(p.grad)
        if id(p) in places:
            gradients[id(p)] = _picked(p.grad, places[id(p)])

    hooks = [p.register_post_accumulate_grad_hook(keep) for p in state.model.parameters()]
    before = {name: _picked(p, place) for name, (p, _, place) in seen.items()}
    report = steps.train_step(state, [state.reader.draw() for _ in range(state.cfg.accumulation())])
    for hook in hooks:
        hook.remove()
    moves = {
        n: Move(law, before[n], gradients.get(id(p)), _picked(p, place))
        for n, (p, law, place) in seen.items()
    }
    return Applied(state.step, sum(squares.values()) ** 0.5, report.grad_norm, moves)


def _picked(tensor: Tensor, place: slice | None) -> Tensor:
    """A copy on the CPU of a whole matrix, or of some entries of a tensor, flat."""
    kept = tensor.detach() if place is None else tensor.detach().reshape(-1)[place]
    return kept.to("cpu", copy=True)
