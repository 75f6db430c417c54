"""The command line. Nothing here imports torch before a verb needs it."""

import json
import sys
from collections.abc import Sequence

import typer

from stackproof.cli import (
    checkpoint,
    data,
    doctor,
    evaluate,
    evidence,
    export,
    gates,
    inspect,
    tokenizer,
    trace,
    train,
)
from stackproof.cli.ending import bug, documented, drop_unwritten, end_if_unread, prepare_streams
from stackproof.cli.known_good import is_own_fault
from stackproof.cli.output import emitted, note
from stackproof.spec.errors import StackproofError

app = typer.Typer(
    name="stack",
    help="Train a language model whose every number can be traced, re-run and refuted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


VERBS = train, evaluate, inspect, trace, export, checkpoint, data, tokenizer, gates, evidence
for module in (*VERBS, doctor):
    app.add_typer(module.app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a verb and map errors to the documented exit codes."""
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_streams()
    try:
        code = _verb(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # click exits with 1 at once
            end_if_unread()
        raise
    except (KeyboardInterrupt, typer.Abort):
        note("stopped")
        sys.exit(130)
    except BaseException as e:  # also the panic of a library in Rust
        if isinstance(e, OSError):
            end_if_unread()
            drop_unwritten()
        error = documented(e) or bug(e)
        if isinstance(e, StackproofError | RecursionError) and is_own_fault(e, _verb):
            error = bug(e)
        _report(error, arguments)
        sys.exit(error.exit_code)


def _verb(arguments: Sequence[str]) -> object:
    return app(args=list(arguments), standalone_mode=False, prog_name="stack")


def _report(error: StackproofError, arguments: list[str]) -> None:
    if "--json" in arguments and not emitted():
        print(json.dumps(error.as_json()))  # noqa: T201
    note(f"error: {error}")
