"""What `stack trace` can be asked besides its table: the first NaN, a lens, an ablation, a patch.
One of them at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from stackproof.cli import lens as lenses
from stackproof.cli import nonfinite as search
from stackproof.spec.errors import UsageError

TARGET = (
    "POINT[@POSITION]: layers.3.attention_out, layers.*.ffn.out, layers.3 for a whole block; @-1 "
    "the last token, @2:5, @* each by itself."
)
Nonfinite = Annotated[
    bool,
    typer.Option(
        "--nonfinite",
        help=(
            "Name the first operation that made a NaN or infinity: in a run's repro bundle, else "
            "in a forward."
        ),
    ),
]
Repro = Annotated[
    Path | None,
    typer.Option(
        "--repro",
        help="A repro bundle: replay it once with every operation watched. In place of a MODEL.",
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="With a repro bundle: cpu or cuda. Default: cpu.")
]
Base = Annotated[
    Path | None,
    typer.Option(
        "--base", help="With a repro bundle: step folder to begin from, where it only names one."
    ),
]
Lens = Annotated[
    str | None,
    typer.Option("--lens", help="logit or tuned: what the stream says after each layer."),
]
LensFile = Annotated[
    Path | None,
    typer.Option(
        "--lens-file", help="With --lens tuned: a lens fitted before, instead of fitting one."
    ),
]
LensSteps = Annotated[
    int,
    typer.Option("--lens-steps", min=1, help="With --lens tuned: steps to fit it, of 8 rows each."),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="With --lens tuned: a UTF-8 file to fit it to. Default: the run's own corpus.",
    ),
]
Ablate = Annotated[
    list[str] | None,
    typer.Option("--ablate", metavar="TARGET", help=f"Take this away and ask the loss. {TARGET}"),
]
AblateWith = Annotated[
    str,
    typer.Option(
        "--ablate-with", help="With --ablate: zero, or mean (over the prompt, or over --from)."
    ),
]
Sample = Annotated[
    int,
    typer.Option(
        "--sample",
        min=0,
        help="With --ablate: tokens to write without each target, and with all of them.",
    ),
]
Patch = Annotated[
    list[str] | None,
    typer.Option(
        "--patch", metavar="TARGET", help="Put in what the --from text has there, and ask again."
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from", help="The text that --patch takes values from, or --ablate-with mean its mean."
    ),
]
FITTED, LONGEST = 200, 512  # steps; tokens of a row of a text
EXAMPLES = (
    "stack trace runs/pocket-1 --nonfinite",
    "stack trace --repro runs/pocket-1/repro/runtime.finite-step-7",
    "stack trace runs/pocket-1 --prompt 'The function' --lens logit",
    "stack trace runs/pocket-1 --prompt 'The function' --ablate 'layers.*.attention_out'",
    "stack trace runs/pocket-1 --prompt 'The cat' --patch 'layers.*.resid_out@-1' --from 'The dog'",
)


@dataclass(frozen=True)
class Probe:
    """What was asked, as the options name it."""

    nonfinite: bool = False
    repro: Path | None = None
    device: str | None = None
    base: Path | None = None
    backward: bool = False
    lens: str | None = None
    lens_file: Path | None = None
    lens_steps: int = FITTED
    text: Path | None = None
    ablate: list[str] | None = None
    ablate_with: str = "zero"
    sample: int = 0
    patch: list[str] | None = None
    source: str | None = None

    @property
    def mode(self) -> str | None:
        """The one thing that is asked; None if nothing of this is.
        Raises UsageError for two of them, or an option that needs another.
        """
        given = {
            "--nonfinite": self.nonfinite or self.repro,
            "--lens": self.lens,
            "--ablate": self.ablate,
            "--patch": self.patch,
        }
        modes = [name for name, value in given.items() if value]
        if len(modes) > 1:
            raise UsageError(
                f"{modes[0]} and {modes[1]} are asked one at a time",
                next_step="leave one of them out",
            )
        mode = modes[0] if modes else None
        needs = {
            "--device": (self.device, ("--nonfinite",)),
            "--base": (self.base, ("--nonfinite",)),
            "--lens-file": (self.lens_file, ("--lens",)),
            "--lens-steps": (self.lens_steps != FITTED, ("--lens",)),
            "--text": (self.text, ("--lens",)),
            "--sample": (self.sample, ("--ablate",)),
            "--ablate-with": (self.ablate_with != "zero", ("--ablate",)),
            "--from": (self.source, ("--ablate", "--patch")),
        }
        for name, (value, allowed) in needs.items():
            if value and mode not in allowed:
                raise UsageError(
                    f"{name} says nothing without {' or '.join(allowed)}",
                    next_step="leave it out, or see stack trace --help",
                )
        self._refuse_unread()
        return mode

    def _refuse_unread(self) -> None:
        """Refuse options that what is asked would not read."""
        fitting = {"--text": self.text, "--lens-steps": self.lens_steps != FITTED}
        beside = {
            "--lens logit": (self.lens == "logit", {"--lens-file": self.lens_file, **fitting}),
            "--lens-file": (self.lens_file, fitting),
            "--ablate-with zero": (
                self.ablate and self.ablate_with == "zero",
                {"--from": self.source},
            ),
        }
        for what, (asked, options) in beside.items():
            if asked:
                refuse_beside(what, options)


def refuse_beside(what: str, options: dict[str, Any]) -> None:
    """Refuse the first option that is given and says nothing beside `what`."""
    if given := [name for name, value in options.items() if value]:
        raise UsageError(
            f"{given[0]} says nothing beside {what}", next_step="leave one of them out"
        )


def asked(options: dict[str, Any]) -> Probe | None:
    """The probe that these options of the verb ask for; None if they ask for its table or a
    comparison. Refuses what fits neither.
    """
    probe = Probe(**{f.name: options[f.name] for f in fields(Probe)})
    if probe.mode is None:
        return None
    table = ("against", "bisect", "check", "swap", "expect", "points", "csv", "weights")
    refuse_beside(probe.mode, {f"--{name}": options[name] for name in table})
    if probe.repro is not None:  # the bundle names the run, the step and its rows
        given = {
            "MODEL": options["model"],
            "--prompt": options["prompt"],
            "--input-ids": options["input_ids"],
        }
        refuse_beside(
            "--repro",
            {name: value is not None for name, value in given.items()}
            | {"--backward": options["backward"]},
        )
    if options["tokens"] != "all" or (options["backward"] and probe.mode != "--nonfinite"):
        raise UsageError(
            f"{'--tokens' if options['tokens'] != 'all' else '--backward'} says nothing beside "
            f"{probe.mode}"
        )
    return probe


def probe(what: Probe, text: str | None, asked: Any) -> None:
    """Do what was asked of the MODEL `text`, with the prompt and the folder of `asked`,
    which is of `stackproof.cli.trace`.
    """
    own = asked.prompt is not None or asked.input_ids is not None or what.backward
    bundle = what.repro or (
        search.newest_bundle(Path(text))
        if what.nonfinite and text is not None and not own
        else None
    )
    if bundle is not None:
        return search.trace_bundle(
            bundle, device=what.device, base=what.base, run_dir=asked.run_dir, json=asked.json
        )
    if what.device or what.base:
        raise UsageError(
            "--device and --base are for a repro bundle", next_step="give --repro BUNDLE"
        )
    if text is None:
        raise UsageError(
            "stack trace needs a MODEL, or --repro BUNDLE", next_step="stack trace runs/pocket-1"
        )
    from stackproof.cli.subjects import open_subject
    from stackproof.trace import side

    subject = open_subject(text)
    one = side(subject.model, subject.way)
    with one.around():
        _ask(what, subject, one, asked)


def _ask(what: Probe, subject: Any, one: Any, asked: Any) -> None:
    import torch

    from stackproof.cli.trace import builder_of, ids_of

    read = lambda text: torch.tensor([ids_of(replace(asked, prompt=text, input_ids=None), subject)])  # noqa: E731
    ids, source = (
        torch.tensor([ids_of(asked, subject)]),
        None if what.source is None else read(what.source),
    )
    options = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in vars(what).items()
        if v != getattr(Probe, k)
    }
    claim = {"--nonfinite": search.CLAIM, "--lens": lenses.CLAIMS["lens"]}.get(
        what.mode, lenses.CLAIMS["effects"]
    )
    not_covered = search.NOT_COVERED if what.nonfinite else lenses.NOT_COVERED
    builder = builder_of("trace", claim, not_covered, [subject], asked, **options)
    facts = {"model": subject.title, **subject.facts}
    case = lenses.Case(
        one.model, one.where, ids, subject.decode, builder, asked.run_dir, asked.json, facts
    )
    match what.mode:
        case "--nonfinite":
            search.trace_model(case, backward=what.backward)
        case "--lens":
            rows = lambda: _rows(what, subject)  # noqa: E731
            lenses.show_lens(
                case, kind=what.lens, fitted=what.lens_file, rows=rows, steps=what.lens_steps
            )
        case "--patch":
            lenses.show_patch(case, what.patch, source_ids=source)
        case _:
            write = lambda model, prompt, n: _write(subject, model, prompt, n)  # noqa: E731
            lenses.show_ablation(
                case,
                what.ablate,
                by=what.ablate_with,
                source_ids=source,
                sample=what.sample,
                generate=write,
            )


def _rows(what: Probe, subject: Any) -> tuple[Callable[[], Any], Any]:
    """Text to fit a lens to: a file, or the corpus of a run."""
    if what.text is None:
        if "step" not in subject.facts:
            raise UsageError(
                f"{subject.title} is no run, so it has no corpus", next_step="give --text FILE"
            )
        return lenses.run_rows(subject.config, subject.root)
    if subject.encode is None:
        raise UsageError(
            f"{subject.title} has no tokenizer.json beside it, so a text cannot be read"
        )
    try:
        content = what.text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read the text {what.text}: {e}", allowed="a UTF-8 file") from e
    return lenses.text_rows(subject.encode(content), min(subject.max_seq_len, LONGEST))


def _write(subject: Any, model: Any, prompt: list[int], n_tokens: int) -> str:
    """The likeliest text after a prompt.
    Raises UsageError for a model that this stack does not generate with.
    """
    from stackproof.evaluate.sampling import generate
    from stackproof.model.transformer import Transformer

    if not isinstance(model, Transformer):
        raise UsageError(
            "--sample writes with a model of this stack",
            value=type(model).__name__,
            next_step="stack import it, or leave it out",
        )
    return subject.decode(
        generate(model, prompt, max_new_tokens=n_tokens, temperature=0.0, eos_id=None)
    )
