"""Findings: each is held to the records, links, tests and commits that it names."""

import pytest

from stackproof.spec.errors import IntegrityError
from tools.integrity.all_rules import check
from tools.integrity.core import Repo
from tools.tampers import small_repo
from tools.tampers.found import BAD, found_something


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"falsifier": "loss.wrong"}, None),
        ({"falsifier": "loss.strange"}, "no plant loss.strange"),
        ({"falsifier": "tests/gone.py::test_golden"}, "no test"),
        ({"gates": ["loss.silver"]}, "no gate loss.silver"),
        ({"fix": "d" * 40}, "not an ancestor"),
        ({"metric": "speed"}, "no metric speed"),
        (
            {"positive": BAD},
            (
                "n_suspects is 3.0 in its negative record and 3.0 in its positive one, where "
                "lower is better"
            ),
        ),
        (
            {"figures": (3, 4)},
            "3.0 in its negative record and 4.0 in its positive one, where lower is better",
        ),
        ({"figures": (3, 4), "better": "higher"}, None),
        ({"figures": (3, 3), "better": "higher"}, "where higher is better"),
        ({"figures": (3, 4), "better": None, "stated": ("higher", "higher")}, None),
        (
            {"figures": (4, 3), "better": None, "stated": ("higher", "neither")},
            "where higher is better",
        ),
        (
            {"figures": (4, 3), "stated": ("higher", "neither")},
            "is higher and lower: its records state higher, the finding lower",
        ),
        ({"better": None, "stated": ("lower", "higher")}, "is higher and lower"),
        ({"better": None}, "is not stated to be lower or higher"),
        ({"figures": ("NaN", 3)}, None),
        ({"figures": (3, "NaN")}, "3.0 in its negative record and nan in its positive one"),
        ({"figures": ("Infinity", 3)}, None),
        ({"negative": "compare-20200101T000000Z-00000000"}, "not in the ledger"),
        (
            {"suspect": {"hypothesis": "the weights differ", "evidence": f"{BAD}#E1"}},
            "the link's verdict is kept",
        ),
        (
            {"suspect": {"hypothesis": "the kernel differs", "evidence": f"{BAD}#E7"}},
            "its chain holds no such link",
        ),
        (
            {"suspect": {"hypothesis": "the moon", "evidence": f"{BAD}#E2"}},
            "the link's hypothesis is that the kernel differs",
        ),
        (
            {
                "suspect": {
                    "hypothesis": "the moon",
                    "evidence": BAD,
                    "metric": "n_suspects",
                    "value": 3,
                }
            },
            None,
        ),
        (
            {
                "suspect": {
                    "hypothesis": "the moon",
                    "evidence": BAD,
                    "metric": "n_suspects",
                    "value": 0,
                }
            },
            "its n_suspects is 3.0, not 0",
        ),
        (
            {
                "suspect": {
                    "hypothesis": "the moon",
                    "evidence": BAD,
                    "metric": "n_moons",
                    "value": 0,
                }
            },
            "its n_moons is None, not 0",
        ),
        ({"route_around": True, "fix": None, "positive": None}, None),
    ],
)
def test_a_finding_is_held_to_all_that_it_cites(repo, changes, says):
    found_something(repo, **changes)
    small_repo.forget()
    messages = [f.message for f in check(repo) if f.code == "FINDING-SHOWN"]
    assert [says in m for m in messages] == [True] if says else messages == []


def test_a_cause_that_was_gone_around_takes_the_discharge_from_its_gates(repo):
    small_repo.forget()
    assert Repo(repo).states["loss.golden"].state == "discharged"
    found_something(repo, route_around=True, fix=None, positive=None)
    state = Repo(repo).states["loss.golden"]
    assert state.state == "proven" and "a-finding: its cause was bypassed" in state.reason


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fix": None}, "fix is missing"),
        ({"route_around": True}, "exclude each other"),
        ({"speed": 1}, "speed"),
        ({"negative": "x"}, "negative"),
        ({"better": "neither"}, "better"),
        (
            {"suspect": {"hypothesis": "the moon", "evidence": BAD}},
            "a record eliminates nothing by being there",
        ),
        (
            {"suspect": {"hypothesis": "the moon", "evidence": BAD, "metric": "n_suspects"}},
            "a record eliminates nothing by being there",
        ),
        (
            {
                "suspect": {
                    "hypothesis": "the kernel differs",
                    "evidence": f"{BAD}#E2",
                    "metric": "n_suspects",
                    "value": 3,
                }
            },
            "states what it eliminated",
        ),
    ],
)
def test_a_finding_that_is_half_told_is_refused(repo, changes, says):
    found_something(repo, **changes)
    with pytest.raises(IntegrityError, match=says):
        _ = Repo(repo).findings


@pytest.mark.parametrize("file", ["metadata.json", "chain.jsonl"])
def test_a_cited_record_that_was_tampered_with_is_a_finding_and_no_crash(repo, file):
    found_something(repo)
    path = repo / "evidence" / BAD / file
    path.write_bytes(
        path.read_bytes().replace(b"kernel", b"colonel").replace(b"n_suspects", b"n_inspects")
    )
    small_repo.forget()
    found = check(repo)
    says = (
        "is not the record that was accepted"
        if file == "metadata.json"
        else "its chain holds no such link"
    )
    assert [says in f.message for f in found if f.code == "FINDING-SHOWN"] == [True]
    assert "INTERNAL" not in {f.code for f in found}
    assert file == "chain.jsonl" or BAD in Repo(repo).survey.unread, (
        "a record that was changed vouches for no series"
    )
