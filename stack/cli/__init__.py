"""The command line. Nothing here imports torch before a verb needs it."""

import json
import os
import sys

import typer

from stackproof.cli import data, doctor, evaluate, evidence, export, gates, tokenizer, trace, train
from stackproof.cli.output import emitted
from stackproof.spec.errors import EnvironmentUnfit, StackproofError

TRAIN_EXTRA = ("torch", "numpy", "safetensors", "tokenizers", "rensa")

# Newer versions of typer include a copy of click, older ones depend on it; the errors of both
# derive from this class.
ClickException = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="stack",
    help="Train a language model whose every number can be traced, re-run and refuted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


for module in (train, evaluate, trace, export, data, tokenizer, gates, evidence, doctor):
    app.add_typer(module.app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a verb and map errors to the documented exit codes."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=arguments, standalone_mode=False, prog_name="stack")
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except StackproofError as e:
        _report(e.as_json(), str(e), arguments)
        sys.exit(e.exit_code)
    except ModuleNotFoundError as e:
        if e.name not in TRAIN_EXTRA:
            raise
        unfit = EnvironmentUnfit(
            f"this command needs {e.name}, which is not installed",
            allowed=(
                "the light install reads and verifies evidence; training and models need the "
                "[train] extra"
            ),
            next_step="pip install 'stackproof[train]', then stack doctor",
        )
        _report(unfit.as_json(), str(unfit), arguments)
        sys.exit(unfit.exit_code)
    except ClickException as e:
        next_step = f"{e.ctx.command_path if getattr(e, 'ctx', None) else 'stack'} --help"
        parts = {
            "error": "UsageError",
            "what": e.format_message(),
            "next_step": next_step,
            "exit_code": 2,
        }
        _report(parts, f"{e.format_message()}\n  next     {next_step}", arguments)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _report(document: dict, text: str, arguments: list[str]) -> None:
    if "--json" in arguments and not emitted():
        print(json.dumps(document))
    print(f"error: {text}", file=sys.stderr)
