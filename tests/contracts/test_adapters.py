"""Each adapter, in its smallest real training: it emits the events that the gates of its kind
watch, and offers what they need, but for an explicit list.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import pytest
import torch

from stackproof.config import NeverStop
from stackproof.contracts.adapters import ADAPTERS, Adapter
from stackproof.contracts.callbacks.session import judge_model
from stackproof.contracts.gate import Verdict, resolve
from stackproof.contracts.keeper import Gatekeeper
from stackproof.museum import script
from stackproof.museum.collection import museum_config
from stackproof.spec.gates import load_spec
from stackproof.train import callbacks as train_callbacks
from stackproof.train import start
from stackproof.train.loop import train

BY_NAME = {a.name: a for a in ADAPTERS}
NOT_OFFERED = "the trainer does not offer"
Verdicts = Mapping[str, Verdict]


def museum(folder, **changes):
    """The museum's small run with traces: each kind of event comes."""
    cfg = museum_config(folder)
    steps = cfg.train.model_copy(update={"max_steps": 10})
    trace = cfg.trace.model_copy(update={"every": 4})
    changes = {"train": steps, "stop": NeverStop(), "trace": trace} | changes
    return cfg.model_copy(update=changes)


def stack_fresh(tmp_path, texts, only=None) -> Verdicts:
    record = train(start.fresh(museum(texts), (), tmp_path / "run", only=only))
    return {g.id: Verdict(g.verdict, g.message) for g in record.gates}


def stack_resumed(tmp_path, texts, only=None) -> Verdicts:
    stack_fresh(tmp_path, texts, only=())
    longer = museum(texts).train.model_copy(update={"max_steps": 18})
    child = start.fresh(
        museum(texts, train=longer), (), tmp_path / "child", parent=tmp_path / "run", only=only
    )
    record = train(child)
    return {g.id: Verdict(g.verdict, g.message) for g in record.gates}


def plain(tmp_path, texts, only=None) -> Verdicts:
    gate, _ = script.run(only)
    return gate.verdicts()


def hugging_face(tmp_path, texts, only=None) -> Verdicts:
    """Once with evaluations and saves, then resumed; without a tokenizer as processing_class."""
    pytest.importorskip("transformers", reason="pip install 'stackproof[hf]'")
    from tests.contracts.callbacks import stock

    plan = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
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
    from tests.contracts.callbacks import test_lightning

    callback = test_lightning.GateCallback("log", only=only)
    *_, trainer = test_lightning.fit(tmp_path, callback=callback, val_check_interval=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = test_lightning.GateCallback("log", only=only)
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


@dataclass(frozen=True)
class Case:
    """One adapter: how it is run, and the gates that need a capability which it does not offer."""

    adapter: Adapter
    run: Callable[..., Verdicts]
    not_offered: Set[str] = frozenset()


CASES = {
    "stack train": Case(BY_NAME["train"], stack_fresh),
    "stack train, continued": Case(BY_NAME["resume"], stack_resumed),
    "plain": Case(BY_NAME["plain"], plain),
    "Hugging Face": Case(BY_NAME["huggingface"], hugging_face, {"tokenizer.identity"}),
    "TRL": Case(BY_NAME["huggingface"], trl),
    "Lightning": Case(BY_NAME["lightning"], lightning, {"tokenizer.identity", "model.tied-head"}),
    "pytest": Case(BY_NAME["pytest"], pytest_plugin, {"tokenizer.identity"}),
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
    """By runtime gate of the adapter's kind, the watched events that were not emitted."""
    gates = [g for g in adapter.gates(load_spec()) if g.moment == "runtime"]
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
    missing = {g for g, v in verdicts.items() if v.message.startswith(NOT_OFFERED)}
    assert missing == case.not_offered
    assert not [g for g, v in verdicts.items() if v.outcome == "fail"]


def test_an_adapter_that_stops_emitting_an_event_is_found(
    emitted, tmp_path, museum_folder, monkeypatch
):
    """One event of our trainer, and one of another."""
    monkeypatch.setattr(train_callbacks.GateEvents, "on_sample", lambda *arguments: None)
    stack_fresh(tmp_path, museum_folder, only=())
    missing = unwatched(BY_NAME["train"], emitted)
    assert missing["sampling.coherence"] == {"Sampled"}
    assert set().union(*missing.values()) == {"Sampled"}
    emitted.clear()
    monkeypatch.setattr(script, "evaluate", lambda model, batch: 0.0)
    plain(tmp_path, museum_folder, only=())
    assert unwatched(BY_NAME["plain"], emitted) == {"optim.movement": {"StateCompared"}}


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
