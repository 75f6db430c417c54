"""torch.compile with nothing left to chance: one graph, the random numbers of eager, and an error
where it cannot be built.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stackproof.model.reading import Report
from stackproof.spec.errors import EnvironmentUnfit


def compile_features(model: nn.Module) -> Callable[..., tuple[Tensor, Report]]:
    """`model.features` as one compiled graph over the same parameters, built at its first call.

    No part may be left to Python, and dropout draws what it draws in eager.
    Raises EnvironmentUnfit when called where it cannot be built.
    """
    # an environment variable can switch it on, and then eager runs without a word
    torch._dynamo.config.suppress_errors = False
    graph = torch.compile(model.features, fullgraph=True, options={"fallback_random": True})

    def features(*arguments: Tensor | None) -> tuple[Tensor, Report]:
        with building():
            return graph(*arguments)

    return features


@contextmanager
def building() -> Iterator[None]:
    """Turn what torch raises when it cannot build a graph into EnvironmentUnfit with its reason."""
    # seconds to import, and only runs that compile need it
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
