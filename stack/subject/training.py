"""How a run trains: fresh trainees, its loss, clipping and optimizer.
B batch, T tokens, V vocab.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.model import in_mode
from stackproof.contracts.subject import (
    MicroBatch,
    NamedParameters,
    ResidualBlock,
    Trainee,
    TraineeOptions,
    Training,
)
from stackproof.data.data_loader import Batch, model_inputs
from stackproof.model import moe
from stackproof.model.forward_context import ForwardContext, Report
from stackproof.model.transformer import Block, GatedBlock
from stackproof.subject.run import RunParts, small_run
from stackproof.train import losses
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.state import TrainState, digest


@dataclass(frozen=True)
class RunTraining(RunParts, Training):
    """The run's own state, and trainees by its `build_state`, with few rows."""

    state: TrainState

    def trainee(self, options: TraineeOptions = TraineeOptions()) -> "RunTrainee":
        return RunTrainee(self.build(options))

    def trainee_of(self, model: nn.Module, optimizer: opt.Optimizer) -> "RunTrainee":
        cfg = small_run(self.cfg, TraineeOptions(exact=True))
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

    def make_optimizer(self, model: NamedParameters) -> opt.Optimizer:
        return opt.make_optimizer(model, self.cfg.optim)

    @property
    def module(self) -> nn.Module:
        return self.state.model

    @property
    def optimizer(self) -> opt.Optimizer:
        return self.state.optimizer

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

    def clip(self, model: NamedParameters) -> float:
        gradients = opt.gradients(model)
        norm = opt.global_norm(gradients)
        opt.clip_gradients(gradients, norm, self.cfg.optim.max_grad_norm)
        return float(norm)


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
        return steps.accumulate(self.state, _numbered(batches))[0]

    def update(self, batches: Sequence[MicroBatch]) -> float:
        loss_nats = self.accumulate(batches)
        gradients = opt.gradients(self.model)
        steps.apply_gradients(self.state, gradients, opt.global_norm(gradients))
        return loss_nats

    def step(self, batches: Sequence[MicroBatch]) -> steps.StepReport:
        return steps.train_step(self.state, _numbered(batches))

    def advance(self) -> float:
        """An evaluation changes the running mean, the stop rule's memory and the best step. A step
        draws nothing from torch's random state, but a callback may.
        """
        state, nats = self.state, advance(self.state)
        torch.rand(())
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

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> float:
        state, labels_BT = self.state, batch.labels.to(self.state.device)
        with in_mode(state.model, False), state.autocast():
            x_BTD, _ = state.model.hidden_states(*model_inputs(batch, state.device))
            head_VD = state.model.head_weight.detach()  # the loss would make its gradient as well
            nats = losses.linear_cross_entropy_sum(x_BTD, head_VD, labels_BT)
        return float(nats) / losses.count_valid(batch.labels)

    def residual_blocks(self) -> "list[RunBlock]":
        """Without activation checkpointing, which runs a block again in the backward."""
        self.model.activation_checkpointing = False
        return [RunBlock(block) for block in self.model.layers]

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


class RunBlock(ResidualBlock):
    """A block of a model that is used for nothing else."""

    def __init__(self, block: Block):
        self.block = block
        self.attention_norm, self.attention = block.attention_norm, block.attention
        self.ffn_norm, self.ffn = block.ffn_norm, block.ffn

    def on_output(self, keep: Callable[[Tensor], None]) -> None:
        """A gate of depth runs its block on some of the tokens."""

        def kept(branches: Callable) -> Callable:
            def watched(x_BTD: Tensor, context: ForwardContext) -> Tensor:
                out_BTD = branches(x_BTD, context)
                keep(out_BTD)
                return out_BTD

            return watched

        if isinstance(self.block, GatedBlock):
            gate = self.block.depth.forward
            self.block.depth.forward = lambda branches, *inputs: gate(kept(branches), *inputs)
        else:
            self.block.forward = kept(self.block.forward)


def _numbered(batches: Sequence[MicroBatch]) -> list[Batch]:
    """The micro-batches of a step as the train step takes them; those that were drawn already are.
    Rows of others are counted from the first.
    """
    found, stop = [], 0
    for batch in batches:
        first, stop = stop, stop + len(batch.input_ids)
        if not isinstance(batch, Batch):
            ids = tuple(range(first, stop))
            given = batch.input_ids, batch.labels, ids, 0, first, stop, batch.document_ids
            batch = Batch(*given)
        found.append(batch)
    return found


def advance(state: TrainState) -> float:
    """Draw and take one step; returns the loss in nats."""
    return steps.train_step(state, state.next_batches()).loss_nats
