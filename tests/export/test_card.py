"""A model card is read back from its file: each figure, with its value."""

import pytest

from stackproof.contracts.card import CardFacts, card_faults
from stackproof.contracts.conditions import ContractError
from stackproof.contracts.keeper import Gatekeeper
from stackproof.data.tokenizer import Bytes
from stackproof.export import huggingface, parity
from stackproof.export.card import write_card
from stackproof.model.build import n_parameters
from stackproof.museum.edit import Edit, edited
from stackproof.museum.plant import touch
from stackproof.spec.records import SCHEMA, Record
from tests.export import models

PARENT, EXPORT = "train-20260101T000000Z-0a0a0a0a", "export-20260102T000000Z-0b0b0b0b"
STEP = 1200


@pytest.fixture(scope="module")
def run():
    """The record of a run with metrics of each type, a licence and a red gate."""
    verdicts = {"loss.first": "pass", "loss.golden": "pass", "sampling.coherence": "fail"}
    return Record.model_validate(
        {
            "schema": SCHEMA,
            "id": PARENT,
            "kind": "train",
            "status": "early_stopped",
            "end_reason": "no gain",
            "exit_code": 0,
            "claim": "a run of <1,200> steps",
            "not_covered": ("other languages", "long texts"),
            "spec": {"version": "2.10.0", "sha256": "1" * 64},
            "code": {"commit": "2" * 40, "dirty": False},
            "command": ("stack", "train"),
            "config": {"recipe": "pocket"},
            "config_sha256": "3" * 64,
            "environment": {},
            "compute": "real",
            "inputs": [
                {
                    "name": "corpus",
                    "path": "a.txt",
                    "sha256": "0" * 64,
                    "bytes": 9,
                    "license": "CC-BY-4.0",
                }
            ],
            "metrics": {
                "steps": {"value": STEP, "unit": "steps"},
                "val_loss_nats": {"value": 2.345678, "unit": "nats per token", "n": 64},
                "tokens": {"value": 1_234_567, "unit": "tokens"},
                "schedule": {"value": "-Infinity", "unit": "name"},
            },
            "gates": [
                {"id": i, "fingerprint": "4" * 64, "verdict": v, "checks": 1}
                for i, v in verdicts.items()
            ],
            "started_at": "2026-01-01T00:00:00Z",
            "finished_at": "2026-01-01T01:00:00Z",
            "wall_s": 1.0,
            "device_s": 1.0,
        }
    )


@pytest.fixture
def write(spec, tmp_path, monkeypatch, run):
    """Writes a folder with its card, and returns the card and the facts it is judged by."""
    monkeypatch.setattr(parity, "available", lambda: False)
    model = models.ours("plain", 257)

    def write(step=STEP, run=run, **others):
        judged = []

        def card(folder, made):
            judged.append(
                CardFacts(model.cfg, step, PARENT, EXPORT, made.gates, made.rounding, run)
            )
            form = {"n_params": n_parameters(model), "dtype": "bfloat16"} | others
            write_card(folder, *judged, architecture=made.kind.architecture, **form)

        huggingface.export(
            model,
            Bytes(),
            tmp_path / "out",
            Gatekeeper(spec, kind="export"),
            dtype="bfloat16",
            card=card,
        )
        return tmp_path / "out", judged[0]

    return write


def test_a_right_card_has_no_fault(write, run):
    folder, facts = write()
    assert card_faults(folder, facts) == []
    card = (folder / "README.md").read_text()
    assert "| val_loss_nats | 2.3457 | nats per token | 64 |" in card


@pytest.mark.parametrize("others", [{"run": None}, {"step": STEP - 1}])
def test_a_card_without_figures_of_its_run_has_no_fault(write, others):
    folder, facts = write(**others)
    assert card_faults(folder, facts) == []
    assert "val_loss_nats" not in (folder / "README.md").read_text()


WRONG = [
    ("card", "{n_params:,}", "{n_params + 1:,}"),
    ("card", "{architecture}", "{facts.export}"),
    ("card", '("optimizer step", facts.step)', '("optimizer step", facts.step + 1)'),
    ("card", "run.config.get('recipe', facts.parent)", "run.config.get('receipt', facts.parent)"),
    ("_facts", "getattr(facts.model, k)", "getattr(facts.model, k) + 1"),
    ("_facts", "for k in SIZES", "for k in SIZES[1:]"),
    ("_facts", '("weights", dtype)', '("weights", "float32")'),
    ("_facts", "{v:.3g}", "{2 * v:.3g}"),
    ("_facts", "*rounding,", ""),
    ("_facts", 'the run", f"`{facts.parent}`"', 'the run", f"`{facts.export}`"'),
    ("_facts", 'export", f"`{facts.export}`")', 'export", f"`{facts.parent}`")'),
    ("_verdicts", "g.verdict,", '"pass",'),
    ("_verdicts", "for g in gates\n", "for g in gates[1:]\n"),
    ("_verdicts", "g.message or", "'' or"),
    ("_verdicts", "unread = any(", "unread = not any("),
    ("_of_run", "{m.value:,.4f}", "{m.value:,.3f}"),
    ("_of_run", "{m.value:,.4f}", "{1.001 * m.value:,.4f}"),
    ("_of_run", "without_markup(m.value)", "without_markup(m.value)[:3]"),
    ("_of_run", "without_markup(m.unit)", '""'),
    ("_of_run", '"" if m.n is None else m.n', '""'),
    ("_of_run", "in sorted(run.metrics.items())", "in sorted(run.metrics.items())[1:]"),
    ("_of_run", "{sum(g.verdict == v", "{1 + sum(g.verdict == v"),
    ("_of_run", '("pass", "fail", "not_run")', '("pass", "not_run")'),
    ("_of_run", "{run.status}", "completed"),
    ("_of_run", "{run.code.commit[:12]}", "{run.spec.sha256[:12]}"),
    ("_of_run", "{without_markup(run.spec.version)}", "2.9.4"),
    ("_of_run", "{run.compute}", "synthetic"),
    ("_of_run", "{without_markup(run.claim)}", "a run"),
    ("_of_run", "({a.license})", "(MIT)"),
    ("_of_run", "for n in run.not_covered", "for n in run.not_covered[1:]"),
]


@pytest.mark.parametrize(("function", "old", "new"), WRONG)
def test_no_folder_is_written_with_a_wrong_card(write, tmp_path, function, old, new):
    edit = Edit(f"stackproof.export.card:{function}", old, new)
    with edited([edit], touch), pytest.raises(ContractError, match="states every figure"):
        write()
    assert not (tmp_path / "out").exists()


def test_no_folder_is_written_with_figures_of_another_step(write, tmp_path):
    edit = Edit("stackproof.export.card:_of_run", "last.value != step", "last.value < 0")
    with edited([edit], touch), pytest.raises(ContractError):
        write(step=STEP - 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("others", [{"n_params": 7}, {"dtype": "float32"}])
def test_parameters_and_type_are_those_of_the_files(write, others):
    with pytest.raises(ContractError):
        write(**others)


def test_the_record_is_that_of_the_parent(write, run):
    with pytest.raises(ContractError):
        write(run=run.model_copy(update={"id": EXPORT}))


def test_a_figure_that_is_stated_besides_is_a_fault(write):
    folder, facts = write()
    path = folder / "README.md"
    card, row = path.read_text(), "| tokens | 1234567 | tokens |  |"
    assert row in card
    path.write_text(card.replace(row, f"{row}\n| accuracy | 0.9900 | 1 | 9 |"))
    assert card_faults(folder, facts) == ["it states the metric accuracy | 0.9900 | 1 | 9"]
