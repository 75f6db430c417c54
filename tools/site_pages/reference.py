"""Reference pages: the command line, exit codes and errors, rules of the integrity check."""

import inspect

from stackproof.spec import errors
from tools.check_integrity import RULES
from tools.site_pages.markup import Page, bullets, code, esc, fenced, prose, table
from tools.site_pages.world import World


def cli_page(world: World) -> Page:
    """Every verb with usage, arguments, options and examples, from `spec/cli.json`."""
    page = Page("cli.md", "Command line")
    page.add(
        "`stack` and `stackproof` are the same command. `--json` prints one JSON document on "
        "standard output and nothing else there; messages go to standard error. What the process "
        f"returns: {page.link('exit codes', 'errors.md')}.",
    )
    if world.cli is None:
        return page.add(
            "`spec/cli.json`, from which this page is written, is not part of this build."
        )
    for verb, described in sorted(world.cli["verbs"].items()):
        page.add(f"## stack {verb}", *_verb(verb, described))
    return page


def _verb(verb: str, described: dict) -> list[str]:
    arguments, options = described.get("arguments", []), described.get("options", [])
    usage = " ".join(
        ["stack", verb, *map(_argument, arguments), *(["[OPTIONS]"] if options else [])]
    )
    rows = [
        [code(a["name"]), "yes" if a.get("required") else "no", prose(a.get("help") or "–")]
        for a in arguments
    ]
    flags = [
        [" ".join(map(code, o["flags"])), _takes(o), prose(o.get("help") or "–")] for o in options
    ]
    examples = described.get("examples", [])
    return [
        prose(described.get("help", "")),
        fenced(usage, "sh"),
        table(["argument", "required", "meaning"], rows) if rows else "",
        table(["option", "value", "meaning"], flags) if flags else "",
        fenced("\n".join(examples), "sh") if examples else "",
    ]


def _argument(argument: dict) -> str:
    text = argument["name"].upper() + ("…" if argument.get("many") else "")
    return text if argument.get("required") else f"[{text}]"


def _takes(option: dict) -> str:
    if not option.get("takes_value"):
        return "none"
    return "one, may be repeated" if option.get("many") else "one"


def errors_page(world: World) -> Page:
    """Exit codes and the exception tree, from `stackproof.spec.errors`."""
    page = Page("errors.md", "Exit codes and errors")
    page.add(
        f"How an error message is built: {page.link('error messages', 'errors-standard.md')}.",
        "## Exit codes",
        table(["code", "meaning"], [[code(n), esc(text)] for n, text in errors.EXIT_CODES.items()]),
        "## Exceptions",
    )
    classes = [
        c
        for _, c in inspect.getmembers(errors, inspect.isclass)
        if issubclass(c, errors.StackproofError)
    ]
    rows = [
        [code(c.__name__), code(c.__mro__[1].__name__), str(c.exit_code), prose(_first_line(c))]
        for c in sorted(classes, key=_depth)
    ]
    return page.add(table(["exception", "is a", "exit code", "raised for"], rows))


def _depth(kind: type) -> tuple[int, str]:
    return len(kind.__mro__), kind.__name__


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0]


def integrity_rules(world: World, page: Page) -> str:
    """Rules of the integrity check: code and what it holds."""
    return bullets(f"{code(rule.code)}: {prose(rule.title)}" for rule in RULES.values())
