"""From configuration and seed to a model ready to train, and its compiled forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stackproof.config import ModelConfig
from stackproof.contracts.conditions import ensure, require
from stackproof.model.forward_context import Report
from stackproof.model.init import initialise
from stackproof.model.transformer import Transformer
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.spec.formulas import parameter_count


def n_parameters(model: nn.Module) -> int:
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

    Built on the meta device and filled from a generator of its own: torch's global random state
    is neither read nor changed.
    """
    with torch.device("meta"):
        model = Transformer(cfg, vocab_size)
    model.to_empty(device="cpu")
    model.positions.reset()
    initialise(model, cfg, torch.Generator().manual_seed(seed))
    return model.to(device)


# --- torch.compile ----------------------------------------------------------------------------


def compile_hidden_states(model: nn.Module) -> Callable[..., tuple[Tensor, Report]]:
    """`model.hidden_states` as one graph over the same parameters, compiled at its first call.

    The whole forward is in the graph, and dropout draws the same numbers as in eager mode. The call
    raises EnvironmentUnfit if torch cannot compile the graph here.
    """
    # an environment variable can switch it on, and then eager mode runs without a warning
    torch._dynamo.config.suppress_errors = False
    graph = torch.compile(model.hidden_states, fullgraph=True, options={"fallback_random": True})

    def hidden_states(*arguments: Tensor | None) -> tuple[Tensor, Report]:
        with building():
            return graph(*arguments)

    return hidden_states


@contextmanager
def building() -> Iterator[None]:
    """Turn torch's errors of compilation into EnvironmentUnfit with the reason."""
    # takes seconds to import, and only runs that compile need it
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as e:
        reason = getattr(e, "inner_exception", e)
        raise EnvironmentUnfit(
            f"torch {torch.__version__} cannot compile this model here",
            value=f"{type(reason).__name__}: {str(reason).strip().splitlines()[0]}",
            allowed="a C++ compiler (CXX or g++) on the CPU; a C compiler and triton on a GPU",
            next_step="install what is missing, or --set train.compile=false",
        ) from e
