"""The subject of a second implementation of experts, that of tests/contracts/variants.py. Functions
are looked up there when they are called, so that plants reach them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.contracts.subject import Declared, Experts, Model, Subject, Trainee, Training
from tests.contracts import variants

VOCAB_SIZE, SEED = 61, 3


def subject_of(a: Mapping[str, Any]) -> Subject:
    """`a` is the resolved `model` section."""
    return Subject(
        declared=SecondDeclared(a),
        model=SecondModel(a),
        experts=SecondExperts(a),
        training=SecondTraining(a),
    )


@dataclass(frozen=True)
class SecondDeclared(Declared):
    architecture: Mapping[str, Any]


@dataclass(frozen=True)
class SecondModel(Model):
    a: Mapping[str, Any]

    @property
    def vocab_size(self):
        return VOCAB_SIZE

    @property
    def max_length(self):
        return self.a["max_seq_len"]

    def fresh(self):
        return variants.Decoder(self.a, VOCAB_SIZE, SEED)


@dataclass(frozen=True)
class SecondExperts(Experts):
    a: Mapping[str, Any]

    functions = variants

    def layer(self):
        return variants.MixtureOfExperts(self.a)

    def model(self, balance_weight):
        balance = {"kind": "auxiliary-loss", "weight": balance_weight}
        ffn = self.a["ffn"] | {"capacity_factor": None, "balance": balance}
        return variants.Decoder(self.a | {"dropout": 0.0, "ffn": ffn}, VOCAB_SIZE, SEED)


@dataclass(frozen=True)
class SecondTraining(Training):
    a: Mapping[str, Any]

    def make_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.0)

    def trainee_of(self, model, optimizer):
        return SecondTrainee(model, optimizer)


class SecondTrainee(Trainee):
    """Accumulation, and an update of the selection biases alone."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer, self.loads_LE = model, optimizer, 0

    def accumulate(self, batches):
        self.optimizer.zero_grad()
        self.loads_LE = 0
        total = 0.0
        for batch in batches:
            loss = self.mean_loss(batch) / len(batches)
            loss.backward()
            total += loss.item()
        return total

    def mean_loss(self, batch) -> Tensor:
        """Mean cross-entropy plus the balance term."""
        logits_BTV = self.model(batch.input_ids)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels.flatten())
        found = [layer.ffn.found for layer in self.model.layers if layer.ffn.found is not None]
        declared = self.model.a["ffn"]
        terms = [variants.balance(*of_layer) for of_layer in found]
        self.loads_LE = self.loads_LE + torch.stack(
            [
                torch.bincount(experts.flatten(), minlength=declared["n_experts"])
                for _, experts in found
            ]
        )
        return loss + sum(terms) * declared["balance"].get("weight", 0.0)

    def update(self, batches):
        nats = self.accumulate(batches)
        rate = self.model.a["ffn"]["balance"]["rate"]
        variants.update_selection_bias(self.model, self.loads_LE, rate)
        return nats
