"""`stack trace --lens`, `--ablate` and `--patch`: what a model says after each layer,
and what hangs on a value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackproof.cli.output import emit, stderr, stdout, table
from stackproof.spec.canonical import canonical_json
from stackproof.spec.errors import DataError, UsageError

LENS_FILE = "lens.safetensors"
CLAIMS = {
    "lens": (
        "Read through the model's own final norm and head, the stream says this after each layer."
    ),
    "effects": (
        "With this value taken away or exchanged, and nothing else, the model's loss and next "
        "token are these."
    ),
}
NOT_COVERED = (
    "other texts",
    "what other parts of the model would make of such a value after training with it",
)
FIT_ROWS, HELD_OUT_ROWS = 8, 16


@dataclass(frozen=True)
class Case:
    """A model, its map of names, what it reads, and how its tokens are written.
    `input_ids` (1, T) int64.
    """

    model: Any
    where: Any
    input_ids: Any
    write: Callable[[list[int]], str]
    builder: Any
    run_dir: Path | None
    json: bool
    facts: dict[str, Any]

    @property
    def directory(self) -> Path:
        """The folder of the record, which is there."""
        directory = self.run_dir or Path("runs") / self.builder.id
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def word(self, token: int) -> str:
        return self.write([token])


def show_lens(
    case: Case, *, kind: str, fitted: Path | None, rows: Callable[[], tuple[Any, Any]], steps: int
) -> None:
    """The logit lens, or the tuned lens: read from the file `fitted`,
    else fitted now and written beside the record.

    `rows` gives a function that draws a batch of ids to fit it to,
    and held-out ids on which both lenses are compared.
    """
    from stackproof.trace.lens import read_lens

    if kind not in ("logit", "tuned"):
        raise UsageError("--lens", value=kind, allowed="logit or tuned")
    lens, comparison = (None, []) if kind == "logit" else _tuned(case, fitted, rows, steps)
    found, _ = read_lens(case.model, case.input_ids, lens=lens, where=case.where)
    points = [_lens_row(case, row) for row in found]
    document = {
        "lens": kind,
        "tokens": [case.word(i) for i in case.input_ids[0].tolist()],
        "points": points,
        "held_out": comparison,
    }
    _finish(case, document, "lens.jsonl", f"{kind} lens of {len(points)} points", _print_lens)


def _tuned(
    case: Case, fitted: Path | None, rows: Callable, steps: int
) -> tuple[Any, list[dict[str, Any]]]:
    """The lens, and what it and the raw one say on held-out text, if it was fitted now."""
    from stackproof.spec.building import artefact
    from stackproof.trace.lens import load_lens, read_lens, save_lens, train_lens

    if fitted is not None:
        case.builder.inputs.append(artefact(fitted, root=Path.cwd(), name="lens"))
        return load_lens(fitted, case.model), []
    draw, held_out = rows()
    tell = lambda step, kl: stderr.print(  # noqa: E731
        f"  lens, step {step}/{steps}: {kl:.4f} nats from the model", markup=False
    )
    told = lambda step, kl: (  # noqa: E731
        tell(step, kl) if step % max(1, steps // 10) == 0 or step == steps else None
    )
    lens = train_lens(
        case.model, (draw() for _ in range(steps)), steps=steps, where=case.where, tell=told
    )
    save_lens(lens, case.directory / LENS_FILE, case.model)
    case.builder.outputs.append(artefact(case.directory / LENS_FILE, root=case.directory))
    raw, tuned = (
        read_lens(case.model, held_out, lens=which, where=case.where)[0] for which in (None, lens)
    )
    figures = lambda row, which: {  # noqa: E731
        f"{which}_loss_nats": row.loss_nats,
        f"{which}_kl_nats": row.kl_nats,
    }
    compared = [
        {"point": r.point, **figures(r, "raw"), **figures(t, "tuned")} for r, t in zip(raw, tuned)
    ]
    for row in compared:
        for name in ("raw_loss_nats", "tuned_loss_nats"):
            case.builder.metric(
                f"{row['point']}.{name}",
                row[name],
                "nats per token",
                n=held_out[:, 1:].numel(),
                better="lower",
            )
    return lens, compared


def _lens_row(case: Case, row: Any) -> dict[str, Any]:
    """One point of the stream as JSON has it; `top` holds, for each position, its likeliest tokens
    with their probabilities.
    """
    ids, probs = row.top_ids_BTk[0].tolist(), row.top_probs_BTk[0].tolist()
    top = [
        [{"id": i, "token": case.word(i), "prob": p} for i, p in zip(*at)] for at in zip(ids, probs)
    ]
    figures = {
        k: getattr(row, k)
        for k in ("point", "layer", "loss_nats", "kl_nats", "entropy_nats", "agrees_frac")
    }
    return figures | {"top": top}


def _print_lens(document: dict[str, Any]) -> None:
    last = min(8, len(document["tokens"]))
    columns = [
        "point",
        "loss",
        "KL",
        "agrees",
        *(f"after {t!r}" for t in document["tokens"][-last:]),
    ]
    rows = [
        [p["point"], _number(p["loss_nats"]), _number(p["kl_nats"]), f"{p['agrees_frac']:.0%}"]
        + [f"{at[0]['token']!r} {at[0]['prob']:.2f}" for at in p["top"][-last:]]
        for p in document["points"]
    ]
    stdout.print(
        table(f"{document['lens']} lens, nats per token; the last row is the model", columns, rows)
    )
    if document["held_out"]:
        rows = [
            [r["point"], *(_number(r[k]) for k in r if k != "point")] for r in document["held_out"]
        ]
        stdout.print(
            table("Held-out text", ["point", "raw loss", "raw KL", "tuned loss", "tuned KL"], rows)
        )


# ---- ablation and patching


def show_ablation(
    case: Case, texts: list[str], *, by: str, source_ids: Any, sample: int, generate: Callable
) -> None:
    """The effect of taking away each target by itself; with `sample`,
    also what the model then writes.
    """
    from stackproof.trace.patching import ablate, targets

    if by not in ("zero", "mean"):
        raise UsageError("--ablate-with", value=by, allowed="zero or mean")
    chosen = targets(case.model, texts, case.input_ids.shape[1], case.where)
    found = ablate(
        case.model, case.input_ids, chosen, by=by, source_ids_BT=source_ids, where=case.where
    )
    over = case.input_ids if source_ids is None else source_ids
    baseline = (
        "zeros"
        if by == "zero"
        else (
            f"the mean over {over.numel()} tokens of "
            f"{'the prompt' if source_ids is None else 'the --from text'}"
        )
    )
    document = {"baseline": baseline, "effects": [_effect(case, e) for e in found]}
    if sample:
        document["samples"] = _samples(case, chosen, by, over, sample, generate)
    _finish_effects(case, document, f"{len(found)} target(s) replaced by {baseline}")


def show_patch(case: Case, texts: list[str], *, source_ids: Any) -> None:
    """The effect of putting each target of another text's run into this one, by itself."""
    from stackproof.trace.patching import patch, targets

    if source_ids is None:
        raise UsageError(
            "--patch needs the text whose values are put in",
            next_step='--patch "layers.3.resid_out@-1" --from "other text"',
        )
    chosen = targets(case.model, texts, case.input_ids.shape[1], case.where)
    found = patch(case.model, case.input_ids, source_ids, chosen, where=case.where)
    document = {
        "baseline": "the values of the --from text",
        "effects": [_effect(case, e) for e in found],
    }
    _finish_effects(case, document, f"{len(found)} target(s) patched")


def _effect(case: Case, effect: Any) -> dict[str, Any]:
    top = lambda at: {"id": at[0], "token": case.word(at[0]), "prob": at[1]}  # noqa: E731
    figures = {
        k: getattr(effect, k) for k in ("loss_nats", "delta_nats", "kl_nats", "restored_frac")
    }
    named = {"target": effect.target.text, "points": list(effect.target.points)}
    return (
        named | figures | {"top_before": top(effect.top_before), "top_after": top(effect.top_after)}
    )


def _samples(
    case: Case, chosen: list[Any], by: str, over: Any, n_tokens: int, generate: Callable
) -> list[dict[str, Any]]:
    """What the model writes whole, and without each target, which is then
    missing at every position.
    """
    from contextlib import nullcontext

    from stackproof.trace.patching import averaged, edited, held_at, means_of, zeroed

    means = means_of(held_at(case.model, over, chosen, case.where)[0]) if by == "mean" else {}
    contexts = {"": nullcontext()}
    for target in chosen:
        edit = averaged(target, None, means) if by == "mean" else zeroed(target, None)
        contexts[target.text] = edited(case.model, target, edit, case.where)
    written = []
    for text, context in contexts.items():
        with context:
            written.append(
                {
                    "without": text,
                    "text": generate(case.model, case.input_ids[0].tolist(), n_tokens),
                }
            )
    return written


def _finish_effects(case: Case, document: dict[str, Any], reason: str) -> None:
    effects = document["effects"]
    for key in ("delta_nats", "restored_frac"):
        known = [e[key] for e in effects if e[key] is not None]
        document[f"sum_{key}"] = sum(known) if known else None
        if known:
            case.builder.metric(
                f"sum_{key}",
                sum(known),
                "nats per token" if key == "delta_nats" else "1",
                n=len(known),
            )
    _finish(case, document, "effects.jsonl", reason, _print_effects)


def _print_effects(document: dict[str, Any]) -> None:
    shown = {
        "loss_nats": "loss",
        "delta_nats": "Δ loss",
        "kl_nats": "KL",
        "restored_frac": "restored",
    }
    shown = {
        k: head for k, head in shown.items() if any(e[k] is not None for e in document["effects"])
    }
    word = lambda t: f"{t['token']!r} {t['prob']:.2f}"  # noqa: E731
    rows = [
        [e["target"], *(_number(e[k]) for k in shown), word(e["top_before"]), word(e["top_after"])]
        for e in document["effects"]
    ]
    columns = ["target", *shown.values(), "next token before", "after"]
    stdout.print(table(f"Replaced by {document['baseline']}; nats per token", columns, rows))
    if any(e["delta_nats"] == 0 and e["kl_nats"] for e in document["effects"]):
        stdout.print(
            "the last token has no next one: what changes there alone is in KL, and in no loss",
            style="dim",
        )
    for written in document.get("samples", []):
        stdout.print(
            f"without {written['without']}:" if written["without"] else "whole:",
            style="bold",
            markup=False,
        )
        stdout.print(written["text"], markup=False)


def _finish(
    case: Case,
    document: dict[str, Any],
    name: str,
    reason: str,
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Write the document and its record, and print the one or show the other."""
    from stackproof.spec.building import write_atomically

    document |= case.facts | {"input_ids": case.input_ids[0].tolist()}
    write_atomically(case.directory / name, canonical_json(document) + b"\n")
    record = case.builder.finish(
        case.directory, status="completed", end_reason=reason, exit_code=0, series=(name,)
    )
    if not emit(document | {"record": record.id, "run_dir": str(case.directory)}, case.json):
        show(document)
        stdout.print(f"record {case.directory}/metadata.json  ({record.id})", markup=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


# ---- text to fit a lens to


def run_rows(config: dict[str, Any], root: Path, seed: int = 0) -> tuple[Callable[[], Any], Any]:
    """Rows of a run's own corpus: a function that draws a batch of its training split,
    and held-out ids.
    """
    import torch

    from stackproof.config import validate
    from stackproof.data.prepare import prepare
    from stackproof.data.reader import rows_batch
    from stackproof.data.tokenizer import load_tokenizer

    cfg = validate(config)
    dataset, length = prepare(cfg.data), cfg.model.max_seq_len
    if dataset.tokenizer.sha256 != load_tokenizer(root / "tokenizer.json").sha256:
        raise DataError(
            "the run's corpus has changed since, so its tokens are others",
            next_step="give --text FILE",
        )
    chance, n = torch.Generator().manual_seed(seed), dataset.train.n_windows(length)
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


def text_rows(ids: list[int], length: int, seed: int = 0) -> tuple[Callable[[], Any], Any]:
    """Rows of a text of one's own; its last tenth is held out.
    Raises DataError for a text of fewer than 20 rows.
    """
    import torch

    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if len(rows) < 20:
        raise DataError(
            "the text is too short to fit a lens to",
            value=f"{len(rows)} rows of {length} tokens",
            allowed="at least 20",
        )
    kept, chance = len(rows) - max(2, len(rows) // 10), torch.Generator().manual_seed(seed)
    return lambda: rows[torch.randint(0, kept, (FIT_ROWS,), generator=chance)], rows[kept:][
        :HELD_OUT_ROWS
    ]
