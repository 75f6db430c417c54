"""`stack trace lens`: the logit lens, and the tuned lens, fitted here or read from a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from stackproof.cli.load_model import TraceModel, load_model
from stackproof.cli.output import note, print_table
from stackproof.cli.paths import refuse_unused
from stackproof.cli.recording import Claim, OpenRecord
from stackproof.cli.trace.common import Model, Request, encode, precise, takes
from stackproof.spec.errors import DataError, UsageError
from stackproof.spec.files import read_text

FILE = "lens.safetensors"
CLAIM = Claim(
    "trace",
    "Final norm and head map the residual stream after each layer to these predictions.",
    ("other texts", "a model trained with such a value"),
)
EXAMPLES = (
    "stack trace lens runs/pocket-1 logit --prompt 'The function'",
    "stack trace lens runs/pocket-1 tuned --run-dir runs/lens-1",
    "stack trace lens runs/pocket-1 tuned --lens-file runs/lens-1/lens.safetensors",
)
MAX_FITTED_BYTES = 256 * 2**20
STEPS, FIT_ROWS, HELD_OUT_ROWS, SEED = 200, 8, 16, 0
MAX_ROW_TOKENS = 512  # per row of --text


@takes("prompt", "input_ids")
def lens(
    request: Request,
    model: Model,
    kind: Annotated[
        Literal["logit", "tuned"], Argument(metavar="[logit|tuned]", help="The kind of lens.")
    ] = "logit",
    lens_file: Annotated[
        Path | None, Option(help="Tuned: use this lens instead of fitting one.")
    ] = None,
    lens_steps: Annotated[
        int | None,
        Option(min=1, help=f"Tuned: fit for this many steps of {FIT_ROWS} rows. Default: {STEPS}."),
    ] = None,
    text: Annotated[
        Path | None, Option(help="Tuned: fit to this UTF-8 file. Default: the corpus of the run.")
    ] = None,
) -> None:
    """Read the residual stream after each layer through the final norm and head of the model."""
    import torch

    from stackproof.trace import read_lens, variant

    fitting = {"--text": text, "--lens-steps": lens_steps}
    if kind == "logit":
        refuse_unused("a logit lens", {"--lens-file": lens_file, **fitting})
    if lens_file is not None:
        refuse_unused("--lens-file", fitting)
    loaded = load_model(model)
    one, ids = variant(loaded.model, loaded.mode), request.ids(loaded)
    options = {"lens_file": lens_file, "text": text}
    options |= {"lens_steps": None if lens_steps == STEPS else lens_steps}
    options = {name: value for name, value in options.items() if value is not None}
    record = request.open(CLAIM, [loaded], lens=kind, **options)
    with one.around():
        fitted, held_out = None, []
        if lens_file is not None:
            fitted = _read(lens_file, one, record)
        elif kind == "tuned":
            rows = _corpus_rows(loaded) if text is None else _text_rows(loaded, text)
            fitted, held_out = _fit(one, *rows, lens_steps or STEPS, record)
        found, _ = read_lens(one.model, torch.tensor([ids]), lens=fitted, where=one.where)
    points = [_point(row, loaded) for row in found]
    document = {"lens": kind, "tokens": [loaded.decode([i]) for i in ids]}
    document |= {"points": points, "held_out": held_out}
    document |= {"model": loaded.title, **loaded.facts, "input_ids": ids}
    record.write_series("lens.jsonl", [document])
    record.close(f"{kind} lens of {len(points)} points", document, _show)


def _read(file: Path, one: Any, record: OpenRecord) -> Any:
    from stackproof.trace.lens import load_lens

    record.input(file, name="lens")
    return load_lens(file, one.model)


def _fit(
    one: Any, draw: Callable[[], Any], held_out: Any, steps: int, record: OpenRecord
) -> tuple[Any, list[dict[str, Any]]]:
    """Fit a lens and write it beside the record; also compares both lenses on held-out text."""
    from stackproof.trace import read_lens, train_lens
    from stackproof.trace.lens import save_lens

    def tell(step: int, kl_nats: float) -> None:
        if step % max(1, steps // 10) == 0 or step == steps:
            note(f"  lens, step {step}/{steps}: {kl_nats:.4f} nats from the model")

    lens = train_lens(
        one.model, (draw() for _ in range(steps)), steps=steps, where=one.where, tell=tell
    )
    save_lens(lens, record.path(FILE), one.model)
    record.output(record.path(FILE), record.directory)
    raw, tuned = (
        read_lens(one.model, held_out, lens=which, where=one.where)[0] for which in (None, lens)
    )
    compared = []
    for before, after in zip(raw, tuned):
        row = {"raw_loss_nats": before.loss_nats, "raw_kl_nats": before.kl_nats}
        row |= {"tuned_loss_nats": after.loss_nats, "tuned_kl_nats": after.kl_nats}
        compared.append({"point": before.point} | row)
        for name in ("raw_loss_nats", "tuned_loss_nats"):
            n = held_out[:, 1:].numel()
            record.builder.metric(
                f"{before.point}.{name}", row[name], "nats per token", n=n, better="lower"
            )
    return lens, compared


def _point(row: Any, loaded: TraceModel) -> dict[str, Any]:
    """One point of the document; `top` holds the most likely tokens after each position
    with their probabilities.
    """
    ids, probs = row.top_ids_BTk[0].tolist(), row.top_probs_BTk[0].tolist()
    top = [
        [{"id": i, "token": loaded.decode([i]), "prob": p} for i, p in zip(*at)]
        for at in zip(ids, probs)
    ]
    return {
        k: getattr(row, k)
        for k in ("point", "layer", "loss_nats", "kl_nats", "entropy_nats", "agrees_frac")
    } | {"top": top}


def _show(document: dict[str, Any]) -> None:
    last = min(8, len(document["tokens"]))
    columns = [
        "point",
        "loss",
        "KL",
        "agrees",
        *(f"after {t!r}" for t in document["tokens"][-last:]),
    ]
    rows = [
        [p["point"], precise(p["loss_nats"]), precise(p["kl_nats"]), f"{p['agrees_frac']:.0%}"]
        + [f"{at[0]['token']!r} {at[0]['prob']:.2f}" for at in p["top"][-last:]]
        for p in document["points"]
    ]
    print_table(
        f"{document['lens']} lens, nats per token; the last row is the model", columns, rows
    )
    if document["held_out"]:
        rows = [
            [r["point"], *(precise(r[k]) for k in r if k != "point")] for r in document["held_out"]
        ]
        print_table(
            "Held-out text", ["point", "raw loss", "raw KL", "tuned loss", "tuned KL"], rows
        )


# ---- text for fitting a lens: a function that draws a batch of ids, and held-out ids


def _corpus_rows(loaded: TraceModel) -> tuple[Callable[[], Any], Any]:
    """Rows of the corpus of a run: batches of its training split, and held-out ids."""
    import torch

    from stackproof.config import recorded_config
    from stackproof.data import plugins
    from stackproof.data.data_loader import rows_batch
    from stackproof.data.prepare import prepare
    from stackproof.data.tokenizer import load_tokenizer

    if "step" not in loaded.facts:
        raise UsageError(
            f"{loaded.title} is not a run, so it has no corpus", next_step="give --text FILE"
        )
    cfg = recorded_config(loaded.config)
    with plugins.permitted((), origin=str(loaded.root)):
        dataset, length = prepare(cfg.data), cfg.model.max_seq_len
    if dataset.tokenizer.sha256 != load_tokenizer(loaded.root / "tokenizer.json").sha256:
        raise DataError(
            "the corpus of the run has changed, so its tokens are not available",
            next_step="give --text FILE",
        )
    chance, n = torch.Generator().manual_seed(SEED), dataset.train.n_windows(length)
    draw = lambda: (  # noqa: E731
        rows_batch(
            dataset.train, torch.randint(0, n, (FIT_ROWS,), generator=chance).numpy(), length
        ).input_ids
    )
    available = dataset.validation.n_windows(length)
    chosen = (
        torch.arange(min(HELD_OUT_ROWS, available)) * available // min(HELD_OUT_ROWS, available)
    )
    return draw, rows_batch(dataset.validation, chosen.numpy(), length).input_ids


def _text_rows(loaded: TraceModel, file: Path) -> tuple[Callable[[], Any], Any]:
    """Rows of a text; its last tenth is held out.
    Raises DataError for a text of fewer than 20 rows.
    """
    import torch

    try:
        ids = encode(read_text(file, MAX_FITTED_BYTES), loaded)
    except OSError as e:
        raise UsageError(f"cannot read the text {file}: {e}", allowed="a UTF-8 file") from e
    length = min(loaded.max_seq_len, MAX_ROW_TOKENS)
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if len(rows) < 20:
        raise DataError(
            "the text is too short to fit a lens to",
            value=f"{len(rows)} rows of {length} tokens",
            allowed="at least 20",
        )
    kept, chance = len(rows) - max(2, len(rows) // 10), torch.Generator().manual_seed(SEED)
    return lambda: rows[torch.randint(0, kept, (FIT_ROWS,), generator=chance)], rows[kept:][
        :HELD_OUT_ROWS
    ]
