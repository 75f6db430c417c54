"""`stack trace`: look inside a model while it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spec.errors import UsageError
from stack.cli import probing
from stack.cli.look import TokenizerFile
from stack.cli.output import Json

EXAMPLES = (
    "stack trace runs/pocket-1 --nonfinite",
    "stack trace --repro runs/pocket-1/repro/runtime.finite-step-7",
    'stack trace runs/pocket-1 --prompt "The function" --lens logit',
    'stack trace runs/pocket-1 --prompt "The function" --ablate "layers.*.attention_out"',
    'stack trace runs/pocket-1 --prompt "The cat" --patch "layers.*.resid_out@-1" --from "The dog"',
)


def register(app: typer.Typer) -> None:
    app.command("trace", epilog="Examples: " + " · ".join(EXAMPLES))(trace)


def trace(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="A run directory or a checkpoint folder.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text the model reads. Default: the run's own sample prompt.")] = None,
    input_ids: Annotated[str | None, typer.Option("--input-ids", help="Instead: token ids, as in 1,2,3.")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Gradients too, of the mean next-token loss.")] = False,
    nonfinite: probing.Nonfinite = False,
    repro: probing.Repro = None,
    device: probing.Device = None,
    base: probing.Base = None,
    lens: probing.Lens = None,
    lens_file: probing.LensFile = None,
    lens_steps: probing.LensSteps = probing.FITTED,
    text: probing.Text = None,
    ablate: probing.Ablate = None,
    ablate_with: probing.AblateWith = "zero",
    sample: probing.Sample = 0,
    patch: probing.Patch = None,
    source: probing.From = None,
    tokenizer: TokenizerFile = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="Folder of the record. Default: runs/<record id>.")] = None,
    json: Json = False,
) -> None:
    """Look inside a model while it runs. Writes a record."""
    asked = probing.Probe(
        nonfinite, repro, device, base, backward, lens, lens_file, lens_steps, text, ablate, ablate_with, sample, patch, source
    )
    if asked.mode is None:
        raise UsageError(
            "say what to look for", allowed="--nonfinite, --repro, --lens, --ablate or --patch", next_step="stack trace --help"
        )
    read = lambda opened, other: _ids(opened, prompt if other is None else other, input_ids if other is None else None)  # noqa: E731
    given = prompt is not None or input_ids is not None
    probing.probe(asked, model, read, given=given, tokenizer=tokenizer, run_dir=run_dir, json=json)


def _ids(opened: Any, text: str | None, ids: str | None) -> Any:
    """Ids (1, T) of a text, after the end-of-text token that begins a document; or those given."""
    import torch

    if ids is None:
        return torch.tensor([[opened.tokenizer.eos_id, *opened.tokenizer.encode(opened.cfg.sample.prompt if text is None else text).ids]])
    if text is not None:
        raise UsageError("--prompt and --input-ids are two ways to say the same", next_step="leave one of them out")
    try:
        found = [int(i) for i in ids.split(",")]
    except ValueError as e:
        raise UsageError("--input-ids", value=ids, allowed="numbers with commas between them, as in 1,2,3") from e
    if not all(0 <= i < opened.tokenizer.vocab_size for i in found):
        raise UsageError("--input-ids", value=ids, allowed=f"ids of this vocabulary, 0 to {opened.tokenizer.vocab_size - 1}")
    return torch.tensor([found])
