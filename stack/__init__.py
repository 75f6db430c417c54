"""Train a language model whose every number can be traced, re-run and refuted.

The public names are imported on first use: `import stackproof` needs no torch and costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stackproof.cli.load_model import open_model
    from stackproof.config import ModelConfig, RunConfig, load_config
    from stackproof.contracts.keeper import Gatekeeper
    from stackproof.model.build import build_model
    from stackproof.recipes import recipe
    from stackproof.spec.errors import GateFailed, StackproofError
    from stackproof.spec.gates import load_spec
    from stackproof.spec.records import read_record

__version__ = "0.1.0"
__all__ = [
    "GateFailed",
    "Gatekeeper",
    "ModelConfig",
    "RunConfig",
    "StackproofError",
    "__version__",
    "build_model",
    "load_config",
    "load_spec",
    "open_model",
    "read_record",
    "recipe",
]
_HOMES = {
    "GateFailed": "spec.errors",
    "Gatekeeper": "contracts.keeper",
    "ModelConfig": "config",
    "RunConfig": "config",
    "StackproofError": "spec.errors",
    "build_model": "model.build",
    "load_config": "config",
    "load_spec": "spec.gates",
    "open_model": "cli.load_model",
    "read_record": "spec.records",
    "recipe": "recipes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
