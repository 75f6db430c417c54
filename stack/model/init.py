"""All initialisation: one table from parameter name to law, and layers that do not draw themselves.

It is the model's own statement. The gate `model.init-law` compares the weights with the laws of
spec/architecture.py, which nothing here reads.
"""

import fnmatch
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stackproof.config import ModelConfig
from stackproof.kernels import dispatch


class Linear(nn.Linear):
    """torch's layer with the device's kernel for the product, and no initialisation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """x·weightᵀ + bias over the last axis."""
        return dispatch.linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """torch's table with no initialisation of its own."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


def empty_parameter(width: int) -> nn.Parameter:
    """A vector of uninitialised memory, to be filled by the table below."""
    return nn.Parameter(torch.empty(width))


@dataclass(frozen=True)
class InitRow:
    """Parameters whose name matches `pattern` follow `law`.

    `normal` has mean 0 and standard deviation `value`; `constant` is `value` everywhere.
    """

    pattern: str
    law: str
    value: float
    why: str


def init_table(cfg: ModelConfig) -> list[InitRow]:
    """The law of every parameter; the first row that matches applies."""
    branch_std = cfg.init_std / (2 * cfg.n_layers) ** 0.5
    branch = "2·n_layers branches add up to init_std (GPT-2, sec. 2.3)"
    attention = "layers.*.attention"
    return [
        InitRow("*norm.weight", "constant", 1.0, "a norm starts as plain normalisation"),
        InitRow("*.bias", "constant", 0.0, "no feature is preferred; gates of depth are half open"),
        InitRow(f"{attention}.lambda_weight", "constant", 0.5, "founding note: tinygpt validation"),
        InitRow(f"{attention}.lambda_[qk][12]", "normal", 0.1, "λ near λ_init (arXiv:2410.05258)"),
        InitRow(f"{attention}.out.weight", "normal", branch_std, branch),
        InitRow("layers.*.ffn*.down.weight", "normal", branch_std, branch),
        InitRow("layers.*.weight", "normal", cfg.init_std, "input projections and routers"),
        InitRow("embed.weight", "normal", cfg.init_std, "if tied, keeps the first loss near ln V"),
        InitRow("positions.weight", "normal", cfg.init_std, "as wide as the embedding"),
        InitRow("head.weight", "normal", cfg.init_std, "keeps the first loss near ln V"),
    ]


def row_of(cfg: ModelConfig, name: str) -> InitRow:
    """The row of a parameter. Raises KeyError if no row matches its name."""
    for row in init_table(cfg):
        if fnmatch.fnmatchcase(name, row.pattern):
            return row
    raise KeyError(f"no row of the initialisation table in stack/model/init.py matches {name}")


@torch.no_grad()
def initialise(model: nn.Module, cfg: ModelConfig, generator: torch.Generator) -> None:
    """Fill every parameter by the table, in the order of `named_parameters`.

    Draws come from `generator` (CPU) alone.
    """
    for name, parameter in model.named_parameters():
        row = row_of(cfg, name)
        match row.law:
            case "constant":
                parameter.fill_(row.value)
            case "normal":
                parameter.normal_(0.0, row.value, generator=generator)
            case other:
                raise ValueError(f"unknown law in the initialisation table: {other}")
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.zero_()
