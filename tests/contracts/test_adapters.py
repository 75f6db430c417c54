"""Each adapter, in its smallest real run: it emits the events that the gates of its kind watch, and
offers what they need. A gate that is not judged is pinned with its reason, so that a capability
that an adapter stops offering is found.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from typer.main import get_command

from stackproof.cli import app
from stackproof.config import NeverStop
from stackproof.contracts.adapters import ADAPTERS, Adapter
from stackproof.contracts.callbacks.session import judge_model
from stackproof.contracts.gate import Verdict, resolve
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.subject import (
    Architecture,
    Manifest,
    Schedule,
    StopDeclaration,
    UpdateLaw,
)
from stackproof.data import account
from stackproof.data.prepare import prepare
from stackproof.data.tokenizer import Bytes
from stackproof.export import huggingface
from stackproof.museum import script
from stackproof.museum.collection import museum_config
from stackproof.spec.gates import load_spec
from stackproof.spec.records import GateResult, read_record
from stackproof.subject.declared import RunDeclared
from stackproof.subject.training import RunTraining
from stackproof.train import callbacks as train_callbacks
from stackproof.train import start
from stackproof.train.loop import train
from tests.cli.conftest import Stack
from tests.export import models

BY_NAME = {a.name: a for a in ADAPTERS}
Verdicts = Mapping[str, Verdict]


def museum(folder, **changes):
    """The museum's small run with traces: each kind of event comes."""
    cfg = museum_config(folder)
    steps = cfg.train.model_copy(update={"max_steps": 10})
    trace = cfg.trace.model_copy(update={"every": 4})
    changes = {"train": steps, "stop": NeverStop(), "trace": trace} | changes
    return cfg.model_copy(update=changes)


def of(results: Iterable[GateResult]) -> Verdicts:
    return {r.id: Verdict(r.verdict, r.message, r.measured) for r in results}


def stack_fresh(tmp_path, texts, only=None) -> Verdicts:
    return of(train(start.fresh(museum(texts), (), tmp_path / "run", only=only)).gates)


def stack_resumed(tmp_path, texts, only=None) -> Verdicts:
    stack_fresh(tmp_path, texts, only=())
    longer = museum(texts).train.model_copy(update={"max_steps": 18})
    child = start.fresh(
        museum(texts, train=longer), (), tmp_path / "child", parent=tmp_path / "run", only=only
    )
    return of(train(child).gates)


def plain(tmp_path, texts, only=None) -> Verdicts:
    gate, _ = script.run(only)
    return gate.verdicts()


def hugging_face(tmp_path, texts, only=None) -> Verdicts:
    """Once with evaluations and saves, then resumed."""
    pytest.importorskip("transformers", reason="pip install 'stackproof[hf]'")
    from tests.contracts.callbacks import stock, test_trl

    plan = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    plan |= {"more": {"processing_class": test_trl.tokenizer()}}
    stock.script(tmp_path, callback=stock.GateCallback("log", only=only), **plan)
    resumed = stock.GateCallback("log", only=only)
    stock.script(tmp_path, callback=resumed, resume=str(tmp_path / "checkpoint-2"), **plan)
    return resumed.verdicts()


def trl(tmp_path, texts, only=None) -> Verdicts:
    pytest.importorskip("trl", reason="pip install trl")
    from tests.contracts.callbacks import stock, test_trl

    callback = stock.GateCallback("log", only=only)
    plan = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    test_trl.fine_tune(tmp_path, stock.llama(), callback=callback, evaluated=True, **plan)
    resumed = stock.GateCallback("log", only=only)
    plan |= {"resume": str(tmp_path / "checkpoint-2")}
    test_trl.fine_tune(tmp_path, stock.llama(), callback=resumed, evaluated=True, **plan)
    return resumed.verdicts()


def lightning(tmp_path, texts, only=None) -> Verdicts:
    pytest.importorskip("lightning", reason="pip install lightning")
    from tests.contracts.callbacks import test_lightning, test_trl

    told = {"tokenizer": test_trl.tokenizer(test_lightning.VOCAB), "only": only}
    callback = test_lightning.GateCallback("log", **told)
    *_, trainer = test_lightning.fit(tmp_path, callback=callback, val_check_interval=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = test_lightning.GateCallback("log", **told)
    test_lightning.fit(
        tmp_path,
        callback=resumed,
        resume=tmp_path / "last.ckpt",
        val_check_interval=2,
        max_epochs=3,
    )
    return resumed.verdicts()


def pytest_plugin(tmp_path, texts, only=None) -> Verdicts:
    """What the plugin calls for a model and an optimizer."""
    model = script.Small()
    return judge_model(model, optimizer=script.make_optimizer(model))


def data_build(tmp_path, texts) -> Verdicts:
    return of(account.judge(prepare(museum(texts).data))[0])


def exported(tmp_path, texts) -> Verdicts:
    pytest.importorskip("transformers", reason="pip install 'stackproof[hf]'")
    keeper, model = Gatekeeper(load_spec(), kind="export"), models.ours("plain", 257)
    out = tmp_path / "exported"
    huggingface.export(model, Bytes(), out, keeper, card=lambda folder, made: None)
    return of(keeper.results())


def imported(tmp_path, texts) -> Verdicts:
    exported(tmp_path, texts)
    stack = Stack(tmp_path, tmp_path / "cache")
    assert stack("import", "exported", "--out", "imported").code == 0
    return of(read_record(tmp_path / "imported" / "metadata.json").gates)


def commanded(command, *options) -> Callable[..., Verdicts]:
    """A command on an imported model."""

    def run(tmp_path, texts) -> Verdicts:
        imported(tmp_path, texts)
        (tmp_path / "text.txt").write_text("a text that nobody has learned")
        asked = (command, "imported", *options, "--run-dir", "read")
        done = Stack(tmp_path, tmp_path / "cache")(*asked)
        assert done.code == 0, done.err
        return of(read_record(tmp_path / "read" / "metadata.json").gates)

    return run


def sampled(tmp_path, texts) -> Verdicts:
    """In this process, as the command writes no record."""
    imported(tmp_path, texts)
    found, unjudged = {}, Gatekeeper.unjudged

    def kept(self, *kind):
        found.update(of(self.results()))
        return unjudged(self, *kind)

    asked = ["sample", str(tmp_path / "imported"), "--max-new-tokens", "8"]
    with mock.patch.object(Gatekeeper, "unjudged", kept):
        get_command(app).main(asked, prog_name="stack", standalone_mode=False)
    return found


@dataclass(frozen=True)
class Case:
    """One adapter: how it is run; the gates that are not judged there, with their reasons; and of
    gates with several parts those that are.
    """

    adapter: Adapter
    run: Callable[..., Verdicts]
    not_run: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def gates(self, texts) -> set[str]:
        """Every gate that has a verdict. That of a data set has a list of its own."""
        if self.adapter.kind == "data":
            return set(account.GATES)
        config = museum(texts).to_dict() if self.adapter.kind == "train" else self.config
        return {g.id for g in self.adapter.gates(load_spec()) if g.applies_to(config)}


NO_TOKENIZER = (
    "the trainer does not offer Corpus.splits; the trainer does not offer Tokenizer.n_ids: no "
    "tokenizer with a length was given"
)
FEW_ROWS = "fewer than 26 rows that are long enough were drawn, too few for an order"
OWNED = {"optim.parameter-groups": "ownership, graph"}
FEW_IDS = "{} ids of training are too few to judge"
NEAR_PEAK = {"optim.lost-updates": "the check was not called"}  # the rate is below half its peak
NONE_STATED = {
    "optim.declared-settings": (
        "the trainer does not offer Declared.optimizer_settings: the trainer states none"
    )
}
PADDED = OWNED | {"model.isolation": "padding"}
OURS = {
    "model.isolation": "documents",
    "optim.parameter-groups": "ownership, laws, movement",
    "tokenizer.identity": "shards and model",
}
CASES = {
    "stack train": Case(
        BY_NAME["train"],
        stack_fresh,
        {"runtime.learned": "10 steps are too few to have learned"},
        OURS,
    ),
    "stack train, continued": Case(
        BY_NAME["resume"],
        stack_resumed,
        {"runtime.learned": "its beginning was not seen"},
        OURS,
    ),
    "stack data build": Case(BY_NAME["data"], data_build, parts={"tokenizer.identity": "shards"}),
    "stack export": Case(
        BY_NAME["export"],
        exported,
        {"checkpoint.opened": "the trainer does not offer OpenedCheckpoint.model"},
    ),
    "stack import": Case(BY_NAME["import"], imported),
    "stack evaluate": Case(
        BY_NAME["evaluate"],
        commanded("evaluate", "--text", "text.txt"),
        config={"evaluate": {"of": "text"}},
    ),
    "stack evaluate --suite": Case(
        BY_NAME["evaluate"],
        commanded("evaluate", "--suite", "domains"),
        config={"evaluate": {"of": "suite"}},
    ),
    "stack sample": Case(BY_NAME["sample"], sampled),
    "stack trace": Case(
        BY_NAME["trace"],
        commanded("trace", "--prompt", "a text"),
        config={"trace": {"command": "stats"}},
    ),
    "stack trace compare": Case(
        BY_NAME["compare"],
        commanded("trace", "--against", "self@float64", "--prompt", "a text"),
    ),
    "plain": Case(BY_NAME["plain"], plain, {}, PADDED | {"tokenizer.identity": "model"}),
    "Hugging Face": Case(
        BY_NAME["huggingface"],
        hugging_face,
        {"data.fresh-rows": FEW_ROWS, "tokenizer.own-ids": FEW_IDS.format(28)},
        PADDED | {"tokenizer.identity": "model"},
    ),
    "TRL": Case(
        BY_NAME["huggingface"],
        trl,
        {"data.fresh-rows": FEW_ROWS, "tokenizer.own-ids": FEW_IDS.format(11)}
        | NEAR_PEAK
        | NONE_STATED,
        PADDED | {"tokenizer.identity": "model"},
    ),
    "Lightning": Case(
        BY_NAME["lightning"],
        lightning,
        {
            "checkpoint.reloads": "the check was not called",
            "data.fresh-rows": FEW_ROWS,
            "model.isolation": "the model takes no attention mask and no packed documents",
            "model.tied-head": (
                "the trainer does not offer Declared.tied_head: the model has no "
                "config.tie_word_embeddings"
            ),
            "tokenizer.own-ids": FEW_IDS.format(172),
        }
        | NEAR_PEAK
        | NONE_STATED,
        OWNED | {"tokenizer.identity": "model"},
    ),
    "pytest": Case(
        BY_NAME["pytest"],
        pytest_plugin,
        {"tokenizer.identity": NO_TOKENIZER} | NONE_STATED,
        PADDED,
    ),
}


@pytest.fixture
def emitted(monkeypatch) -> set[type]:
    """The types of all events that reach a Gatekeeper."""
    types, observe = set(), Gatekeeper.observe

    def recording(self, event):
        types.add(type(event))
        observe(self, event)

    monkeypatch.setattr(Gatekeeper, "observe", recording)
    return types


def unwatched(adapter: Adapter, emitted: set[type]) -> dict[str, set[str]]:
    """By runtime gate of a run of one process, the watched events that were not emitted. Those of
    several ranks have their verdicts in tests/distributed/test_gates.py.
    """
    gates = [g for g in adapter.gates(load_spec()) if g.moment == "runtime" and g.min_ranks == 1]
    missing = {g.id: {e.__name__ for e in set(resolve(g).events) - emitted} for g in gates}
    return {gate: names for gate, names in missing.items() if names}


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_emits_what_its_gates_watch_and_offers_what_they_need(
    name, emitted, tmp_path, museum_folder
):
    case = CASES[name]
    verdicts = case.run(tmp_path, museum_folder)
    assert unwatched(case.adapter, emitted) == {}
    assert set(case.adapter.events) == emitted, "as the table of adapters says"
    assert verdicts.keys() == case.gates(museum_folder)
    assert {g: v.message for g, v in verdicts.items() if v.outcome == "not_run"} == case.not_run
    assert parts_of(verdicts) == case.parts
    assert not [g for g, v in verdicts.items() if v.outcome == "fail"]


def parts_of(verdicts: Verdicts) -> dict[str, str]:
    """What was judged, of gates with several parts."""
    return {g: v.measured["judged"] for g, v in verdicts.items() if g in OURS and v.passed}


def test_what_a_run_declares_has_the_keys_of_its_type(subject):
    """So that the types of the interface are those that checks read."""
    declared, linear = subject.declared, torch.ones(2, 2)
    laws = declared.update_law("layers.0.ffn.up.weight", linear), declared.update_law("w", linear)
    pairs = [
        (declared.architecture.keys(), Architecture),
        (declared.schedule.keys(), Schedule),
        (subject.stopping.declared.keys(), StopDeclaration),
        (set().union(*laws), UpdateLaw),
        (set(subject.corpus.manifest) & Manifest.__annotations__.keys(), Manifest),
    ]
    assert [set(keys) for keys, _ in pairs] == [set(kind.__annotations__) for _, kind in pairs]


def test_every_adapter_is_run():
    assert {case.adapter.name for case in CASES.values()} == BY_NAME.keys()


def test_a_capability_that_an_adapter_stops_offering_is_found(tmp_path, museum_folder, monkeypatch):
    """A whole gate is not judged without the loss from logits, and a part of one without laws."""
    monkeypatch.delattr(RunTraining, "cross_entropy_sum")
    monkeypatch.delattr(RunDeclared, "update_law")
    gates = ("loss.golden", "optim.parameter-groups")
    verdicts = stack_fresh(tmp_path, museum_folder, only=gates)
    golden = verdicts["loss.golden"]
    assert golden.outcome == "not_run" and "Training.cross_entropy_sum" in golden.message
    assert parts_of(verdicts) == {"optim.parameter-groups": "ownership, movement"}


def test_an_adapter_that_stops_emitting_an_event_is_found(
    emitted, tmp_path, museum_folder, monkeypatch
):
    """One event of our trainer, and one of another."""
    monkeypatch.setattr(train_callbacks.GateEvents, "on_sample", lambda *arguments: None)
    stack_fresh(tmp_path, museum_folder, only=("loss.first",))
    missing = unwatched(BY_NAME["train"], emitted)
    assert missing["sampling.coherence"] == {"Sampled"}
    assert set().union(*missing.values()) == {"Sampled", "TextDrawn"}
    emitted.clear()
    monkeypatch.setattr(script, "make_tokenizer", lambda: None)
    plain(tmp_path, museum_folder, only=())
    assert unwatched(BY_NAME["plain"], emitted) == {"tokenizer.own-ids": {"IdsRead"}}


def test_every_kind_of_run_that_a_gate_names_has_an_adapter():
    kinds = {k for g in load_spec().gates.values() if g.moment != "repository" for k in g.kinds}
    assert kinds <= {a.kind for a in ADAPTERS}


def test_a_model_with_other_columns_offers_no_logits():
    """A capability that is missing is named, and its gates are not passed."""

    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(8, 4)

        def forward(self, input_ids):
            return self.embed(input_ids).mean()

    verdicts = judge_model(Scores())
    unread = verdicts["model.causal"]
    assert unread.outcome == "not_run" and "Model.logits" in unread.message
