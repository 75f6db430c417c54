"""What `stack trace` can be asked besides its table: the first NaN, a lens, an ablation, a patch. One of them at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from spec.errors import UsageError
from stack.cli import lens as lenses
from stack.cli import nonfinite as search

TARGET = (
    "POINT[@POSITION]: layers.3.attention_out, layers.*.ffn.out, layers.3 for a whole block; @-1 the last token, @2:5, @* each by itself."
)
Nonfinite = Annotated[
    bool,
    typer.Option("--nonfinite", help="Name the first operation that made a NaN or infinity: in a run's repro bundle, else in a forward."),
]
Repro = Annotated[Path | None, typer.Option("--repro", help="A repro bundle: replay it once with every operation watched. Needs no MODEL.")]
Device = Annotated[str | None, typer.Option("--device", help="With a repro bundle: cpu or cuda. Default: cpu.")]
Base = Annotated[Path | None, typer.Option("--base", help="With a repro bundle: step folder to begin from, where it only names one.")]
Lens = Annotated[str | None, typer.Option("--lens", help="logit or tuned: what the stream says after each layer.")]
LensFile = Annotated[Path | None, typer.Option("--lens-file", help="With --lens tuned: a lens fitted before, instead of fitting one.")]
LensSteps = Annotated[int, typer.Option("--lens-steps", min=1, help="With --lens tuned: steps to fit it, of 8 rows each.")]
Text = Annotated[Path | None, typer.Option("--text", help="With --lens tuned: a UTF-8 file to fit it to. Default: the run's own corpus.")]
Ablate = Annotated[list[str] | None, typer.Option("--ablate", metavar="TARGET", help=f"Take this away and ask the loss. {TARGET}")]
AblateWith = Annotated[str, typer.Option("--ablate-with", help="With --ablate: zero, or mean (over the prompt, or over --from).")]
Sample = Annotated[int, typer.Option("--sample", min=0, help="With --ablate: tokens to write without each target, and with all of them.")]
Patch = Annotated[list[str] | None, typer.Option("--patch", metavar="TARGET", help="Put in what the --from text has there, and ask again.")]
From = Annotated[str | None, typer.Option("--from", help="The text that --patch takes values from, or --ablate-with mean its mean.")]
FITTED = 200


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
        """The one thing that is asked; None if nothing of this is. Raises UsageError for two of them, or an option that needs another."""
        given = {"--nonfinite": self.nonfinite or self.repro, "--lens": self.lens, "--ablate": self.ablate, "--patch": self.patch}
        modes = [name for name, value in given.items() if value]
        if len(modes) > 1:
            raise UsageError(f"{modes[0]} and {modes[1]} are asked one at a time", next_step="leave one of them out")
        mode = modes[0] if modes else None
        needs = {
            "--device": (self.device, ("--nonfinite",)),
            "--base": (self.base, ("--nonfinite",)),
            "--lens-file": (self.lens_file, ("--lens",)),
            "--text": (self.text, ("--lens",)),
            "--sample": (self.sample, ("--ablate",)),
            "--ablate-with": (self.ablate_with != "zero", ("--ablate",)),
            "--from": (self.source, ("--ablate", "--patch")),
        }
        for name, (value, allowed) in needs.items():
            if value and mode not in allowed:
                raise UsageError(f"{name} says nothing without {' or '.join(allowed)}", next_step="leave it out, or see stack trace --help")
        return mode


def probe(
    asked: Probe,
    model: Path | None,
    read: Callable[[Any, str | None], Any],
    *,
    given: bool,
    tokenizer: Path | None,
    run_dir: Path | None,
    json: bool,
) -> None:
    """Do what was asked. `read(opened, text)` gives ids (1, T) of a text, or of the prompt for None; `given` says whether there is one."""
    if asked.repro is not None or (asked.nonfinite and not given and model is not None and search.newest_bundle(model)):
        bundle = asked.repro or search.newest_bundle(model)
        return search.trace_bundle(bundle, device=asked.device, base=asked.base, run_dir=run_dir, json=json)
    if asked.device or asked.base:
        raise UsageError("--device and --base are for a repro bundle", next_step="give --repro BUNDLE")
    if model is None:
        raise UsageError("stack trace needs a MODEL, or --repro BUNDLE", next_step="stack trace runs/pocket-1")
    from stack.cli.models import open_model

    opened = open_model(model, tokenizer)
    ids = read(opened, None)
    if asked.mode == "--nonfinite":
        builder = search.record_builder(opened.cfg.to_dict(), (opened.state["record"],))
        return search.trace_model(opened.model, ids, _with_inputs(builder, opened), backward=asked.backward, run_dir=run_dir, json=json)
    write = lambda i: opened.tokenizer.decode([i]) or opened.tokenizer.literal(i)  # noqa: E731
    about = lenses.Asked(opened.model, ids, write, _builder(opened, asked.mode), run_dir, json)
    source = None if asked.source is None else read(opened, asked.source)
    if asked.mode == "--lens":
        return lenses.show_lens(about, kind=asked.lens, fitted=asked.lens_file, rows=lambda: _rows(asked, opened), steps=asked.lens_steps)
    if asked.mode == "--patch":
        return lenses.show_patch(about, asked.patch, source_ids=source)
    writer = lambda model, prompt, n: _write(opened, model, prompt, n)  # noqa: E731
    return lenses.show_ablation(about, asked.ablate, by=asked.ablate_with, source_ids=source, sample=asked.sample, generate=writer)


def _rows(asked: Probe, opened: Any) -> tuple[Callable[[], Any], Any]:
    """Text to fit a lens to."""
    if asked.text is None:
        return lenses.run_rows(opened.cfg, opened.tokenizer)
    try:
        content = asked.text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read the text {asked.text}: {e}", allowed="a UTF-8 file") from e
    return lenses.text_rows(opened.tokenizer.encode(content).ids, opened.cfg.model.max_seq_len)


def _write(opened: Any, model: Any, prompt: list[int], n_tokens: int) -> str:
    """The likeliest text after a prompt."""
    from stack.evaluate.sampling import generate

    return opened.tokenizer.decode(generate(model, prompt, max_new_tokens=n_tokens, temperature=0.0, eos_id=None))


def _builder(opened: Any, mode: str) -> Any:
    from spec.building import RecordBuilder
    from spec.gates import load_spec
    from spec.provenance import environment

    builder = RecordBuilder(
        kind="trace",
        spec=load_spec(),
        config=opened.cfg.to_dict(),
        claim=lenses.CLAIMS["lens" if mode == "--lens" else "effects"],
        not_covered=lenses.NOT_COVERED,
        environment=environment(),
        parents=(opened.state["record"],),
    )
    return _with_inputs(builder, opened)


def _with_inputs(builder: Any, opened: Any) -> Any:
    from spec.building import artefact

    builder.inputs = [
        artefact(opened.folder / "model.safetensors", root=opened.run_dir),
        artefact(opened.run_dir / "tokenizer.json", root=opened.run_dir),
    ]
    return builder
