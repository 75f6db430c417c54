"""Inputs of the gate of dropout. B batch, T tokens, D d_model."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stackproof.config import RunConfig
from stackproof.data.prepare import Dataset
from stackproof.model.forward_context import ForwardContext
from stackproof.model.transformer import GatedBlock
from stackproof.train import step as steps
from stackproof.train.state import build_state

ROWS, TOKENS = 1, 256  # of each micro-batch that are looked at


@dataclass
class _Watch:
    """Beside a block: what its branches gave last, and what of it reached the residual stream,
    as `draws`.
    """

    layer: int
    draws: list[tuple[tuple[int, str], Tensor, Tensor]]
    seen: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, x_BTD: Tensor) -> None:
        self.seen[name] = x_BTD.detach()[:ROWS, :TOKENS].flatten(0, 1).float().cpu()

    def attach(self, block: nn.Module) -> None:
        """Hook a block that is used for nothing else."""
        for name, module in (("start", block.attention_norm), ("middle", block.ffn_norm)):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: self.keep(name, inputs[0])
            )
        for name, module in (("attention", block.attention), ("ffn", block.ffn)):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: self.keep(name, output)
            )
        if isinstance(block, GatedBlock):  # its gate runs the block on some of the tokens
            gate = block.depth.forward
            block.depth.forward = lambda branches, *inputs: gate(self.ending(branches), *inputs)
        else:
            block.forward = self.ending(block.forward)

    def ending(self, branches: Callable) -> Callable:
        def watched(x_BTD: Tensor, context: ForwardContext) -> Tensor:
            out_BTD = branches(x_BTD, context)
            self.keep("end", out_BTD)
            for branch, before, after in (
                ("attention", "start", "middle"),
                ("ffn", "middle", "end"),
            ):
                self.draws.append(
                    ((self.layer, branch), self.seen[branch], self.seen[after] - self.seen[before])
                )
            return out_BTD

        return watched


def branch_draws(
    cfg: RunConfig, dataset: Dataset, device: torch.device, n_steps: int = 2
) -> list[tuple[tuple[int, str], Tensor, Tensor]]:
    """What every branch of every block gave and what of it was added to the residual stream, over
    real train steps of a run.

    In the order they came: ((layer, "attention" or "ffn"), given, added), the two of shape (T,
    D) float32.
    """
    state, draws = build_state(cfg, dataset, device), []
    state.model.activation_checkpointing = False  # or every block would be seen twice
    for layer, block in enumerate(state.model.layers):
        _Watch(layer, draws).attach(block)
    for _ in range(n_steps):
        steps.train_step(state, state.next_batches())
    return draws
