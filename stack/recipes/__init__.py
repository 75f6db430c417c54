"""Complete configurations, named by size.
Each is a function without arguments that returns a RunConfig.
"""

import difflib
from collections.abc import Callable

from stackproof.config import RunConfig
from stackproof.recipes import sizes
from stackproof.recipes.pocket import pocket, pocket_code
from stackproof.spec.errors import ConfigError

MAKERS = (
    *(pocket, pocket_code, sizes.tiny, sizes.huge, sizes.nanolm),
    *(sizes.llama_370m, sizes.gpt2_124m, sizes.andrea_120m),
)
RECIPES: dict[str, Callable[[], RunConfig]] = {
    make.__name__.replace("_", "-"): make for make in MAKERS
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
