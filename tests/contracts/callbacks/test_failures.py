"""Every failure of a public trainer is seen by its gate, and clean trainings are not alarmed.

By default each is made in one trainer, in turns; with STRESS=1 in all of them.
"""

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("lightning")
pytest.importorskip("tokenizers")

from stackproof.contracts.callbacks.subject import ForeignDeclared, ForeignTraining
from stackproof.contracts.callbacks.text import TextReader
from stackproof.contracts.events import IdsRead, WeightsUpdated
from stackproof.contracts.gate import limits_of, resolve
from stackproof.contracts.optim import declared_settings
from stackproof.contracts.subject import Subject
from stackproof.spec.gates import load_spec
from tests.contracts.callbacks import stock
from tests.contracts.callbacks.clean_trainings import CLEAN
from tests.contracts.callbacks.failures import FAILURES, UNSEEN, Failure
from tests.contracts.callbacks.merges import OTHER, OWN, encoded
from tests.contracts.callbacks.trainers import TRAINERS, Parts

EVERYWHERE = bool(os.environ.get("STRESS"))


def pairs(failures: dict[str, Failure]) -> list[tuple[str, str]]:
    """(name, trainer) of what is run."""
    return [
        (name, trainer)
        for i, (name, failure) in enumerate(failures.items())
        for k, trainer in enumerate(failure.trainers)
        if EVERYWHERE or k == i % len(failure.trainers)
    ]


def red(change, trainer: str, folder) -> tuple[dict[str, int | None], bool]:
    """(gates that failed with their first step, whether the training was halted)."""
    with torch.random.fork_rng():
        seen, error = TRAINERS[trainer](change(Parts()), folder)
    return seen.first_failures(), error is not None


@pytest.mark.parametrize(("name", "trainer"), pairs(FAILURES))
def test_a_failure_is_caught(name, trainer, tmp_path):
    failure = FAILURES[name]
    found, halted = red(failure.change, trainer, tmp_path)
    assert failure.gate_id in found
    assert halted or load_spec().gates[failure.gate_id].severity == "warn"


@pytest.mark.parametrize(("name", "trainer"), pairs(UNSEEN))
def test_what_no_gate_sees_is_listed_as_such(name, trainer, tmp_path):
    assert red(UNSEEN[name].change, trainer, tmp_path) == ({}, False)


@pytest.mark.parametrize(("name", "trainer"), pairs(CLEAN))
def test_a_clean_training_is_not_alarmed(name, trainer, tmp_path):
    assert red(CLEAN[name].change, trainer, tmp_path) == ({}, False)


def check(gate_id: str):
    gate = load_spec().gates[gate_id]
    return resolve(gate)(limits_of(gate))


def test_lost_updates_is_two_sided():
    watcher = check("optim.lost-updates")
    fracs = (None, 0.9, 0.9, 0.9, 0.4, 0.9, 0.9, 0.9, 0.51)
    found = [watcher.observe(WeightsUpdated(i, 1e-3, lost_frac=f)) for i, f in enumerate(fracs)]
    assert found[0] is None
    assert [v.outcome for v in found[1:]] == ["pass"] * 7 + ["fail"]


def test_own_ids_is_two_sided():
    outcomes = [
        check("tokenizer.own-ids").observe(IdsRead(1, "training", n, same)).outcome
        for n, same in ((1000, 950), (1000, 949), (511, 0))
    ]
    assert outcomes == ["pass", "fail", "not_run"]


def test_ids_of_a_tokenizer_come_again():
    """By its own tokenizer all but the ends of cut rows, by another of the same size not."""
    shares = []
    for tokenizer in (OWN, OTHER):
        batch = stock.collate(encoded(tokenizer, 20, seed=3))
        read = TextReader(OWN).read(1, "training", batch["input_ids"], batch["attention_mask"])
        shares.append(read.n_same / read.n_tokens)
    assert shares[0] > 0.99 and shares[1] < 0.9


@pytest.mark.parametrize(
    ("stated", "lr", "unused"),
    [
        ({"learning_rate": 1e-3, "weight_decay": 0.1}, 1e-3, 0),
        ({"learning_rate": 1e-3}, 1e-4, 1),
        ({"weight_decay": 0.2}, 1e-3, 1),
        ({"warmup_steps": 8}, 1e-3, 1),
    ],
)
def test_declared_settings_is_two_sided(stated, lr, unused):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    subject = Subject(
        declared=ForeignDeclared(model, stated), training=ForeignTraining(model, optimizer)
    )
    verdict = declared_settings(limits_of(load_spec().gates["optim.declared-settings"]), subject)
    assert verdict.measured["unused"] == unused and verdict.passed == (not unused)
