"""Kernels, compiled graph and half precision of a run.

B batch, T tokens, R rows (tokens), D features, E experts, V vocabulary
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stackproof.contracts.subject import HalfPrecision, Kernels, NotOffered
from stackproof.data.data_loader import Batch, model_inputs
from stackproof.kernels import cross_entropy, dispatch
from stackproof.kernels.table import OPERATIONS, TORCH
from stackproof.model import moe
from stackproof.model.build import building
from stackproof.model.variants import make_norm
from stackproof.subject.run import RunParts, wrapping
from stackproof.train import losses
from stackproof.train import step as steps
from stackproof.train.state import (
    AUTOCAST,
    TrainState,
    declared_autocast,
    make_data_loader,
)

# Of float16: large enough that gradients do not vanish, and far from an overflow, which has nothing
# to do with the graph.
LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class RunKernels(RunParts, Kernels):
    """The kernels in force, and the graph of a run that compiles: that of its own state, before its
    first update.
    """

    state: TrainState

    def observe_calls(self, observe: Callable[[str, str, Callable, tuple, Mapping], None]) -> None:
        cfg, device = self.cfg, self.device
        model = self.fresh_model().train()
        batch = make_data_loader(wrapping(cfg), self.dataset).next_batch()

        def observed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                kernel = dispatch.choose(name, arguments[0].device).kernel
                observe(name, kernel, function, arguments, options)
                return function(*arguments, **options)

            return call

        with torch.no_grad(), declared_autocast(cfg, device), dispatch.replacing(observed):
            x_BTD, _ = model.hidden_states(*model_inputs(batch, device))
            head_VD = model.head_weight.detach()
            losses.linear_cross_entropy_sum(x_BTD, head_VD, batch.labels.to(device))

    def head_loss(self, x_RD: Tensor, head_VD: Tensor, labels_R: Tensor) -> Tensor:
        x_RD, head_VD, labels_R = (t.to(self.device) for t in (x_RD, head_VD, labels_R))
        return losses.linear_cross_entropy_sum(x_RD[None], head_VD, labels_R[None])

    @contextmanager
    def small_head_chunks(self, n_rows: int, vocab_size: int) -> Iterator[None]:
        settings = [(cross_entropy, "HEAD_CHUNK_BYTES", 4 * vocab_size * n_rows)]
        if triton := sys.modules.get("stackproof.kernels.triton.linear_cross_entropy"):
            settings.append((triton, "MIN_CHUNK", n_rows))
        former = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
        try:
            for owner, name, value in settings:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in former:
                setattr(owner, name, value)

    def compiled_step(self, i: int) -> tuple[float, Mapping[str, Tensor]]:
        """Raises NotOffered in a run that does not compile, EnvironmentUnfit on a machine that
        cannot build the graph.
        """
        if not self.cfg.train.compile:
            raise NotOffered("Kernels.compiled_step: train.compile is false")
        return self._gradients(self.state, i)

    def eager_step(self, i: int) -> tuple[float, Mapping[str, Tensor]]:
        return self._gradients(replace(self.state, features=self.state.model.hidden_states), i)

    @cached_property
    def _batches(self) -> list[Batch]:
        loader = make_data_loader(wrapping(self.cfg), self.dataset)
        return [loader.next_batch() for _ in range(2)]

    def _gradients(self, state: TrainState, i: int) -> tuple[float, Mapping[str, Tensor]]:
        """Loss and gradients of one micro-batch; the state is left as it was."""
        kind = self.device.type
        scaler = torch.amp.GradScaler(
            kind, init_scale=LOSS_SCALE, enabled=self.cfg.train.dtype == "float16"
        )
        devices = [self.device] if kind == "cuda" else []
        with torch.random.fork_rng(devices=devices), building():
            torch.manual_seed(i)
            loss_nats, *_ = steps.accumulate(replace(state, scaler=scaler), [self._batches[i]])
        parameters = state.model.named_parameters()
        found = {n: p.grad.detach() for n, p in parameters if p.grad is not None}
        state.optimizer.zero_grad(set_to_none=True)
        state.loads.clear()
        return loss_nats, found

    def by_torch(self) -> AbstractContextManager[None]:
        return dispatch.using(**dict.fromkeys(OPERATIONS, TORCH))


class RunHalfPrecision(RunParts, HalfPrecision):
    """Parts of a run as it calls them: on its device, under its autocast."""

    @property
    def dtype(self) -> torch.dtype:
        """Raises NotOffered in a run that computes in float32."""
        if (dtype := AUTOCAST[self.cfg.train.dtype]) is None:
            raise NotOffered("HalfPrecision.dtype: train.dtype is float32")
        return dtype

    def norm(self, x_BTD: Tensor, gain_D: Tensor) -> Tensor:
        layer = make_norm(self.cfg.model.model_copy(update={"d_model": len(gain_D)}))
        zeros = torch.zeros_like(gain_D)
        weights = {n: gain_D if n == "weight" else zeros for n in layer.state_dict()}
        layer.load_state_dict(weights)
        return self._called(layer.to(self.device), x_BTD)

    def route(self, logits_RE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._called(moe.route, logits_RE, top_k)

    def loss(self, x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor) -> Tensor:
        return self._called(losses.linear_cross_entropy_sum, x_BTD, head_VD, labels_BT)

    def _called(self, function: Callable, *inputs: Any) -> Any:
        with declared_autocast(self.cfg, self.device):
            return function(*(x.to(self.device) if isinstance(x, Tensor) else x for x in inputs))
