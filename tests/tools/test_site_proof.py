"""Pages of the proof: what they show is what the kills and the matrix say."""

import dataclasses
import re
from pathlib import Path

import pytest

from stackproof.museum.edit import Edit
from stackproof.museum.plant import Plant
from stackproof.spec.failures import load_catalogue
from stackproof.spec.records import Kill, Record
from tools.exhibits import plant_diff
from tools.site_pages import proof
from tools.site_pages.museum import museum_page, room_pages
from tools.site_pages.world import load_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bare():
    """The repository without its ledger."""
    world = load_world(ROOT, ROOT / "evidence")
    return dataclasses.replace(world, records={}, superseded={})


def kill(world, gate, plant, **fields):
    given = {
        "fingerprint": world.spec.fingerprint(gate),
        "plant_sha256": "b" * 64,
        "outcome": "killed",
        "control": "pass",
    }
    return Kill(
        gate=gate,
        plant=plant,
        **given | {"latency": "", "seconds": 0.1, "moment": "before step 1"} | fields,
    )


def proven(world, *kills, rows=None):
    record = Record.model_construct(
        id="falsification-20260101T000000Z-00000000", kills=kills, series=(), gates=()
    )
    made = dataclasses.replace(world, records={record.id: record})
    if rows is None:
        return made

    class WithRows(type(made)):
        def series(self, record, name, *keys):
            return rows

    return WithRows(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})


def test_an_edit_is_shown_as_the_diff_that_it_is():
    edits = (
        Edit(
            "contracts.gate:passed",
            'return Verdict("pass"',
            'return Verdict("fail"',
            ("import math",),
        ),
    )
    diff = plant_diff(ROOT, Plant("x.y", "a.b", "t", "s", ("u",), edits))
    assert diff.startswith("--- contracts/gate.py: passed\n+++ contracts/gate.py: x.y\n")
    assert [line[0] + line[1:].strip() for line in diff.splitlines()[3:] if line[0] in "+-"] == [
        "+import math",
        '-return Verdict("pass", message, measured)',
        '+return Verdict("fail", message, measured)',
    ]


def test_every_plant_shows_its_diff_or_its_generator(bare):
    """Each edit still stands in the code, once; each other plant names a function of the museum."""
    for exhibit in bare.plants.values():
        assert bool(plant_diff(ROOT, exhibit)) == bool(exhibit.edits) != bool(exhibit.source), (
            exhibit.id
        )


def test_the_state_of_a_failure_is_that_of_all_its_plants(bare):
    catalogue = load_catalogue(ROOT)
    failure = catalogue.failures["SF-M05"]
    first, *rest, second = (kill(bare, "model.isolation", p) for p in failure.plants)
    state = lambda *kills: proof.failure_state(  # noqa: E731
        catalogue, failure, proof.newest_kills(proven(bare, *kills))
    )
    assert state(first, *rest, second) == "killed" and state(first, *rest) == "planted"
    older = second.model_copy(update={"fingerprint": "0" * 64})
    assert state(first, *rest, older) == "planted", "an older fingerprint is no kill"
    assert state(first, *rest, second.model_copy(update={"control": "fail"})) == "planted"
    assert proof.failure_state(catalogue, catalogue.failures["SF-PT4"], {}) == "awaiting"
    assert (
        proof.failure_state(catalogue, catalogue.failures["SF-R05"], {})
        == "held by rules and tests"
    )


def test_latency_is_counted_once_per_plant(bare):
    kills = [
        kill(bare, "loss.golden", "loss.padding-counted"),
        kill(
            bare,
            "runtime.finite",
            "runtime.nan-in-a-weight",
            moment="within k steps",
            latency_steps=1,
        ),
        kill(
            bare,
            "schedule.rate",
            "schedule.decay-never-begins",
            moment="within k steps",
            latency_steps=9,
        ),
        kill(bare, "loss.golden", "loss.padding-counted"),
    ]
    shown = proof.latency_histogram(proven(bare, *kills))
    assert "before step 1 1, within 5 steps 1, later in the run 1, at checkpoint 0" in shown
    assert proof.latency_histogram(bare) == ""


def test_pages_without_any_record_say_how_to_get_one(bare):
    for page in (proof.margins_page(bare), proof.matrix_page(bare)):
        assert "stack gates prove" in page.text() and "|" not in page.text()


def test_matrix_shows_who_else_and_who_is_cheapest(bare):
    red = {
        "loss.golden": {"seconds": 0.02, "step": None},
        "model.overfit-one-batch": {"seconds": 3.0, "step": None},
    }
    rows = [
        {
            "plant": "loss.padding-counted",
            "gate": "loss.golden",
            "red": red,
            "raised": {"data.order": "KeyError: x"},
            "asked": 54,
            "seconds": 8.0,
        }
    ]
    text = proof.matrix_page(proven(bare, rows=rows)).text()
    line = next(x for x in text.splitlines() if "padding-counted" in x)
    assert (
        line.index("model.overfit-one-batch") < line.index("0.02 s")
        and "data.order" in line
        and "54" in line
    )
    assert re.search(r"overfit-one-batch.*\| 1 \| 0 \| 0 \|", text)


def test_margins_and_museum_show_both_sides(bare):
    made = kill(
        bare,
        "loss.golden",
        "loss.padding-counted",
        measured={"abs_error": 0.5},
        control_measured={"abs_error": 1e-7},
    )
    world = proven(bare, made)
    assert (
        "100×" in proof.margins_page(world).text() and "5e+04×" in proof.margins_page(world).text()
    )
    rooms = {page.path: page.text() for page in room_pages(world)}
    text = rooms["museum/loss.md"]
    assert "measured without it" in text and "../failures.md#sf-l06" in text and "What " in text
    assert "museum/loss.md#loss-padding-counted" in museum_page(world).text() and sum(
        t.count("Last kill:") for t in rooms.values()
    ) == len(world.plants)


def test_every_documented_failure_has_its_symptom_with_the_gates_that_ask(bare):
    text = proof.symptoms_page(bare).text()
    line = next(x for x in text.splitlines() if "failures.md#sf-l06" in x)
    assert "gates/loss." in line and text.count("failures.md#") == 103


def test_a_matrix_made_in_parts_is_one_with_the_newest_row_of_each_plant(bare):
    """Two records: the newer one holds one plant of the older one again, and not the other."""
    row = lambda plant, seconds: {  # noqa: E731
        "plant": plant,
        "gate": "loss.golden",
        "red": {},
        "raised": {},
        "asked": 54,
        "seconds": seconds,
    }
    held = {
        "falsification-20260101T000000Z-00000000": [
            row("loss.padding-counted", 8.0),
            row("loss.bits-instead-of-nats", 9.0),
        ],
        "falsification-20260102T000000Z-00000000": [row("loss.padding-counted", 5.0)],
    }
    records = {i: Record.model_construct(id=i, kills=(), series=(), gates=()) for i in held}

    class WithRows(type(bare)):
        def series(self, record, name, *keys):
            return held[record.id]

    fields = {f.name: getattr(bare, f.name) for f in dataclasses.fields(bare)} | {
        "records": records
    }
    rows, used = proof._newest_rows(WithRows(**fields))
    assert {r["plant"]: r["seconds"] for r in rows} == {
        "loss.padding-counted": 5.0,
        "loss.bits-instead-of-nats": 9.0,
    }
    assert used == sorted(held, reverse=True)
    assert f"2 of {len(bare.plants)} plants" in proof.matrix_page(WithRows(**fields)).text()
