"""Learning by heart: what a model continues word for word, and samples that are too easy for it."""

import math
from types import SimpleNamespace

import pytest
import torch

from stackproof.contracts.events import MemorizationMeasured, Sampled
from stackproof.contracts.gate import limits_of
from stackproof.contracts.memorization import Memorized, Recitation, chance_of
from stackproof.evaluate.memorization import PASSAGES, matched, passages
from stackproof.evaluate.sampling import generate
from stackproof.model.build import build_model


def sampled(step: int, text: str, **parts):
    return Sampled(step=step, text=text, **parts)


def verdict(spec, recited, n=32, held_out=0, m=32):
    asked = []
    event = MemorizationMeasured(1, n, recited, 32, 3.0, m, lambda: asked.append(1) or held_out)
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


@pytest.mark.parametrize(
    ("own", "half", "ok"),
    [
        (3.0, False, True),
        (None, False, True),
        (3.03125, False, False),
        (2.96875, False, False),
        (5.0, True, True),
        (1.0, True, True),
        (5.03125, True, False),
        (0.96875, True, False),
        (math.nan, True, False),
    ],
)
def test_the_mean_match_is_that_of_full_forwards(spec, own, half, ok):
    counts = {"n_windows": 32, "n_recited": 0, "prefix_tokens": 32, "matched_tokens": 3.0}
    rest = {"n_held_out": 32, "held_out": lambda: 0, "own_matched_tokens": own, "half": half}
    check = Recitation(limits_of(spec.gates["sampling.recitation"]))
    assert check.observe(MemorizationMeasured(1, **counts, **rest)).passed == ok


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
