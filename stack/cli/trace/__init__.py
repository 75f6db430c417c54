"""`stack trace`: a group of commands; without one, the options of
`stack trace MODEL …` select it.
"""

from itertools import islice
from typing import Any

from typer import Typer
from typer.core import TyperGroup

from stackproof.cli.options import examples
from stackproof.cli.trace import bisect, compare, effects, lens, nonfinite, stats, weights
from stackproof.spec.errors import UsageError

HELP = """Activation statistics, anomalies, comparison of two models, ablation and patching.

`stack trace MODEL` alone means `stack trace stats MODEL`. --against, --bisect, --weights, --nonfinite, --repro, --lens, --ablate and
--patch select the other commands in this form. Give a folder that is named like a command as ./compare. Every command writes a record.
"""  # noqa: E501
EXAMPLES = (
    "stack trace runs/pocket-1",
    "stack trace runs/pocket-1 --against self@bfloat16",
    "stack trace bisect runs/pocket-1 --against hf/pocket",
    "stack trace lens runs/pocket-1 logit --prompt 'The function'",
    "stack trace ablate runs/pocket-1 'layers.*.attention_out'",
)
# Options of the top-level form that select a command, and whether a value follows that is
# an argument of the command.
SELECTORS = {
    "--bisect": ("bisect", False),
    "--weights": ("weights", False),
    "--nonfinite": ("nonfinite", False),
    "--lens": ("lens", True),
    "--ablate": ("ablate", True),
    "--patch": ("patch", True),
}
# Options of a command that select it if no option above does.
IMPLIED = {"--repro": "nonfinite", "--against": "compare", "--swap": "compare"}


class TraceGroup(TyperGroup):
    """A group that routes arguments without a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in (*self.commands, *ctx.help_option_names)
        return super().parse_args(ctx, args if named else self.routed(args))

    def routed(self, args: list[str]) -> list[str]:
        """The arguments with the command that their options select; `stats` by default.

        Raises UsageError if they select two commands, or if the value of a
        selector has no MODEL before it.
        """
        options = [
            p
            for command in self.commands.values()
            for p in command.params
            if p.param_type_name == "option"
        ]
        valued = {flag for p in options if not p.is_flag for flag in p.opts}
        selected, seen, rest, values, has_model = {}, set(), [], [], False
        words = iter(args)
        for word in words:
            option, equals, value = word.partition("=")
            if option in SELECTORS:
                command, takes_value = SELECTORS[option]
                selected[command] = option
                values += [value if equals else next(words, "")] if takes_value else []
                continue
            rest.append(word)
            seen.add(option)
            has_model |= not word.startswith("-")
            if option in valued and not equals:
                rest += islice(words, 1)
        if len(selected) > 1:
            raise UsageError(
                f"{' and '.join(selected.values())} select different commands",
                next_step="leave one of them out",
            )
        if values and not has_model:
            raise UsageError(
                f"{next(iter(selected.values()))} needs a MODEL", next_step="stack trace --help"
            )
        command = next(iter(selected), None) or next(
            (c for o, c in IMPLIED.items() if o in seen), "stats"
        )
        return [command, *rest, *values]


app = Typer(
    name="trace", cls=TraceGroup, help=HELP, epilog=examples(*EXAMPLES), no_args_is_help=True
)
for function, lines in (
    (stats.stats, stats.EXAMPLES),
    (compare.compare, compare.EXAMPLES),
    (bisect.bisect, bisect.EXAMPLES),
    (nonfinite.nonfinite, nonfinite.EXAMPLES),
    (lens.lens, lens.EXAMPLES),
    (effects.ablate, effects.ABLATE_EXAMPLES),
    (effects.patch, effects.PATCH_EXAMPLES),
    (weights.weights, weights.EXAMPLES),
):
    app.command(epilog=examples(*lines))(function)
