"""Learning by heart: what a model continues word for word, and samples that are too easy for it."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stackproof.contracts.events import MemorizationMeasured, Recited, Sampled
from stackproof.contracts.gate import limits_of
from stackproof.contracts.memorization import Memorized, Recitation, chance_of
from stackproof.distributed.ranks import OneProcess
from stackproof.evaluate.memorization import PASSAGES, matched, memorization, passages
from stackproof.evaluate.sampling import generate
from stackproof.model.build import build_model
from stackproof.museum.edit import Edit, edited
from stackproof.museum.plant import touch
from stackproof.subject.recited import cut, recited


def sampled(step: int, text: str, **parts):
    return Sampled(step=step, text=text, **parts)


def verdict(spec, recited, n=32, held_out=0, m=32):
    asked = []
    counts = Recited(n, recited, 32, 3.0, m, lambda: asked.append(1) or held_out)
    event = MemorizationMeasured(1, counts)
    return Recitation(limits_of(spec.gates["sampling.recitation"])).observe(event), bool(asked)


def test_recitation_needs_more_than_chance(spec):
    assert verdict(spec, 0)[0].passed and verdict(spec, 11)[0].passed
    assert not verdict(spec, 11)[1], "held-out text is only asked where it matters"
    red, asked = verdict(spec, 12)
    assert (
        red.outcome == "fail"
        and asked
        and red.measured["p_value"] == pytest.approx(6.875e-5, rel=1e-3)
    )
    assert verdict(spec, 32, held_out=32)[0].passed, (
        "text that everyone knows by heart, such as a licence"
    )
    assert verdict(spec, 32, held_out=16)[0].outcome == "fail"
    assert verdict(spec, 4, n=4)[0].outcome == "fail" and verdict(spec, 3, n=3)[0].passed
    assert verdict(spec, 0, n=0)[0].outcome == "not_run"


COUNTS = {"n_windows": 32, "n_recited": 20, "prefix_tokens": 32, "matched_tokens": 24.0}


@pytest.mark.parametrize(
    ("own", "half", "ok"),
    [
        ({}, False, True),
        ({"matched_tokens": 24.03125}, False, False),
        ({"matched_tokens": 23.96875}, False, False),
        ({"matched_tokens": 26.0}, True, True),
        ({"matched_tokens": 22.0}, True, True),
        ({"matched_tokens": 26.03125}, True, False),
        ({"matched_tokens": 21.96875}, True, False),
        ({"matched_tokens": math.nan}, True, False),
        ({"n_recited": 19}, False, False),
        ({"n_recited": 18}, True, True),
        ({"n_recited": 17}, True, False),
        ({"held_out": lambda: 18}, False, False),
        ({"held_out": lambda: 18}, True, True),
        ({"held_out": lambda: 17}, True, False),
        ({"n_windows": 31}, True, False),
        ({"n_held_out": 31}, True, False),
        ({"prefix_tokens": 16}, True, False),
    ],
)
def test_the_counts_are_those_of_full_forwards(spec, own, half, ok):
    reported = COUNTS | {"n_held_out": 32, "held_out": lambda: 20}
    check = Recitation(limits_of(spec.gates["sampling.recitation"]))
    stated, counted = Recited(**reported), Recited(**(reported | own))
    event = MemorizationMeasured(1, stated, counted, half=half)
    assert check.observe(event).passed == ok
    assert check.observe(MemorizationMeasured(1, stated)).passed, "the gate has no counts"


def test_rows_without_a_passage_are_not_judged_unless_some_are_reported(spec):
    none = Recited(**{name: 0 for name in COUNTS}, n_held_out=0, held_out=lambda: 0)
    check = Recitation(limits_of(spec.gates["sampling.recitation"]))
    event = MemorizationMeasured(1, none, none)
    assert check.observe(event).outcome == "not_run"
    assert check.observe(replace(event, reported=replace(none, n_windows=1))).outcome == "fail"


@pytest.mark.parametrize(
    ("a", "n", "b", "m"), [(11, 32, 0, 32), (5, 8, 2, 32), (3, 3, 1, 9), (0, 4, 0, 4)]
)
def test_chance_is_the_share_of_all_ways_to_hand_out_the_recited_ones(a, n, b, m):
    """Against counting by hand: the hypergeometric distribution as a product of fractions."""
    both, total = a + b, 0.0
    for k in range(a, min(n, both) + 1):
        ways = math.exp(
            sum(
                math.lgamma(x + 1) - math.lgamma(y + 1) - math.lgamma(x - y + 1)
                for x, y in ((n, k), (m, both - k))
            )
        )
        total += ways if both - k <= m else 0.0
    assert chance_of(a, n, b, m) == pytest.approx(total / math.comb(n + m, both), rel=1e-9)


@pytest.fixture(scope="module")
def memoriser(small_cfg):
    """A model that has read four passages of random tokens, the canaries, 150 times,
    and the same passages.
    """
    torch.manual_seed(0)
    model = build_model(small_cfg.model.model_copy(update={"dropout": 0.0}), 97, seed=3)
    rows = torch.randint(0, 97, (4, 65), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    return model, rows[:, :64]


def rows_of(ids, documents):
    return SimpleNamespace(input_ids=ids, labels=ids.roll(-1, 1), document_ids=documents)


@pytest.fixture
def measured(spec, memoriser):
    """The verdict on a measurement of a model that recites each row of one document, as the
    callbacks of a run take it.
    """
    model, canaries = memoriser
    strangers = torch.randint(0, 97, (2, 64), generator=torch.Generator().manual_seed(4))
    documents = torch.zeros(6, 64, dtype=torch.int64)
    documents[4:, 30:] = 1
    others = torch.randint(0, 97, (32, 64), generator=torch.Generator().manual_seed(5))
    unread = [rows_of(others, torch.zeros(32, 64, dtype=torch.int64))]
    state = SimpleNamespace(
        model=model, device=torch.device("cpu"), autocast=nullcontext, ranks=OneProcess()
    )

    def judge(known=canaries):
        batches = [rows_of(torch.cat([known, strangers]), documents)]
        found = memorization(model, batches, unread, device=state.device)
        names = ("n_recited", "prefix_tokens", "matched_tokens", "n_held_out", "held_out")
        counts = {name: getattr(found, name) for name in names} | {"n_windows": found.n_passages}
        event = MemorizationMeasured(1, Recited(**counts), recited(state, batches, unread))
        return Recitation(limits_of(spec.gates["sampling.recitation"])).observe(event)

    return judge


def test_the_right_measurement_is_judged_by_what_the_model_knows(measured):
    strangers = torch.randint(0, 97, (4, 64), generator=torch.Generator().manual_seed(6))
    green = measured(strangers)
    assert green.passed and green.measured["windows"] == 4 and not green.measured["recited_frac"]
    red = measured()
    assert red.message == (
        "step 1: 4 of 4 training passages are continued word for word after 32 tokens, and 0 of 32 "
        "held-out passages"
    )


PREFIX, READ = "prefix = read_NW.shape[1] // 2", "passages(read), passages(unread)"
WRONG = [
    ("memorization", "asked = read_NW.shape[1] - prefix", "asked = read_NW.shape[1] + prefix"),
    ("memorization", "tokens.count(asked)", "tokens.count(asked + 1)"),
    ("memorization", PREFIX, "prefix = read_NW.shape[1] // 4"),
    ("memorization", READ, "passages(read), passages(read)"),
    ("memorization", "n_passages=len(tokens)", "n_passages=4 * len(tokens)"),
    ("memorization", "matched(model, unread_NW", "matched(model, read_NW"),
    ("_of_rows", "== documents[row, start]", "!= documents[row, start]"),
    ("passages", "width = min(", "width = min(16, "),
]


@pytest.mark.parametrize(("function", "old", "new"), WRONG)
def test_recitation_is_red_on_a_wrong_measurement(measured, function, old, new):
    """Also of a model that recites nothing: the counts are not those of the gate."""
    edit = Edit(f"stackproof.evaluate.memorization:{function}", old, new, ())
    with edited([edit], touch):
        red = measured()
    assert red.outcome == "fail" and "4 of 4 training passages" in red.message
    assert "reported" in red.message


def test_a_planted_canary_is_found_and_random_text_is_not(spec, memoriser):
    model, canaries = memoriser
    strangers = torch.randint(0, 97, (32, 64), generator=torch.Generator().manual_seed(2))
    known, unknown = (
        matched(model, ids, device=torch.device("cpu")) for ids in (canaries, strangers)
    )
    assert known == [32] * 4 and max(unknown) <= 2
    assert verdict(spec, known.count(32), n=4, held_out=unknown.count(32))[0].outcome == "fail"


def test_one_forward_says_what_generating_would(memoriser):
    """Canaries that are damaged before or after the point at which the model goes on, so that they
    part early, late and never.
    """
    model, canaries = memoriser
    rows = canaries.repeat(4, 1)
    for row in range(len(rows)):
        place = 24 + 2 * row
        rows[row, place] = (rows[row, place] + 1) % 97
    found = matched(model, rows, device=torch.device("cpu"))
    for row, n in zip(rows.tolist(), found):
        said = generate(model, row[:32], max_new_tokens=32, temperature=0)
        assert n == next((i for i, (a, b) in enumerate(zip(said, row[32:])) if a != b), 32)
    assert len(set(found)) > 5, "the rows differ in how far they go"


def test_passages_lie_within_one_document_and_do_not_overlap():
    ids = torch.arange(2 * 160).reshape(2, 160)
    plain = SimpleNamespace(input_ids=ids, labels=ids + 1, document_ids=None)
    assert passages([plain])[:, 0].tolist() == [0, 160, 64, 224]
    documents = torch.zeros_like(ids)
    documents[0, 100:] = 1
    packed = SimpleNamespace(input_ids=ids, labels=ids + 1, document_ids=documents)
    assert passages([packed])[:, 0].tolist() == [0, 160, 224]
    short = SimpleNamespace(
        input_ids=ids[:, :10], labels=ids[:, :10] + 1, document_ids=torch.arange(10).repeat(2, 1)
    )
    assert passages([short]).shape == (0, 10)
    assert len(passages([plain] * 40)) == PASSAGES
    for batches in ([plain], [packed], [short], [plain] * 40, [packed] * 3):
        assert torch.equal(cut(batches), passages(batches)), "those of the gate"


def test_memorised_needs_a_low_loss_and_a_passage(spec):
    asked = []

    def found(share):
        return lambda: asked.append(share) or share

    def outcome(loss, share, usual=()):
        watch = Memorized(limits_of(spec.gates["sampling.memorised"]))
        for step, nats in enumerate(usual):
            watch.observe(sampled(step, "a", loss_nats=nats, found_in_corpus=found(1.0)))
        return watch.observe(sampled(99, "b", loss_nats=loss, found_in_corpus=found(share))).outcome

    assert outcome(2.0, 1.0) == "pass" and not asked, (
        "the corpus is only searched where the loss is suspicious"
    )
    assert outcome(0.13, 0.9) == "fail" and outcome(0.13, 0.05) == "pass"
    usual = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.02]
    assert outcome(1.2, 0.9, usual) == "fail" and outcome(1.8, 0.9, usual) == "pass"
    assert (
        Memorized(limits_of(spec.gates["sampling.memorised"])).observe(
            sampled(1, "foreign trainers may not know the loss")
        )
        is None
    )
