"""How a run trains: fresh trainees, its loss, clipping and optimizer.
B batch, T tokens, V vocab.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.config import RunConfig
from stackproof.contracts.subject import MicroBatch, Trainee, TraineeOptions, Training
from stackproof.data.data_loader import Batch, model_inputs
from stackproof.model import moe
from stackproof.model.forward_context import Report
from stackproof.subject.dropout import branch_draws
from stackproof.subject.run import RunParts, small_run
from stackproof.train import losses
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.state import TrainState, build_state, digest


class RunTraining(RunParts, Training):
    """Trainees by the run's own `build_state`, with few rows."""

    def trainee(self, options: TraineeOptions = TraineeOptions()) -> "RunTrainee":
        state = build_state(
            self._small(options), self.dataset, self.device, cursor=options.first_row
        )
        state.step = options.updates_done
        if (scale := options.loss_scale) is not None:
            state.scaler = torch.amp.GradScaler(self.device.type, init_scale=scale, enabled=True)
        return RunTrainee(state)

    def _small(self, options: TraineeOptions) -> RunConfig:
        cfg = small_run(self.cfg)
        train, optim = cfg.train, cfg.optim
        if options.exact:
            train, optim = train.model_copy(update={"dtype": "float32"}), optim.in_float32()
        if (norm := options.max_grad_norm) is not None:
            optim = optim.model_copy(update={"max_grad_norm": norm})
        seed = cfg.seed + options.seed_offset
        return cfg.model_copy(update={"train": train, "optim": optim, "seed": seed})

    def trainee_of(self, model: nn.Module, optimizer: opt.Optimizer) -> "RunTrainee":
        cfg = self._small(TraineeOptions(exact=True))
        model.activation_checkpointing = cfg.train.activation_checkpointing == "blocks"
        state = TrainState(
            cfg=cfg,
            model=model,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(self.device.type, enabled=False),
            data_loader=None,
            stopper=None,
            probe=opt.ParameterProbe(model),
            device=self.device,
            features=model.hidden_states,
        )
        return RunTrainee(state)

    def make_optimizer(self, model: Any) -> opt.Optimizer:
        return opt.make_optimizer(model, self.cfg.optim)

    @property
    def live_optimizer(self) -> tuple[Sequence[tuple[str, Tensor]], Sequence[Mapping[str, Any]]]:
        """Those of a fresh model, which the live one equals before step 1."""
        model = self.fresh_model()
        return list(model.named_parameters()), self.make_optimizer(model).param_groups

    def cross_entropy_sum(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """By the kernel of the run's device: the head is the identity."""
        head_VV = torch.eye(logits_BTV.shape[-1], device=self.device)
        return losses.linear_cross_entropy_sum(
            logits_BTV.to(self.device), head_VV, labels_BT.to(self.device)
        )

    def mean_nats(self, logits_BTV: Tensor, ids_BT: Tensor, labels_BT: Tensor) -> float:
        model = _FixedLogits(logits_BTV.to(self.device))
        trainee = self.trainee_of(model, torch.optim.SGD(model.parameters(), lr=0.0))
        return trainee.accumulate([MicroBatch(ids_BT, labels_BT)])

    def clip(self, model: Any) -> float:
        gradients = opt.gradients(model)
        norm = opt.global_norm(gradients)
        opt.clip_gradients(gradients, norm, self.cfg.optim.max_grad_norm)
        return float(norm)

    def branch_draws(self) -> Sequence[tuple[tuple[int, str], Tensor, Tensor]]:
        return branch_draws(small_run(self.cfg), self.dataset, self.device)


class _FixedLogits(nn.Module):
    """A model that answers with these logits whatever it reads: its head is the identity."""

    balance_weight = 0.0

    def __init__(self, logits_BTV: Tensor):
        super().__init__()
        self.logits_BTV = nn.Parameter(logits_BTV.clone())
        self.head_weight = torch.eye(logits_BTV.shape[-1], device=logits_BTV.device)

    def hidden_states(self, *inputs: Tensor) -> tuple[Tensor, Report]:
        return self.logits_BTV * 1.0, Report((), ())


class RunTrainee(Trainee):
    """A training state. One made by `trainee_of` has no data loader and no stop rule."""

    def __init__(self, state: TrainState):
        self.state = state

    @property
    def model(self) -> nn.Module:
        return self.state.model

    @property
    def optimizer(self) -> opt.Optimizer:
        return self.state.optimizer

    def draw(self) -> list[Batch]:
        return self.state.next_batches()

    def accumulate(self, batches: Sequence[MicroBatch]) -> float:
        return steps.accumulate(self.state, [_batch(b) for b in batches])[0]

    def update(self, batches: Sequence[MicroBatch]) -> float:
        loss_nats = self.accumulate(batches)
        gradients = opt.gradients(self.model)
        steps.apply_gradients(self.state, gradients, opt.global_norm(gradients))
        return loss_nats

    def step(self, batches: Sequence[MicroBatch]) -> steps.StepReport:
        return steps.train_step(self.state, [_batch(b) for b in batches])

    def advance(self) -> float:
        """An evaluation changes the running mean, the stop rule's memory and the best step."""
        state, nats = self.state, advance(self.state)
        state.last_val_nats = nats
        state.stopper.update((nats, 1.01 * nats))
        state.best = {"step": state.step, "val_loss_nats": nats}
        return nats

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """The balance loss of experts is added: it is part of what is optimised."""
        device = self.state.device
        x_BTD, report = self.model.hidden_states(*model_inputs(batch, device))
        labels_BT = batch.labels.to(device)
        nats = losses.linear_cross_entropy_sum(x_BTD, self.model.head_weight, labels_BT)
        return nats + losses.balance_term(report.loads, self.model.balance_weight)

    def logits(self, ids_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        device = self.state.device
        documents_BT = None if document_ids_BT is None else document_ids_BT.to(device)
        return self.model(ids_BT.to(device), document_ids_BT=documents_BT)

    def idle_parameters(self) -> set[str]:
        idle = tuple(
            f"layers.{layer}.ffn.experts.{e}."
            for layer, n_E in enumerate(moe.totals(self.state.loads))
            for e in range(len(n_E))
            if not n_E[e]
        )
        return {n for n, _ in self.model.named_parameters() if idle and n.startswith(idle)}

    def digest(self) -> dict[str, Any]:
        return digest(self.state)


def _batch(batch: MicroBatch) -> Batch:
    """A micro-batch as the train step takes it; one that was drawn already is."""
    if isinstance(batch, Batch):
        return batch
    n = len(batch.input_ids)
    return Batch(batch.input_ids, batch.labels, tuple(range(n)), 0, 0, n, batch.document_ids)


def advance(state: TrainState) -> float:
    """Draw and take one step; returns the loss in nats."""
    return steps.train_step(state, state.next_batches()).loss_nats
