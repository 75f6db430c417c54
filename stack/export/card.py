"""The model card of an exported folder, generated from the record of the run and of the export."""

from collections.abc import Sequence
from pathlib import Path

from stackproof.config import ModelConfig
from stackproof.contracts.card import CardFacts, card_faults
from stackproof.contracts.conditions import ensure
from stackproof.model.foreign import for_inference
from stackproof.spec.files import write_atomically
from stackproof.spec.records import GateResult, Record
from stackproof.spec.visible import without_markup

SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")


@ensure(
    lambda folder, facts: card_faults(folder, facts) == [],
    "a card states every figure of its model, of the verdicts and of its run",
)
def write_card(
    folder: Path, facts: CardFacts, *, architecture: str, n_params: int, dtype: str
) -> None:
    """README.md of a folder, written for an `architecture` of transformers, with weights of
    `dtype`.
    """
    text = card(facts, architecture, n_params, dtype)
    write_atomically(folder / "README.md", text.encode())


def card(facts: CardFacts, architecture: str, n_params: int, dtype: str) -> str:
    """The card as Markdown; see `write_card`."""
    run = facts.run
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {without_markup(run.config.get('recipe', facts.parent) if run else facts.parent)}",
        (
            f"A language model of {n_params:,} parameters, trained with stackproof and written as "
            f"`{architecture}`."
        ),
        _table(("what", "value"), [("optimizer step", facts.step), *_facts(facts, dtype)]),
        "## Is it the same model?",
        _verdicts(facts.gates),
        *_of_run(run, facts.step),
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), '
        'AutoTokenizer.from_pretrained(".")\n```',
        "A text begins with the end-of-text token. Other libraries encode its literal form inside "
        "a text as that token; in training it was encoded as plain text.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _facts(facts: CardFacts, dtype: str) -> list[tuple[str, object]]:
    sizes = [(k, getattr(facts.model, k)) for k in SIZES]
    rounding = [(k, f"{v:.3g}") for k, v in facts.rounding.items()]
    left = (
        [("used in training only, not in the file", ", ".join(aside))]
        if (aside := training_only(facts.model))
        else []
    )
    return [
        *sizes,
        ("weights", dtype),
        *rounding,
        ("record of the run", f"`{facts.parent}`"),
        ("record of this export", f"`{facts.export}`"),
        *left,
    ]


def training_only(cfg: ModelConfig) -> list[str]:
    """Choices of the configuration that apply in training only, so the exported folder omits
    them.
    """
    plain = for_inference(cfg)
    said = [f"dropout {cfg.dropout:g}"] if cfg.dropout != plain.dropout else []
    return said + (["capacity and balance of experts"] if cfg.ffn != plain.ffn else [])


def _verdicts(gates: Sequence[GateResult]) -> str:
    rows = [
        (
            f"`{g.id}`",
            g.verdict,
            without_markup(g.message or ", ".join(f"{k} {v}" for k, v in g.measured.items())),
        )
        for g in gates
    ]
    unread = any(g.verdict == "not_run" for g in gates)
    said = (
        (
            "**The logits were not compared**: transformers was not installed where this folder "
            "was written.\n\n"
        )
        if unread
        else ""
    )
    return said + _table(("gate", "verdict", "measured"), rows)


def _of_run(run: Record | None, step: int) -> list[str]:
    """Quality from the record of the run, or a note that the record is missing or describes the
    weights of another step.
    """
    if run is None:
        return [
            "## Measured",
            (
                "The record of the run is not beside its checkpoint, so this card has no figures "
                "of quality."
            ),
        ]
    last = run.metrics.get("steps")
    if last is not None and last.value != step:
        return [
            "## Measured",
            (
                f"The record of the run describes its weights after step {last.value}. These are "
                f"those after step {step}, so this card has no figures of quality."
            ),
        ]
    metrics = [
        (
            name,
            f"{m.value:,.4f}" if isinstance(m.value, float) else without_markup(m.value),
            without_markup(m.unit),
            "" if m.n is None else m.n,
        )
        for name, m in sorted(run.metrics.items())
    ]
    data = sorted({without_markup(f"{a.name} ({a.license})") for a in run.inputs if a.license})
    gates = [
        f"{sum(g.verdict == v for g in run.gates)} {v}"
        for v in ("pass", "fail", "not_run")
        if any(g.verdict == v for g in run.gates)
    ]
    return [
        "## Measured",
        f"{without_markup(run.claim)}\n\nStatus `{run.status}`, gates: "
        f"{', '.join(gates) or 'none'}, code `{run.code.commit[:12]}`, spec "
        f"{without_markup(run.spec.version)}, compute {run.compute}.",
        _table(("metric", "value", "unit", "n"), metrics),
        "## Data",
        "\n".join(f"- {d}" for d in data) or "The record has no licence.",
        "## Not covered",
        "\n".join(f"- {without_markup(n)}" for n in run.not_covered),
    ]
