"""The model card of an exported folder, generated from the record of the run and of the export."""

from collections.abc import Sequence
from pathlib import Path

from stackproof.config import ModelConfig
from stackproof.contracts.card import CardFacts, card_faults
from stackproof.contracts.conditions import ensure
from stackproof.export.huggingface import Exported
from stackproof.model.foreign import for_inference
from stackproof.spec.files import write_atomically
from stackproof.spec.records import Record
from stackproof.spec.visible import without_markup

SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")


@ensure(
    lambda folder, made, cfg, step, run, parent, export: (
        card_faults(folder, CardFacts(cfg, step, parent, export, made.gates, made.rounding, run))
        == []
    ),
    "a card states every figure of its model, of the verdicts and of its run",
)
def write_card(
    folder: Path,
    made: Exported,
    cfg: ModelConfig,
    *,
    n_params: int,
    dtype: str,
    step: int,
    run: Record | None,
    parent: str,
    export: str,
) -> None:
    """README.md of a folder, of the weights after an optimizer step. `run` is the record of the run
    that trained them, `parent` its id, `export` the id of the record of the export.
    """
    facts = {"n_params": n_params, "dtype": dtype, "step": step}
    text = card(made, cfg, **facts, run=run, parent=parent, export=export)
    write_atomically(folder / "README.md", text.encode())


def card(
    made: Exported,
    cfg: ModelConfig,
    *,
    n_params: int,
    dtype: str,
    step: int,
    run: Record | None,
    parent: str,
    export: str,
) -> str:
    """The card as Markdown; see `write_card`."""
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {without_markup(run.config.get('recipe', parent) if run else parent)}",
        (
            f"A language model of {n_params:,} parameters, trained with stackproof and written as "
            f"`{made.kind.architecture}`."
        ),
        _table(
            ("what", "value"), [("optimizer step", step), *_facts(made, cfg, dtype, parent, export)]
        ),
        "## Is it the same model?",
        _verdicts(made),
        *_of_run(run, step),
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


def _facts(
    made: Exported, cfg: ModelConfig, dtype: str, parent: str, export: str
) -> list[tuple[str, object]]:
    sizes = [(k, getattr(cfg, k)) for k in SIZES]
    rounding = [(k, f"{v:.3g}") for k, v in made.rounding.items()]
    left = (
        [("used in training only, not in the file", ", ".join(aside))]
        if (aside := training_only(cfg))
        else []
    )
    return [
        *sizes,
        ("weights", dtype),
        *rounding,
        ("record of the run", f"`{parent}`"),
        ("record of this export", f"`{export}`"),
        *left,
    ]


def training_only(cfg: ModelConfig) -> list[str]:
    """Choices of the configuration that apply in training only, so the exported folder omits
    them.
    """
    plain = for_inference(cfg)
    said = [f"dropout {cfg.dropout:g}"] if cfg.dropout != plain.dropout else []
    return said + (["capacity and balance of experts"] if cfg.ffn != plain.ffn else [])


def _verdicts(made: Exported) -> str:
    rows = [
        (
            f"`{g.id}`",
            g.verdict,
            without_markup(g.message or ", ".join(f"{k} {v}" for k, v in g.measured.items())),
        )
        for g in made.gates
    ]
    unread = any(g.verdict == "not_run" for g in made.gates)
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
