"""The command line as data, for `spec/cli.json`: what verbs and options the project promises.

python -m stackproof.cli.surface > spec/cli.json
"""

import json
from typing import Any

import typer

from stackproof.cli import app


def surface() -> dict:
    """{"verbs": {"train": {"help", "arguments", "options", "examples"}, "gates list":
    …}} of the real command line.
    """
    verbs: dict[str, dict] = {}
    _walk(typer.main.get_command(app), "", verbs)
    return {"verbs": dict(sorted(verbs.items()))}


def _walk(command: Any, path: str, verbs: dict[str, dict]) -> None:
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            _walk(child, f"{path} {name}".strip(), verbs)
        return
    parameters = [p for p in command.params if p.name != "help"]
    options = [p for p in parameters if p.param_type_name == "option"]
    verbs[path] = {
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
            for p in parameters
            if p.param_type_name == "argument"
        ],
        "options": [
            {
                "flags": list(o.opts),
                "takes_value": not o.is_flag,
                "many": bool(o.multiple),
                "help": o.help or "",
            }
            for o in options
        ],
    }


def _unwrapped(text: str) -> str:
    """Each paragraph on one line, as the terminal shows it whatever the source wraps."""
    return "\n\n".join(" ".join(x.split()) for x in text.strip().split("\n\n"))


if __name__ == "__main__":
    print(json.dumps(surface(), indent=1, sort_keys=True, ensure_ascii=False))
