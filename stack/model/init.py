"""All initialisation: one table from parameter name to law,
applied with a generator the caller owns.
"""

import fnmatch
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stackproof.config import ModelConfig
from stackproof.kernels import dispatch


class Linear(nn.Linear):
    """torch's layer with the product chosen for the device, and without an initialisation of its
    own: the table below is the only one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x·weightᵀ + bias over the last axis."""
        return dispatch.linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """torch's table without an initialisation of its own."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


def Parameter(width: int) -> nn.Parameter:
    """A vector without a value of its own: the table below gives it."""
    return nn.Parameter(torch.empty(width))


@dataclass(frozen=True)
class InitRow:
    """Parameters whose name matches `pattern` follow `law`: `normal` with mean 0 and this spread,
    or `constant` with this value.
    """

    pattern: str
    law: str
    value: float
    why: str


def init_table(cfg: ModelConfig) -> list[InitRow]:
    """The law of every parameter; the first matching row counts."""
    branch_std = cfg.init_std / (2 * cfg.n_layers) ** 0.5
    branches = "2·n_layers branches add up to init_std (GPT-2, sec. 2.3)"
    return [
        InitRow("*norm.weight", "constant", 1.0, "a norm starts as plain normalisation"),
        InitRow(
            "*.bias",
            "constant",
            0.0,
            "no feature is preferred; a gate of depth starts near one half",
        ),
        InitRow(
            "layers.*.attention.lambda_weight",
            "constant",
            0.5,
            "the second map counts half (founding note: tinygpt validation)",
        ),
        InitRow(
            "layers.*.attention.lambda_[qk][12]",
            "normal",
            0.1,
            "λ starts near λ_init (arXiv:2410.05258)",
        ),
        InitRow("layers.*.attention.out.weight", "normal", branch_std, branches),
        InitRow("layers.*.ffn*.down.weight", "normal", branch_std, branches),
        InitRow("layers.*.weight", "normal", cfg.init_std, "input projections and routers"),
        InitRow(
            "embed.weight",
            "normal",
            cfg.init_std,
            "also the tied head: keeps the first loss near ln V",
        ),
        InitRow(
            "positions.weight", "normal", cfg.init_std, "as wide as the embedding it is added to"
        ),
        InitRow("head.weight", "normal", cfg.init_std, "keeps the first loss near ln V"),
    ]


def row_of(cfg: ModelConfig, name: str) -> InitRow:
    """The row that governs a parameter.
    Raises KeyError for a name no row matches: nothing is initialised by accident.
    """
    for row in init_table(cfg):
        if fnmatch.fnmatchcase(name, row.pattern):
            return row
    raise KeyError(f"no row of the initialisation table matches the parameter {name}")


@torch.no_grad()
def initialise(model: nn.Module, cfg: ModelConfig, generator: torch.Generator) -> None:
    """Fill every parameter by the table, in the order of `named_parameters`,
    drawing only from `generator` (CPU).
    """
    for name, parameter in model.named_parameters():
        row = row_of(cfg, name)
        match row.law:
            case "constant":
                parameter.fill_(row.value)
            case "normal":
                parameter.normal_(0.0, row.value, generator=generator)
            case other:
                raise ValueError(
                    f"the initialisation table names a law that does not exist: {other}"
                )
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.zero_()
