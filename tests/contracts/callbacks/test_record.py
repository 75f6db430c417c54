"""The record of a foreign run: valid, accepted by the ledger, able to discharge a gate,
and honest about what went wrong.
"""

import json

import pytest
import torch

from stackproof.contracts.callbacks.plain import gated
from stackproof.evidence.ledgering import accept, verify
from stackproof.spec.coverage import gate_state
from stackproof.spec.errors import ConfigError, IntegrityError
from stackproof.spec.gates import load_spec
from stackproof.spec.records import Code, Kill, read_record
from tests.contracts.callbacks.stock import GateCallback, collate, llama, script
from tests.contracts.callbacks.test_plain import F, Tiny, batches

EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}


def recorded(folder, **plan):
    """(record, callback, error) of a stock script that leaves a record."""
    callback = plan.pop("callback", None) or GateCallback(record=folder / "record")
    _, error = script(folder / "trainer", callback=callback, **plan)
    return read_record(folder / "record" / "metadata.json"), callback, error


def test_a_clean_run_leaves_a_record_that_the_ledger_accepts(tmp_path):
    record, callback, error = recorded(tmp_path, gradient_accumulation_steps=2, **EVALUATES)
    assert error is None and (record.kind, record.status, record.exit_code) == (
        "foreign",
        "completed",
        0,
    )
    assert {g.id: g.verdict for g in record.gates} == {
        g: v.outcome for g, v in callback.verdicts().items()
    }
    spec = load_spec()
    assert all(g.fingerprint == spec.fingerprint(g.id) for g in record.gates)
    trainer, model = record.config["trainer"], record.config["model"]
    assert (trainer["name"], trainer["package"]) == ("Trainer", "transformers") and trainer[
        "version"
    ][0].isdigit()
    assert model["class"] == "LlamaForCausalLM" and model["parameters"] == model["trainable"] > 1000
    assert (
        record.config["told"]["gradient_accumulation_steps"] == 2
        and "output_dir" not in record.config["told"]
    )
    assert (
        record.environment["transformers"] == trainer["version"]
        and record.environment["torch"] == torch.__version__
    )
    looked = {g.id: g.heartbeat_last_step for g in record.gates if g.verdict == "pass"}
    assert looked["loss.logit-gradient"] == looked["optim.movement"] == 4
    assert (
        record.metrics["gate_s_per_step"].value > 0
        and record.metrics["gate_s_before_step_1"].value > 0
    )
    accept(tmp_path / "record", tmp_path / "evidence")
    assert verify(tmp_path / "evidence") == []


def test_what_was_not_asked_is_not_covered_and_says_why(tmp_path):
    record, _, _ = recorded(tmp_path)
    unasked = [g for g in record.gates if g.verdict == "not_run"]
    assert {g.id for g in unasked} >= {
        "checkpoint.state-restored",
        "checkpoint.reloads",
        "tokenizer.identity",
    }
    assert all(g.message and f"{g.id}: {g.message}" in record.not_covered for g in unasked)


def test_a_gate_that_is_proven_is_discharged_by_a_foreign_run_of_clean_code(tmp_path):
    spec, gate_id = load_spec(), "loss.logit-gradient"
    record, _, _ = recorded(tmp_path)
    kills = tuple(_kill(spec, gate_id, plant) for plant in spec.gates[gate_id].plants)
    clean = record.model_copy(update={"code": Code(commit="0" * 40, dirty=False)})
    proof = clean.model_copy(update={"kind": "falsification", "kills": kills, "gates": ()})
    both = {"proof": proof, record.id: clean}
    assert gate_state(spec, gate_id, both).state == "discharged"
    for changed in (
        {"status": "halted"},
        {"compute": "synthetic"},
        {"code": Code(commit="unknown", dirty=False)},
    ):
        weaker = both | {record.id: clean.model_copy(update=changed)}
        assert gate_state(spec, gate_id, weaker).state == "proven", changed


def _kill(spec, gate_id, plant):
    sha256 = "0" * 64
    told = {
        "gate": gate_id,
        "plant": plant,
        "plant_sha256": sha256,
        "fingerprint": spec.fingerprint(gate_id),
    }
    return Kill(**told, outcome="killed", control="pass", latency="step 1", seconds=0.1)


def test_a_red_gate_leaves_a_record_of_a_halted_run(tmp_path):
    def labelled(batch):
        made = collate(batch)
        return made | {"labels": made["input_ids"].clone()}

    record, _, error = recorded(tmp_path, collator=labelled)
    assert error.gate_id == "data.learnable-batch" and (record.status, record.exit_code) == (
        "halted",
        4,
    )
    red = [g for g in record.gates if g.verdict == "fail"]
    assert [(g.id, g.first_failure_step) for g in red] == [("data.learnable-batch", 2)]
    assert record.metrics["steps"].value == 1 and "data.learnable-batch" in record.end_reason


def test_a_red_gate_that_was_only_logged_is_no_finished_run(tmp_path):
    callback = GateCallback(mode="log", record=tmp_path / "record")
    record, _, error = recorded(tmp_path, callback=callback, learning_rate=0.0)
    assert error is None and (record.status, record.exit_code) == ("failed", 4)
    assert "schedule.rate" in record.end_reason


def test_a_run_with_a_gate_left_out_is_not_accepted(tmp_path):
    callback = GateCallback(record=tmp_path / "record", skip=("optim.movement",))
    record, _, _ = recorded(tmp_path, callback=callback)
    assert record.config["gates"]["left_out"] == ["optim.movement"]
    with pytest.raises(IntegrityError, match=r"lacks gate optim\.movement"):
        accept(tmp_path / "record", tmp_path / "evidence")


def plain_run(folder, error=None, *, steps=3, scored=False):
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gated(model, optimizer, record=folder):
        for rows in batches(steps):
            F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        if scored:
            model.eval()
            with torch.no_grad():
                model(batches()[0][:, :-1])
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (None, "completed", 0),
        (KeyboardInterrupt(), "interrupted", 130),
        (ZeroDivisionError("a"), "failed", 1),
    ],
    ids=["clean", "interrupted", "broken"],
)
def test_a_loop_of_ones_own_leaves_a_record_however_it_ends(tmp_path, error, status, code):
    if error is None:
        plain_run(tmp_path)
    else:
        with pytest.raises(type(error)):
            plain_run(tmp_path, error)
    record = read_record(tmp_path / "metadata.json")
    assert (record.status, record.exit_code) == (status, code)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3] and record.metrics[
        "train_loss_nats"
    ].value == steps[-1]["loss_nats"]


def test_what_was_not_measured_is_left_out_of_a_record(tmp_path):
    """Two evaluations are compared only in a run that evaluates; the direction of an update is
    measured only at the first.
    """
    measured = {}
    for name, plan in (("first", {"steps": 1, "scored": True}), ("third", {"steps": 3})):
        plain_run(tmp_path / name, **plan)
        record = read_record(tmp_path / name / "metadata.json")
        measured[name] = {g.id: g.measured for g in record.gates}
        assert all(None not in fields.values() for fields in measured[name].values())
    assert measured["first"]["runtime.mode"]["repeat_abs"] == 0.0
    assert "repeat_abs" not in measured["third"]["runtime.mode"]
    assert measured["first"]["optim.movement"]["uphill_cosine"] < 0
    assert "uphill_cosine" not in measured["third"]["optim.movement"]
    assert measured["third"]["schedule.rate"] == {}, "no scheduler was given"


def test_a_folder_that_holds_a_record_is_not_written_to(tmp_path):
    plain_run(tmp_path)
    kept = (tmp_path / "metadata.json").read_bytes()
    with pytest.raises(ConfigError, match="holds the record"):
        plain_run(tmp_path)
    assert (tmp_path / "metadata.json").read_bytes() == kept


def test_a_resumed_run_counts_on_from_where_it_began(tmp_path):
    plan = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    assert script(tmp_path / "trainer", llama(), **plan)[1] is None
    record, _, error = recorded(tmp_path, resume=str(tmp_path / "trainer" / "checkpoint-2"), **plan)
    assert error is None and record.config["first_step"] == 2 and record.metrics["steps"].value == 5
    assert "for 3 step(s)" in record.claim
    assert next(g for g in record.gates if g.id == "checkpoint.state-restored").verdict == "pass"
