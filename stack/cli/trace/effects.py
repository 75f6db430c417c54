"""`stack trace ablate` and `stack trace patch`: replace an activation, and measure its effect on
loss and next token.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, Literal

from typer import Argument, Option

from stackproof.cli.load_model import TraceModel, load_model
from stackproof.cli.output import print_line, print_table
from stackproof.cli.paths import refuse_unused
from stackproof.cli.recording import Claim
from stackproof.cli.trace.common import Model, Request, checked, encode, precise, takes
from stackproof.spec.errors import UsageError

CLAIM = Claim(
    "trace",
    "With only this value ablated or replaced, the model's loss and next token are these.",
    ("other texts", "a model trained with such a value"),
)
ABLATE_EXAMPLES = (
    "stack trace ablate runs/pocket-1 'layers.*.attention_out' --prompt 'The function'",
    (
        "stack trace ablate runs/pocket-1 layers.1 --ablate-with mean --from 'Another text' "
        "--sample 64"
    ),
)
PATCH_EXAMPLES = (
    "stack trace patch runs/pocket-1 'layers.*.resid_out@-1' --prompt 'The cat' --from 'The dog'",
)
HEADS = {
    "loss_nats": "loss",
    "delta_nats": "Δ loss",
    "kl_nats": "KL",
    "restored_frac": "restored",
}
Targets = Annotated[
    list[str],
    Argument(
        metavar="TARGET...",
        help=(
            "POINT[@POSITION]: layers.3.attention_out, layers.*.ffn.out, layers.3 for a whole "
            "block; @-1 the last token, @2:5 three tokens, @* each by itself."
        ),
    ),
]


@takes("prompt", "input_ids")
def ablate(
    request: Request,
    model: Model,
    targets: Targets,
    ablate_with: Annotated[
        Literal["zero", "mean"], Option(help="Replace by zeros, or by the mean over the text.")
    ] = "zero",
    source: Annotated[
        str | None,
        Option(
            "--from", help="With --ablate-with mean: the text of the mean. Default: the prompt."
        ),
    ] = None,
    sample: Annotated[
        int, Option(min=0, help="Also generate this many tokens, with and without each target.")
    ] = 0,
) -> None:
    """Replace each target by zeros or its mean, and measure the effect on loss and next token."""
    from stackproof.trace import ablate as ablated

    if ablate_with == "zero":
        refuse_unused("--ablate-with zero", {"--from": source})

    def measure(
        loaded: TraceModel, one: Any, ids: Any, chosen: list[Any], source_ids: Any
    ) -> tuple[str, list[Any], dict[str, Any]]:
        over = ids if source_ids is None else source_ids
        found = ablated(one.model, ids, chosen, by=ablate_with, source_ids_BT=over, where=one.where)
        text = "the prompt" if source_ids is None else "the --from text"
        mean = f"the mean over {over.numel()} tokens of {text}"
        more = {}
        if sample:
            more["samples"] = _samples(loaded, one, ids, chosen, ablate_with, over, sample)
        return "zeros" if ablate_with == "zero" else mean, found, more

    options = {
        "ablate": targets,
        "ablate_with": None if ablate_with == "zero" else ablate_with,
        "sample": sample,
        "source": source,
    }
    _replace(request, model, targets, options, measure)


@takes("prompt", "input_ids")
def patch(
    request: Request,
    model: Model,
    targets: Targets,
    source: Annotated[str, Option("--from", help="The text that supplies the values.")],
) -> None:
    """Replace each target by its value in a run of another text,
    and measure the effect on loss and next token.
    """
    from stackproof.trace import patch as patched

    def measure(
        loaded: TraceModel, one: Any, ids: Any, chosen: list[Any], source_ids: Any
    ) -> tuple[str, list[Any], dict[str, Any]]:
        found = patched(one.model, ids, source_ids, chosen, where=one.where)
        return "the values of the --from text", found, {}

    _replace(request, model, targets, {"patch": targets, "source": source}, measure)


def _replace(
    request: Request, model: str, targets: list[str], options: dict[str, Any], measure: Callable
) -> None:
    """Measure the effect of each target, and write the record."""
    import torch

    from stackproof.trace import targets as parsed
    from stackproof.trace import variant

    loaded = load_model(model)
    one, source = variant(loaded.model, loaded.mode), options["source"]
    ids = torch.tensor([request.ids(loaded)])
    source_ids = None if source is None else torch.tensor([checked(encode(source, loaded), loaded)])
    record = request.open(
        CLAIM,
        [loaded],
        **{name: value for name, value in options.items() if value},
    )
    with one.around():
        chosen = parsed(one.model, targets, ids.shape[1], one.where)
        baseline, effects, more = measure(loaded, one, ids, chosen, source_ids)
    document = {"baseline": baseline, "effects": [_effect(loaded, e) for e in effects]} | more
    for key, unit in (("delta_nats", "nats per token"), ("restored_frac", "1")):
        known = [e[key] for e in document["effects"] if e[key] is not None]
        document[f"sum_{key}"] = sum(known) if known else None
        if known:
            record.builder.metric(f"sum_{key}", sum(known), unit, n=len(known))
    document |= {"model": loaded.title, **loaded.facts, "input_ids": ids[0].tolist()}
    record.write_series("effects.jsonl", [document])
    how = "patched" if "patch" in options else f"replaced by {baseline}"
    record.close(f"{len(effects)} target(s) {how}", document, _show)


def _effect(loaded: TraceModel, effect: Any) -> dict[str, Any]:
    top = lambda at: {"id": at[0], "token": loaded.decode([at[0]]), "prob": at[1]}  # noqa: E731
    figures = {k: getattr(effect, k) for k in HEADS}
    named = {"target": effect.target.text, "points": list(effect.target.points)}
    tops = {"top_before": top(effect.top_before), "top_after": top(effect.top_after)}
    return named | figures | tops


def _samples(
    loaded: TraceModel, one: Any, ids: Any, chosen: list[Any], by: str, over: Any, n_tokens: int
) -> list[dict[str, Any]]:
    """Greedy continuations of the whole model, and without each target at every position.

    Raises UsageError for a model of another library.
    """
    from stackproof.evaluate.sampling import generate
    from stackproof.model.transformer import Transformer
    from stackproof.trace.patching import averaged, edited, means_of, values_of, zeroed

    if not isinstance(one.model, Transformer):
        raise UsageError(
            "--sample needs a model of this stack",
            value=type(one.model).__name__,
            next_step="stack import it, or leave --sample out",
        )
    means = means_of(values_of(one.model, over, chosen, one.where)[0]) if by == "mean" else {}
    contexts = {"": nullcontext()}
    for target in chosen:
        edit = averaged(target, None, means) if by == "mean" else zeroed(target, None)
        contexts[target.text] = edited(one.model, target, edit, one.where)
    written = []
    for text, context in contexts.items():
        with context:
            new = generate(
                one.model, ids[0].tolist(), max_new_tokens=n_tokens, temperature=0.0, eos_id=None
            )
        written.append({"without": text, "text": loaded.decode(new)})
    return written


def _show(document: dict[str, Any]) -> None:
    effects = document["effects"]
    shown = {k: head for k, head in HEADS.items() if any(e[k] is not None for e in effects)}
    word = lambda t: f"{t['token']!r} {t['prob']:.2f}"  # noqa: E731
    rows = [
        [e["target"], *(precise(e[k]) for k in shown), word(e["top_before"]), word(e["top_after"])]
        for e in effects
    ]
    columns = ["target", *shown.values(), "next token before", "after"]
    print_table(f"Replaced by {document['baseline']}; nats per token", columns, rows)
    if any(e["delta_nats"] == 0 and e["kl_nats"] for e in effects):
        print_line("a change at the last token alone affects KL and not the loss", style="dim")
    for written in document.get("samples", []):
        print_line(
            f"without {written['without']}:" if written["without"] else "whole:", style="bold"
        )
        print_line(written["text"])
