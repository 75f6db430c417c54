"""Reference pages: the command line, exit codes and errors, rules of the integrity check."""

import inspect

from markupsafe import Markup

from stackproof.cli.surface import surface
from stackproof.spec import errors
from tools.check_integrity import RULES
from tools.site_pages.render import Page, page, render


def cli_page() -> Page:
    """Every command with usage, arguments, options and examples, from the Typer app."""
    return page("cli.md", "Command line", "cli.md.j2", commands=surface()["verbs"])


def errors_page() -> Page:
    """Exit codes and the exception tree, from `stackproof.spec.errors`."""
    found = (c for _, c in inspect.getmembers(errors, inspect.isclass))
    classes = [c for c in found if issubclass(c, errors.StackproofError)]
    return page(
        "errors.md",
        "Exit codes and errors",
        "errors.md.j2",
        exit_codes=errors.EXIT_CODES,
        classes=[
            (c, c.__mro__[1], (inspect.getdoc(c) or "").splitlines()[0])
            for c in sorted(classes, key=lambda c: (len(c.__mro__), c.__name__))
        ],
    )


def integrity_rules(world: object, here: str) -> Markup:
    """The rules of the integrity check."""
    return render("integrity_rules.md.j2", here, rules=RULES.values())
