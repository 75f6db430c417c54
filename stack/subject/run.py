"""The parts of a run that every part of its subject is made from."""

from dataclasses import dataclass

import torch

from stackproof.config import RunConfig
from stackproof.data.prepare import Dataset
from stackproof.model.build import build_model
from stackproof.model.transformer import Transformer
from stackproof.train.rng import stream_seed


@dataclass(frozen=True)
class RunParts:
    """Configuration, data set and device of a run."""

    cfg: RunConfig
    dataset: Dataset
    device: torch.device

    @property
    def vocab_size(self) -> int:
        return self.dataset.tokenizer.vocab_size

    def fresh_model(self) -> Transformer:
        """A model of the run at step 0, on its device."""
        seed = stream_seed(self.cfg.seed, "init")
        return build_model(self.cfg.model, self.vocab_size, seed=seed, device=self.device)


def wrapping(cfg: RunConfig) -> RunConfig:
    """The run with a data loader that begins again where the corpus ends."""
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"on_exhausted": "wrap"})})


def small_run(cfg: RunConfig) -> RunConfig:
    """The run with at most 2 rows and 2 micro-batches, eager, wrapping; model, length, dtype and
    dropout stay.
    """
    rows, accumulation = min(cfg.train.micro_batch_size, 2), min(cfg.accumulation(), 2)
    train = {
        "micro_batch_size": rows,
        "tokens_per_step": rows * cfg.model.max_seq_len * accumulation,
        "compile": False,
    }
    return wrapping(cfg).model_copy(update={"train": cfg.train.model_copy(update=train)})


def tiny_run(cfg: RunConfig) -> RunConfig:
    """The run with a model of a few hundred parameters, for gates that judge files and not
    arithmetic.
    """
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 16}
    sizes["max_seq_len"] = min(16, cfg.model.max_seq_len)
    train = {
        "micro_batch_size": 1,
        "tokens_per_step": sizes["max_seq_len"],
        "compile": False,
    }
    return wrapping(cfg).model_copy(
        update={
            "model": cfg.model.model_copy(update=sizes),
            "train": cfg.train.model_copy(update=train),
        }
    )
