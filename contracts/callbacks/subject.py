"""The adapter of a live model that another trainer trains."""

from collections.abc import Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks.probe import (
    Probe,
    config_of,
    embedding_of,
    head_of,
    world_size,
)
from stackproof.contracts.subject import (
    Declared,
    Model,
    NotOffered,
    SavedCheckpoint,
    Subject,
    Tokenizer,
    Training,
)


def foreign_subject(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    tokenizer: object | None = None,
    stated: Mapping[str, float] = {},
) -> Subject:
    """The subject of a live model, its optimizer and its tokenizer. What is not there or cannot be
    found is not offered. `stated` are settings of the optimizer that the trainer states.
    """
    return Subject(
        declared=ForeignDeclared(model, stated),
        model=ForeignModel(model),
        tokenizer=ForeignTokenizer(model, tokenizer),
        training=ForeignTraining(model, optimizer),
    )


@dataclass(frozen=True)
class ForeignDeclared(Declared):
    """What the configuration object of a model declares."""

    live: nn.Module
    stated: Mapping[str, float] = field(default_factory=dict)

    @property
    def optimizer_settings(self) -> Mapping[str, float]:
        if not self.stated:
            raise NotOffered("Declared.optimizer_settings: the trainer states none")
        return self.stated

    @property
    def tied_head(self) -> bool:
        for config in (getattr(self.live, "config", None), config_of(self.live)):
            if (tied := getattr(config, "tie_word_embeddings", None)) is not None:
                return bool(tied)
        raise NotOffered("Declared.tied_head: the model has no config.tie_word_embeddings")


class ForeignModel(Model):
    """A model that is called with ids and returns logits."""

    def __init__(self, module: nn.Module):
        self.module, self.probe = module, Probe(module)

    @property
    def vocab_size(self) -> int:
        return int(self.embedding.weight.shape[0])

    @property
    def max_length(self) -> int:
        return self.probe.max_length

    @property
    def takes_mask(self) -> bool:
        return self.probe.takes_mask

    @property
    def takes_labels(self) -> bool:
        return self.probe.takes_labels

    def logits(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, labels_BT: Tensor | None = None
    ) -> Tensor:
        """Raises NotOffered for a model that does not predict the next token from ids alone."""
        if self.probe.refusal:
            raise NotOffered(f"Model.logits: {self.probe.refusal}")
        if not is_causal(self.module):
            raise NotOffered("Model.logits: the model is not meant to predict the next token")
        return self.probe.logits(ids_BT, mask_BT, labels_BT)

    def training(self, mode: bool) -> AbstractContextManager[None]:
        return self.probe.training(mode)

    @property
    def embedding(self) -> nn.Module:
        if (found := embedding_of(self.module)) is None:
            raise NotOffered("Model.embedding: no embedding was found in the model")
        return found

    @property
    def head_weight(self) -> Tensor:
        if (found := getattr(head_of(self.module), "weight", None)) is None:
            raise NotOffered("Model.head_weight: no output head was found in the model")
        return found


@dataclass(frozen=True)
class ForeignTokenizer(Tokenizer):
    """A tokenizer with a length and named special ids."""

    live: nn.Module
    given: object | None

    @property
    def n_ids(self) -> int:
        if not isinstance(self.given, Sized):
            raise NotOffered("Tokenizer.n_ids: no tokenizer with a length was given")
        return len(self.given)

    @property
    def special_ids(self) -> Mapping[str, tuple[int | None, int | list[int] | None]]:
        config = config_of(self.live)
        return {
            name: (getattr(self.given, name, None), getattr(config, name, None))
            for name in ("bos_token_id", "eos_token_id")
        }


class ForeignTraining(Training):
    """The live model and optimizer of another trainer."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        model: nn.Module | None = None,
    ):
        self.module, self.given, self.model = module, optimizer, model or module

    def hidden_leaves(self) -> list[Tensor]:
        """Raises NotOffered for a model that cannot be called with ids, and on several ranks, which
        may divide parameters.
        """
        probe = Probe(self.model)
        if probe.refusal or world_size() > 1:
            raise NotOffered(f"Training.hidden_leaves: {probe.refusal or 'several ranks'}")
        known = {id(p) for p in self.module.parameters()}
        known |= {id(p) for g in self.optimizer.param_groups for p in g["params"]}
        return [p for p in probe.leaves() if id(p) not in known]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        if self.given is None:
            raise NotOffered("Training.optimizer: no optimizer was given")
        return self.given


class ComparedWeights(SavedCheckpoint):
    """The live weights beside those that were loaded again."""

    def __init__(
        self, live: Mapping[str, int], reloaded: Mapping[str, int], tied: tuple[bool, bool]
    ):
        self.live_checksums, self.reloaded_checksums, self.tied = live, reloaded, tied


@dataclass(frozen=True)
class ComparedReplicas(SavedCheckpoint):
    """The live weights beside those of another process; nothing was loaded again."""

    live_checksums: Mapping[str, int]
    replica_checksums: Mapping[str, int]


def is_causal(model: nn.Module) -> bool:
    """Whether a model is meant to predict the next token. A model without a configuration is."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    return not getattr(config, "is_encoder_decoder", False) and not any(
        word in name for word in ("MaskedLM", "Classification", "Encoder")
    )
