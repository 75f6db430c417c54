"""All initialisation: one table from parameter name to law, applied with a generator the caller owns."""

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn

from stack.config import ModelConfig


class Linear(nn.Linear):
    """torch's layer without an initialisation of its own: the table below is the only one."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """torch's table without an initialisation of its own."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


@dataclass(frozen=True)
class InitRow:
    """Parameters whose name matches `pattern` follow `law`: `normal` with mean 0 and `std`, or `ones`."""

    pattern: str
    law: str
    std: float
    why: str


def init_table(cfg: ModelConfig) -> list[InitRow]:
    """The law of every parameter; the first matching row counts."""
    branch_std = cfg.init_std / (2 * cfg.n_layers) ** 0.5
    return [
        InitRow("*norm.weight", "ones", 0.0, "a norm starts as plain normalisation"),
        InitRow("layers.*.attention.out.weight", "normal", branch_std, "2·n_layers branches add up to init_std (GPT-2, sec. 2.3)"),
        InitRow("layers.*.ffn.down.weight", "normal", branch_std, "2·n_layers branches add up to init_std (GPT-2, sec. 2.3)"),
        InitRow("layers.*.weight", "normal", cfg.init_std, "input projections of both branches"),
        InitRow("embed.weight", "normal", cfg.init_std, "also the tied head: keeps the first loss near ln V"),
        InitRow("head.weight", "normal", cfg.init_std, "keeps the first loss near ln V"),
    ]


def row_of(cfg: ModelConfig, name: str) -> InitRow:
    """The row that governs a parameter. Raises KeyError for a name no row matches: nothing is initialised by accident."""
    for row in init_table(cfg):
        if fnmatch.fnmatchcase(name, row.pattern):
            return row
    raise KeyError(f"no row of the initialisation table matches the parameter {name}")


def declared_std(cfg: ModelConfig, name: str, shape: tuple[int, ...] = ()) -> float:
    """Standard deviation at step 0; 0 for a parameter of ones. `shape` is there for laws that depend on it."""
    return row_of(cfg, name).std


@torch.no_grad()
def initialise(model: nn.Module, cfg: ModelConfig, generator: torch.Generator) -> None:
    """Fill every parameter by the table, in the order of `named_parameters`, drawing only from `generator` (CPU)."""
    for name, parameter in model.named_parameters():
        row = row_of(cfg, name)
        if row.law == "ones":
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, row.std, generator=generator)
