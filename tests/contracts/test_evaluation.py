"""Gates of evaluation: green on the stack, red on every plant, and the runtime tables of the
founding note ship-two-001.
"""

import dataclasses
import json
import math
import random
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stackproof.config import EvalConfig, Patience
from stackproof.contracts.evaluation import Divergence, OverfitOnset, Plausible, SameBatches
from stackproof.contracts.events import Evaluated, HeldOutRows, Started
from stackproof.contracts.gate import call_check, limits_of
from stackproof.contracts.model import overfit_batch
from stackproof.contracts.stopping import PairedSpread
from stackproof.contracts.subject import Evaluation, Stopping, Subject, Trainee, Training
from stackproof.distributed.ranks import ONE_PROCESS
from stackproof.evaluate.baselines import compressed_bits_per_byte
from stackproof.evaluate.stopping import NeverStopRule, StopRule, batches_needed
from stackproof.museum.plant import load_museum, touches
from stackproof.spec.errors import DataError
from stackproof.subject.assemble import subject_of
from stackproof.subject.evaluation import wanted_batches
from stackproof.train import loop
from tests.fingerprints import around_a_change
from tests.subjects import altered, changed

FOUNDING = json.loads(Path(__file__).with_name("founding_runs.json").read_text())
GATES = ["evaluation.byte-conservation", "evaluation.invariance", "evaluation.stop-rule"]
PLANTS = [
    "evaluation.oov-flattered",
    "evaluation.bytes-scored-twice",
    "evaluation.dropout-active",
    "evaluation.train-mode-lost",
    "evaluation.mean-of-means",
    "evaluation.noise-stop",
    "evaluation.stop-one-round-late",
    "evaluation.inputs-shifted",
    "evaluation.documents-run-together",
    "evaluation.noise-counts-as-gain",
    "evaluation.error-too-small",
]


@pytest.mark.parametrize("gate_id", GATES)
def test_gate_is_green_on_the_stack(spec, subject, gate_id):
    verdict = call_check(spec.gates[gate_id], subject)
    assert verdict.outcome == "pass", verdict.message


@pytest.mark.parametrize("plant_id", PLANTS)
def test_gate_is_red_on_its_plant(spec, small_cfg, dataset, plant_id):
    plant, before = load_museum()[plant_id], touches()
    with plant.apply():
        subject = subject_of(small_cfg, dataset, torch.device("cpu"))
        verdict = call_check(spec.gates[plant.gate], subject)
    assert verdict.outcome == "fail" and verdict.message and touches() > before


def test_mean_of_means_is_far_beyond_the_limit(spec, small_cfg, dataset):
    with load_museum()["evaluation.mean-of-means"].apply():
        subject = subject_of(small_cfg, dataset, torch.device("cpu"))
        verdict = call_check(spec.gates["evaluation.invariance"], subject)
    assert (
        verdict.measured["batch_rel_error"]
        > 50 * spec.gates["evaluation.invariance"].limits["batch_rel_error_max"].value
    )


def test_invariance_refuses_a_model_without_dropout(spec, subject):
    def without_dropout(**options):
        model = subject.model.fresh(**options)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    verdict = call_check(
        spec.gates["evaluation.invariance"], changed(subject, model={"fresh": without_dropout})
    )
    assert verdict.outcome == "fail" and "no dropout" in verdict.message


DECLARED = {
    "kind": "patience",
    "patience": 5,
    "min_evaluations": 3,
    "z": 2.0,
    "min_delta_nats": 0.0,
    "expected_gain_nats": 0.02,
}


SPREAD = 0.03 * (1 - 1e-6)  # below the limit by more than float32 rounds


class FixedStopping(Stopping):
    """A rule, what is declared of it, and a number of batches of four rows."""

    def __init__(self, rule, n_eval_batches=16, **declared):
        self.rule, self.n_eval_batches, self.declared = rule, n_eval_batches, DECLARED | declared
        self.spread = PairedSpread(Spread(), Spread(), 4)


class Spread(Training, Evaluation, Trainee):
    """A training whose update moves the losses of two held-out rows apart: SPREAD for batches of
    four rows.
    """

    def __init__(self):
        self.steps = 0

    def trainee(self, options=None):
        return self

    def draw(self):
        return ()

    def step(self, batches):
        self.steps += 1

    def held_out_batches(self, n_rows, n_max):
        return (-1, 1)

    def evaluate(self, row):
        return row * (self.steps - 1) * SPREAD * 2 / 2**0.5


def judged(spec, rule, **changes):
    subject = Subject(stopping=FixedStopping(rule, **changes))
    return call_check(spec.gates["evaluation.stop-rule"], subject)


def test_stop_rule_power_check_is_two_sided(spec):
    default = lambda: StopRule(5, 3, 2.0, 0.0)  # noqa: E731
    needed = batches_needed(0.03, 0.02)
    assert needed == 9
    assert judged(spec, default, n_eval_batches=needed).passed
    verdict = judged(spec, default, n_eval_batches=needed - 1)
    assert verdict.outcome == "fail" and "can detect a gain" in verdict.message


def test_a_least_improvement_that_is_noise_is_refused(spec):
    """The standard error of the difference is 0.0075 nats at 16 batches, so half of 0.015."""
    for min_delta, outcome in ((0.0151, "pass"), (0.0149, "fail")):
        verdict = judged(
            spec,
            lambda: StopRule(5, 3, 2.0, min_delta),  # noqa: B023
            min_delta_nats=min_delta,
        )
        assert verdict.outcome == outcome, verdict.message


def test_sixteen_batches_are_the_default_and_more_are_taken_where_the_least_improvement_asks_for_them(  # noqa: E501
    small_cfg,
):
    assert EvalConfig(every=1).batches == 16
    for changes, wanted in (({}, 1), ({"min_delta_nats": 0.1}, 9), ({"min_delta_nats": 1.0}, 1)):
        cfg = small_cfg.model_copy(update={"stop": Patience(expected_gain_nats=0.3, **changes)})
        assert wanted_batches(cfg.stop, 0.15) == max(2, wanted)


@pytest.mark.parametrize(
    ("rule", "declared"),
    [
        # the policy of the founding note ship-two-001
        (lambda: StopRule(2, 3, 2.0, 0.0), {"patience": 2}),
        # a delta above the gain
        (lambda: StopRule(5, 3, 2.0, 0.5), {}),
        # min_evaluations not obeyed
        (lambda: StopRule(5, 3, 2.0, 0.0), {"min_evaluations": 12}),
        # another patience than declared
        (lambda: StopRule(6, 3, 2.0, 0.0), {}),
        (NeverStopRule, {}),
    ],
)
def test_stop_rule_is_red_on_unsound_rules(spec, rule, declared):
    assert judged(spec, rule, **declared).outcome == "fail"


def test_stop_rule_obeys_min_evaluations_beyond_patience(spec):
    assert judged(spec, lambda: StopRule(5, 12, 2.0, 0.0), min_evaluations=12).passed


def test_never_stop_passes_by_definition_and_is_held_to_it(spec):
    verdict = judged(spec, NeverStopRule, kind="never")
    assert verdict.passed and "all its steps" in verdict.message
    assert judged(spec, lambda: StopRule(5, 3, 2.0, 0.0), kind="never").outcome == "fail"


def test_the_held_out_split_has_at_least_two_batches(small_cfg, dataset):
    changes = {"batch_size": dataset.validation.n_windows(small_cfg.model.max_seq_len)}
    cfg = small_cfg.model_copy(update={"eval": small_cfg.eval.model_copy(update=changes)})
    with pytest.raises(DataError, match=r"(?s)too short to evaluate on.*at least two batches"):
        _ = subject_of(cfg, dataset, torch.device("cpu")).stopping.n_eval_batches


def test_a_run_that_goes_on_keeps_its_number_of_batches(small_cfg, dataset):
    subject = subject_of(small_cfg, dataset, torch.device("cpu"), n_eval_batches=3)
    assert subject.stopping.n_eval_batches == 3


def test_number_of_batches_and_gate_share_one_measured_spread(spec, small_cfg, dataset):
    cfg = small_cfg.model_copy(update={"stop": Patience()})
    subject, measured = subject_of(cfg, dataset, torch.device("cpu")), []
    spread = subject.stopping.spread
    trainee = lambda: measured.append(1) or subject.training.trainee()  # noqa: E731
    object.__setattr__(spread, "training", altered(subject.training, trainee=trainee))
    assert subject.stopping.n_eval_batches >= 2
    verdict = call_check(spec.gates["evaluation.stop-rule"], subject)
    assert measured == [1] and verdict.measured["detectable_gain_nats"] == pytest.approx(
        2 * spread.std_nats / subject.stopping.n_eval_batches**0.5
    )


# --- runtime --------------------------------------------------------------------------------------


def evaluated(loss, previous=None, vocab_size=50257, batch_hash="a", batches=(1.0, 2.0), step=1):
    return Evaluated(step, loss, 1.0, batches, batch_hash, previous, math.log(vocab_size))


@pytest.mark.parametrize(
    ("loss", "previous", "outcome"),
    [
        (7.1, 3.5, "fail"),
        (7.0, 3.5, "pass"),
        (18.0, None, "pass"),
        (25.0, None, "fail"),
        (math.nan, 3.5, "fail"),
        (math.inf, None, "fail"),
    ],
)
def test_divergence_table(spec, loss, previous, outcome):
    check = Divergence(limits_of(spec.gates["evaluation.divergence"]))
    assert check.observe(evaluated(loss, previous)).outcome == outcome


def test_the_state_holds_the_loss_of_the_evaluation_before(spec):
    """Also that of before a resume."""
    for stated, outcome in ((3.5, "pass"), (None, "fail"), (3.25, "fail")):
        first = Divergence(limits_of(spec.gates["evaluation.divergence"]))
        assert first.observe(evaluated(3.5)).passed
        resumed = Divergence(limits_of(spec.gates["evaluation.divergence"]))
        resumed.load_state_dict(first.state_dict())
        for check in (first, resumed):
            verdict = check.observe(evaluated(3.0, stated))
            assert verdict.outcome == outcome
            assert ("loss of the evaluation before" in verdict.message) == (outcome == "fail")


def test_weights_that_were_trained_before_begin_at_ten_nats_or_less(spec):
    for loss, pretrained, outcome in (
        (11.0, True, "fail"),
        (10.0, True, "pass"),
        (11.0, False, "pass"),
    ):
        check = Divergence(limits_of(spec.gates["evaluation.divergence"]))
        event = dataclasses.replace(evaluated(loss), pretrained=pretrained)
        assert check.observe(event).outcome == outcome


# --- plausible ------------------------------------------------------------------------------------


class Scored:
    """Evaluations of one text: how often the compressor ran."""

    def __init__(self, compressed=2.0, found=0.0):
        self.found, self.compressed, self.calls = found, compressed, 0

    def compress(self):
        self.calls += 1
        return self.compressed

    def at(self, bits_per_byte, step=1):
        rows = HeldOutRows(16, 16, self.found)
        return dataclasses.replace(
            evaluated(3.0, step=step),
            bits_per_byte=bits_per_byte,
            rows=lambda: rows,
            compressed=self.compress,
        )


def plausible(spec, bits_per_byte_min=None):
    check = Plausible(limits_of(spec.gates["evaluation.plausible"]))
    assert check.observe(Started(0, {"bits_per_byte_min": bits_per_byte_min})) is None
    return check


@pytest.mark.parametrize(
    ("bits", "compressed", "found", "outcome"),
    [
        (0.31, 2.0, 0.0, "pass"),
        (0.29, 2.0, 0.0, "fail"),
        (0.16, 2.0, 0.5, "pass"),  # half of the passages are in the training split
        (0.14, 2.0, 0.5, "fail"),
        (0.01, 0.05, 0.0, "pass"),  # text that repeats itself
        (math.nan, 2.0, 0.0, "fail"),
    ],
)
def test_plausible_is_two_sided(spec, bits, compressed, found, outcome):
    verdict = plausible(spec).observe(Scored(compressed, found).at(bits))
    assert verdict.outcome == outcome
    assert verdict.measured["least_bits_per_byte"] == pytest.approx(0.15 * compressed * (1 - found))


def test_a_compressor_is_asked_once_and_only_below(spec):
    check, scored = plausible(spec), Scored()
    assert all(check.observe(scored.at(bits)).passed for bits in (5.0, 0.8)) and scored.calls == 0
    assert check.observe(scored.at(0.5)).passed and scored.calls == 1
    resumed = plausible(spec)
    resumed.load_state_dict(check.state_dict())
    assert resumed.observe(scored.at(0.2)).outcome == "fail" and scored.calls == 1
    unknown = dataclasses.replace(scored.at(0.2), compressed=None)
    assert plausible(spec).observe(unknown).outcome == "not_run"


def test_a_declared_bound_replaces_the_compressor(spec):
    scored = Scored()
    assert plausible(spec, 0.0).observe(scored.at(0.001)).passed
    assert plausible(spec, 0.5).observe(scored.at(0.49)).outcome == "fail" and scored.calls == 0


def test_a_compressor_finds_what_a_text_shares_with_the_one_before():
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(500)]
    known, new = (" ".join(draw.choices(words, k=4000)) for _ in range(2))
    alone, after = (compressed_bits_per_byte(new, after=t) for t in ("", known))
    # 500 equally likely words of 7 bytes hold log2(500) / 7 = 1.28 bits per byte.
    assert 1.28 < after < alone < 2.5
    assert compressed_bits_per_byte(known, after=known) < 0.05
    assert compressed_bits_per_byte("", after=known) == math.inf


def onset(spec, rounds):
    check = OverfitOnset(limits_of(spec.gates["evaluation.overfit-onset"]))
    seen = [
        dataclasses.replace(evaluated(val, step=i, batches=(val, val)), train_loss_nats=train)
        for i, (train, val) in enumerate(rounds)
    ]
    return [i for i, event in enumerate(seen) if not check.observe(event).passed]


def test_overfit_onset_on_the_founding_run_is_epoch_three(spec):
    runs = {
        name: [(r["train_loss"], r["val_loss"]) for r in rows]
        for name, rows in FOUNDING["runs"].items()
    }
    assert onset(spec, runs["tuned-50k"])[0] == 3 and onset(spec, runs["tuned-50k"][:3]) == []
    assert onset(spec, runs["wrapped-5k"]) == [4]
    assert onset(spec, [(t, t + 1) for t, _ in runs["tuned-50k"]]) == [], "both fall"
    assert onset(spec, [(v, v - 1) for _, v in runs["tuned-50k"]]) == [], (
        "held-out text is the easier one"
    )


def test_overfit_onset_counts_over_a_resume_and_keeps_silent_without_a_training_loss(spec):
    first, second = (
        OverfitOnset(limits_of(spec.gates["evaluation.overfit-onset"])) for _ in range(2)
    )
    rows = [
        dataclasses.replace(evaluated(v, batches=(v, v)), train_loss_nats=t)
        for t, v in ((3.0, 3.1), (2.9, 3.2), (2.8, 3.3))
    ]
    assert (
        first.observe(evaluated(3.0)) is None
        and first.observe(rows[0]).passed
        and first.observe(rows[1]).passed
    )
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert not second.observe(rows[2]).passed


def test_a_rise_within_noise_is_no_onset(spec):
    check = OverfitOnset(limits_of(spec.gates["evaluation.overfit-onset"]))
    quiet, loud = (3.11, 3.11, 3.12, 3.10), (3.4, 2.9, 3.3, 2.9)
    for batches, outcome in ((loud, "pass"), (quiet, "fail")):
        rounds = [(3.0, (3.0, 3.0, 3.0, 3.0)), (2.9, (3.05,) * 4), (2.8, batches)]
        verdicts = [
            check.observe(
                dataclasses.replace(evaluated(sum(b) / 4, batches=b), train_loss_nats=train)
            ).outcome
            for train, b in rounds
        ]
        assert verdicts[-1] == outcome


def test_diverging_plant_more_than_doubles(spec, subject, dataset):
    tokenizer = dataset.tokenizer
    batch = overfit_batch(tokenizer.vocab_size, tokenizer.eos_id, 24)
    parts = {"autocast": nullcontext, "device": "cpu", "ranks": ONE_PROCESS}
    state = SimpleNamespace(model=subject.model.module, **parts)
    held = SimpleNamespace(state=state, dataset=dataset, held_out=[batch])

    def verdicts():
        check, losses = Divergence(limits_of(spec.gates["evaluation.divergence"])), [None]
        losses += [loop.held_out_loss(held).loss_nats for _ in range(2)]
        return [
            check.observe(evaluated(now, before, dataset.tokenizer.vocab_size)).outcome
            for before, now in pairwise(losses)
        ]

    assert verdicts() == ["pass", "pass"]
    with load_museum()["evaluation.diverging"].apply():
        assert verdicts() == ["pass", "fail"]


def same_batches(spec):
    return SameBatches(limits_of(spec.gates["evaluation.same-batches"]))


def test_same_batches_survives_a_resume(spec):
    first, second = same_batches(spec), same_batches(spec)
    assert first.observe(evaluated(3.0)).passed and first.observe(evaluated(2.9)).passed
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.observe(evaluated(2.8)).passed
    assert not second.observe(evaluated(2.8, batch_hash="b")).passed


def test_same_batches_sees_another_number_of_batches(spec):
    check = same_batches(spec)
    assert check.observe(evaluated(3.0)).passed
    assert not check.observe(evaluated(3.0, batches=(1.0,))).passed


def test_drifting_plant_moves_the_batches():
    held = SimpleNamespace(held_out=["first", "second"])
    with load_museum()["evaluation.drifting-batches"].apply(), pytest.raises(AttributeError):
        loop.evaluate(held)
    assert held.held_out == ["first", "second"]


def test_drifting_and_diverging_halt_a_real_run(small_cfg, tmp_path):
    from stackproof.spec.errors import GateFailed
    from stackproof.train.loop import train
    from stackproof.train.start import fresh

    cfg = small_cfg.model_copy(
        update={"train": small_cfg.train.model_copy(update={"max_steps": 16})}
    )
    for plant_id in ("evaluation.drifting-batches", "evaluation.diverging"):
        plant = load_museum()[plant_id]
        with plant.apply(), pytest.raises(GateFailed) as caught:
            train(fresh(cfg, (), tmp_path / plant_id, only=(plant.gate,)))
        assert caught.value.gate_id == plant.gate


@pytest.mark.parametrize("change", [{"z": 2.05}, {"z": 1.95}, {"min_delta_nats": 0.01}])
def test_stop_rule_counts_a_gain_exactly_from_what_is_declared(spec, subject, change):
    """A rule that is two and a half percent stricter or laxer, or has another least improvement,
    than the one declared.
    """
    declared = dict(subject.stopping.declared) | change
    verdict = call_check(
        spec.gates["evaluation.stop-rule"], changed(subject, stopping={"declared": declared})
    )
    assert verdict.outcome == "fail" and "is what counts" in verdict.message


@pytest.mark.parametrize(
    "old, new",
    [("PROBE_ROWS = 24", "PROBE_ROWS = 2"), ("self.batch_rows**0.5", "self.batch_rows")],
)
def test_a_change_of_the_measured_spread_opens_the_gate_again(tmp_path, old, new):
    check = "contracts.stopping:stop_rule"
    (before,), (after,) = around_a_change(tmp_path, "contracts/stopping.py", old, new, [check])
    assert before != after
