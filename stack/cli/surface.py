"""The stable command line as data, for `spec/cli.json`: commands, arguments and options.

python -m stackproof.cli.surface > spec/cli.json
"""

import json
from typing import Any

import typer

from stackproof.cli import app
from stackproof.cli.trace import SELECTORS, TraceGroup


def surface() -> dict:
    """{"verbs": {"train": {"help", "arguments", "options", "examples"}, "gates list":
    …}} of the real command line.
    """
    verbs: dict[str, dict] = {}
    _walk(typer.main.get_command(app), "", verbs)
    return {"verbs": dict(sorted(verbs.items()))}


def _walk(command: Any, path: str, verbs: dict[str, dict]) -> None:
    if not hasattr(command, "commands"):
        verbs[path] = _described(command, command.params)
        return
    for name, child in command.commands.items():
        _walk(child, f"{path} {name}".strip(), verbs)
    if isinstance(command, TraceGroup):
        verbs[path] = _top_level_form(command)


def _described(command: Any, params: list[Any]) -> dict[str, Any]:
    return {
        "help": _unwrapped(command.help or ""),
        "examples": (command.epilog or "").removeprefix("Examples: ").split(" · ")
        if command.epilog
        else [],
        "arguments": [
            {
                "name": p.name,
                "required": p.required,
                "many": p.nargs == -1 or p.multiple is True,
                "help": getattr(p, "help", "") or "",
            }
            for p in params
            if p.param_type_name == "argument"
        ],
        "options": [
            {
                "flags": list(o.opts),
                "takes_value": not o.is_flag,
                "many": bool(o.multiple),
                "help": o.help or "",
            }
            for o in params
            if o.param_type_name == "option" and o.name != "help"
        ],
    }


def _unwrapped(text: str) -> str:
    """The text with each paragraph on one line, independent of the line breaks in the source."""
    return "\n\n".join(" ".join(x.split()) for x in text.strip().split("\n\n"))


def _top_level_form(group: TraceGroup) -> dict[str, Any]:
    """`stack trace MODEL …`: options that select a command, and those of all commands."""
    described = _described(group, group.commands["stats"].params)
    known = {
        flag: {
            "flags": [flag],
            "takes_value": takes_value,
            "many": takes_value,
            "help": f"Selects `stack trace {command}`.",
        }
        for flag, (command, takes_value) in SELECTORS.items()
    }
    for command in group.commands.values():
        for option in _described(command, command.params)["options"]:
            known.setdefault(option["flags"][0], option)
    # --repro replaces it
    arguments = [argument | {"required": False} for argument in described["arguments"]]
    return described | {"arguments": arguments, "options": list(known.values())}


if __name__ == "__main__":
    print(json.dumps(surface(), indent=1, sort_keys=True, ensure_ascii=False))  # noqa: T201
