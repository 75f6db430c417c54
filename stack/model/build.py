"""From configuration and seed to a model ready to train."""

import torch

from stackproof.config import ModelConfig
from stackproof.contracts.conditions import ensure, require
from stackproof.model.init import initialise
from stackproof.model.transformer import Transformer
from stackproof.spec.formulas import parameter_count


def n_parameters(model: torch.nn.Module) -> int:
    """Number of trainable and frozen entries, each storage counted once."""
    return sum(p.numel() for p in model.parameters())


@require(lambda vocab_size: vocab_size >= 2, "a vocabulary has at least two entries")
@require(lambda seed: 0 <= seed < 2**63, "a seed is a 63-bit number")
@ensure(
    lambda result, cfg, vocab_size: (
        n_parameters(result) == parameter_count(cfg.model_dump(), vocab_size)
    ),
    "the model has as many parameters as stackproof.spec.formulas.parameter_count says",
)
def build_model(
    cfg: ModelConfig, vocab_size: int, *, seed: int, device: torch.device | str = "cpu"
) -> Transformer:
    """A model initialised from `seed`, float32, in training mode, the same on every device.

    Made on the meta device and filled from its own generator,
    so torch's global random state is neither read nor moved.
    """
    with torch.device("meta"):
        model = Transformer(cfg, vocab_size)
    model.to_empty(device="cpu")
    model.positions.reset()
    initialise(model, cfg, torch.Generator().manual_seed(seed))
    return model.to(device)
