"""Complete configurations, named by size.
Each is a function without arguments that returns a RunConfig.
"""

import difflib
from collections.abc import Callable

from stackproof.config import RunConfig
from stackproof.recipes import sizes
from stackproof.recipes.pocket import pocket, pocket_code
from stackproof.spec.errors import ConfigError

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "pocket": pocket,
    "pocket-code": pocket_code,
    "tiny": sizes.tiny,
    "huge": sizes.huge,
    "nanolm": sizes.nanolm,
    "llama-370m": sizes.llama_370m,
    "gpt2-124m": sizes.gpt2_124m,
    "andrea-120m": sizes.andrea_120m,
}


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe by name. Raises ConfigError with the nearest name if it is
    unknown.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        raise ConfigError(
            f"unknown recipe {name!r}",
            allowed=", ".join(RECIPES),
            next_step=f"stack train {near[0]}"
            if near
            else "stack train pocket, or give the path of a .toml file",
        )
    return RECIPES[name]()
