"""Every limit that compares numbers refuses an output that is one percent off, and one in which a
single channel has the wrong sign.

`CASES` holds what is tried here. `ELSEWHERE` names the tests of limits whose gates need a
configuration of their own. `NOT_SO` names limits to which a percent of an output means nothing, and
says why. No limit of these subsystems is in none of the three.
"""

import dataclasses
from functools import partial

import pytest
import torch

from stackproof.contracts.gate import call_check, limits_of
from stackproof.contracts.optim import ClipNorm
from stackproof.spec import ROOT
from tests.contracts.test_optim import step_taken
from tests.subjects import altered, changed, with_trainees
from tools.integrity.core import Repo

SUBSYSTEMS = (
    "loss",
    "model",
    "optim",
    "schedule",
    "kernel",
    "moe",
    "precision",
    "export",
    "sampling",
    "evaluation",
)


def louder(x):
    return x * 1.01


def flipped(x):
    """The sign of the last channel, of the whole where there is only one number."""
    if not isinstance(x, torch.Tensor) or x.ndim == 0:
        return -x
    wrong = x.clone()
    wrong[..., -1] = -wrong[..., -1]
    return wrong


def member(part, name, wrong, subject):
    honest = getattr(getattr(subject, part), name)
    other = {name: lambda *a, **k: wrong(honest(*a, **k))}
    return changed(subject, **{part: other})


def likeliest(wrong, subject):
    """The most likely token stands in the last place: the last token of the gate's distribution is
    impossible.
    """
    honest = subject.sampling.token_probs

    def token_probs(logits_V, **options):
        return wrong(honest(logits_V, **options).roll(-1)).roll(1)

    return changed(subject, sampling={"token_probs": token_probs})


def cached_only(wrong, subject):
    honest = subject.sampling.logits

    def logits(model, ids_BT, cache=None):
        found = honest(model, ids_BT, cache)
        return found if cache is None else wrong(found)

    return changed(subject, sampling={"logits": logits})


def packed_only(wrong, subject):
    honest = subject.model.packed_logits

    def packed(ids_BT, documents_BT):
        logits = honest(ids_BT, documents_BT)
        return wrong(logits) if int(documents_BT.max()) > 0 else logits

    return changed(subject, model={"packed_logits": packed})


def partitioned_only(wrong, subject):
    def accumulating(trainee):
        def accumulate(batches):
            nats = trainee.accumulate(batches)
            if len(batches) > 1:
                gain = trainee.model.final_norm.weight
                gain.grad.copy_(wrong(gain.grad))
            return nats

        return accumulate

    return with_trainees(subject, accumulate=accumulating)


def accumulated(wrong, subject):
    def trainee_of(model, optimizer):
        honest = subject.training.trainee_of(model, optimizer)

        def accumulate(batches):
            nats = honest.accumulate(batches)
            model.final_norm.weight.grad = wrong(model.final_norm.weight.grad)
            return nats

        return altered(honest, accumulate=accumulate)

    return changed(subject, training={"trainee_of": trainee_of})


def one_layer(wrong, subject):
    first, *others = subject.model.attention_layers
    return changed(subject, model={"attention_layers": [lambda *a: wrong(first(*a)), *others]})


def tables(wrong, subject):
    cos, sin = subject.model.rotary_tables
    return changed(subject, model={"rotary_tables": (wrong(cos), sin)})


def scored_texts(wrong, subject):
    honest = subject.evaluation.score_text

    def score_text(*given):
        result = honest(*given)
        return dataclasses.replace(result, bits_per_char=wrong(result.bits_per_char))

    return changed(subject, evaluation={"score_text": score_text})


def scored_batches(rows_min, wrong, subject):
    """The score of batches with so many rows or more."""
    honest = subject.evaluation.score_batches

    def score_batches(model, batches):
        result = honest(model, batches)
        if len(batches[0].input_ids) < rows_min:
            return result
        return dataclasses.replace(result, loss_nats=wrong(result.loss_nats))

    return changed(subject, evaluation={"score_batches": score_batches})


def first_gradient(wrong, subject):
    def clip(model):
        norm, first = subject.training.clip(model), model.parameters()[0]
        first.grad.copy_(wrong(first.grad))
        return norm

    return changed(subject, training={"clip": clip})


def updates(ndim, wrong, subject):
    """Each update of parameters of so many dimensions goes another way;
    what is flipped is one channel's.
    """

    def make(model):
        optimizer = subject.training.make_optimizer(model)
        honest = optimizer.step
        mine = [p for group in optimizer.param_groups for p in group["params"] if p.ndim == ndim]

        @torch.no_grad()
        def step(closure=None):
            before = [p.clone() for p in mine]
            honest()
            for p, b in zip(mine, before):
                p.copy_(b + wrong(p - b))

        optimizer.step = step
        return optimizer

    return changed(subject, training={"make_optimizer": make})


CASES = {
    ("loss.golden", "abs_error_max"): partial(member, "training", "cross_entropy_sum"),
    ("loss.partition-equivalence", "rel_error_max"): partitioned_only,
    ("model.isolation", "rel_error_max"): packed_only,
    ("model.reference-differential", "rel_error_max"): one_layer,
    ("model.reference-differential", "table_abs_error_max"): tables,
    ("model.gradient", "rel_error_max"): accumulated,
    ("optim.reference-update", "error_over_lr_max"): partial(updates, 1),
    ("optim.reference-update", "muon_rel_error_max"): partial(updates, 2),
    ("optim.clip-spike", "rel_excess_max"): first_gradient,
    ("sampling.cache-parity", "rel_error_max"): cached_only,
    ("sampling.distribution", "abs_error_max"): likeliest,
    ("evaluation.byte-conservation", "rel_error_max"): scored_texts,
    ("evaluation.invariance", "batch_rel_error_max"): partial(scored_batches, 2),
    ("evaluation.invariance", "own_rel_error_max"): partial(scored_batches, 1),
}
OF_SCORES = (
    "tests/contracts/test_commands.py::test_one_percent_of_a_score_and_of_the_logits_is_seen"
)
OF_CHOICES = "tests/contracts/test_moe.py::test_run_choices_sees_one_percent"
ELSEWHERE = {
    (
        "kernel.compiled-graph",
        "rel_error_max",
    ): "tests/contracts/test_kernel.py::test_gate_sees_one_percent_of_one_gradient",
    (
        "kernel.parity",
        "rel_error_max",
    ): "tests/contracts/test_kernel.py::test_one_percent_of_one_gradient_of_a_kernel_is_seen",
    (
        "kernel.parity",
        "half_scale_error_max",
    ): "tests/contracts/test_kernel.py::test_one_percent_of_one_gradient_of_a_kernel_is_seen",
    (
        "moe.dispatch-parity",
        "rel_error_max",
    ): "tests/contracts/test_moe.py::test_dispatch_sees_one_percent",
    ("evaluation.text-score", "window_rel_error_max"): OF_SCORES,
    ("evaluation.text-score", "sum_rel_error_max"): OF_SCORES,
    ("evaluation.baselines", "baseline_rel_error_max"): (
        "tests/contracts/test_baselines.py::test_each_wrong_baseline_is_red"
    ),
    (
        "evaluation.rescored",
        "rel_error_max",
    ): "tests/contracts/test_commands.py::test_a_batch_that_is_scored_again_has_the_reported_mean",
    (
        "model.traced",
        "statistic_rel_error_max",
    ): "tests/contracts/test_commands.py::test_a_trace_is_of_the_untraced_forward",
    ("moe.run-choices", "share_abs_error_max"): OF_CHOICES,
    ("moe.run-choices", "padding_rel_error_max"): OF_CHOICES,
    (
        "moe.balance",
        "formula_rel_error_max",
    ): "tests/contracts/test_moe.py::test_balance_sees_one_percent",
    (
        "moe.balance",
        "entry_rel_error_max",
    ): "tests/contracts/test_moe.py::test_balance_sees_one_percent",
    (
        "precision.shadow",
        "norm_roundings_max",
    ): "tests/contracts/test_precision.py::test_gate_sees_one_percent",
    (
        "precision.shadow",
        "loss_roundings_max",
    ): "tests/contracts/test_precision.py::test_gate_sees_one_percent",
    (
        "precision.shadow",
        "router_roundings_max",
    ): "tests/contracts/test_precision.py::test_gate_sees_one_path_in_half_precision",
    (
        "schedule.rate",
        "rel_error_max",
    ): "tests/contracts/test_schedule.py::test_rate_is_red_on_one_percent",
    (
        "model.dropout-law",
        "scale_rel_error_max",
    ): "tests/contracts/test_dropout.py::test_gate_sees_other_rates_and_shared_masks",
    (
        "optim.train-step",
        "report_rel_error_max",
    ): "tests/contracts/test_optim.py::test_train_step_is_red_on_a_report_that_is_one_percent_off",
    (
        "optim.train-step",
        "error_over_lr_max",
    ): "tests/contracts/test_optim.py::test_train_step_is_red_on_another_law",
    (
        "optim.train-step",
        "muon_rel_error_max",
    ): "tests/contracts/test_optim.py::test_train_step_is_red_on_another_law",
    (
        "loss.logit-gradient",
        "rel_error_max",
    ): "tests/contracts/test_token_loss.py::test_one_percent_of_a_weight_is_refused_but_in_half",
    (
        "loss.first",
        "reported_rel_error_max",
    ): "tests/contracts/test_token_loss.py::test_another_loss_than_that_of_the_logits_is_refused",
    (
        "model.training-forward",
        "rel_error_max",
    ): "tests/contracts/test_model.py::test_training_forward_sees_one_percent",
    (
        "optim.clip-norm",
        "rel_excess_max",
    ): "tests/contracts/test_strength.py::test_clip_norm_is_red_on_one_percent",
    (
        "optim.clip-norm",
        "rel_shortfall_max",
    ): "tests/contracts/test_strength.py::test_clip_norm_is_red_on_one_percent",
    ("export.logit-parity", "scaled_error_max"): "tests/contracts/test_export.py",
}
COUNTS = "counts events, steps, tokens or samples; nothing in it can be a percent off"
BITWISE = (
    "holds the output against the same output after a change that must not show; an error that "
    "both have is another gate's"
)
LEVEL = "is a level that a healthy run keeps far away from, not a comparison with what is right"
CLOSED_LOOP = "a closed loop that must end level"
SELECTS = "chooses what is judged; it judges nothing itself"
HALF = (
    "half precision rounds by about a percent; errors of a percent are for the float32 limit "
    "beside it"
)
NOT_SO = {
    ("optim.movement", "uphill_cosine_max"): LEVEL,
    ("optim.movement", "visible_lr_min"): SELECTS,
    **{
        ("optim.movement", name): COUNTS
        for name in (
            "changed_between_max",
            "changed_tensor_frac_min",
            "frozen_moved_max",
            "miscounted_max",
            "still_updates_max",
        )
    },
    ("schedule.rate", "epochs_without_tick_max"): COUNTS,
    ("schedule.rate", "micro_batches_off_min"): COUNTS,
    ("schedule.rate", "ticks_ahead_max"): COUNTS,
    ("schedule.rate", "zero_updates_max"): COUNTS,
    "loss.nan-visible": COUNTS,
    "model.init-law": (
        "compares a sample of draws with their law; its sharpness stands in the rates"
    ),
    ("loss.first", "abs_gap_nats_max"): LEVEL,
    ("loss.first", "over_random_nats_max"): LEVEL,
    ("loss.first", "half_reported_rel_error_max"): HALF,
    ("loss.logit-gradient", "half_rel_error_max"): HALF,
    ("loss.logit-gradient", "half_single_rel_error_max"): HALF,
    **{
        ("loss.logit-gradient", name): COUNTS
        for name in ("off_target_frac_max", "masked_learned_max", "changed_rows_max")
    },
    "model.causal": BITWISE,
    ("model.isolation", "leak_abs_max"): BITWISE,
    ("model.isolation", "regrouped_abs_max"): BITWISE,
    ("model.isolation", "gradient_abs_max"): BITWISE,
    ("model.isolation", "leak_rel_max"): BITWISE,
    ("model.isolation", "longer_rel_max"): BITWISE,
    ("model.reference-differential", "choice_margin_min"): SELECTS,
    ("model.reference-differential", "judged_frac_min"): SELECTS,
    ("model.reference-differential", "effect_min"): SELECTS,
    ("model.gradient", "choice_margin_min"): SELECTS,
    ("model.gradient", "judged_frac_min"): SELECTS,
    "model.overfit-one-batch": LEVEL,
    "optim.decay-groups": COUNTS,
    "model.attention-logits": LEVEL,
    "model.attention-entropy": LEVEL,
    "model.live-points": LEVEL,
    ("optim.reference-update", "muon_bf16_rel_error_max"): HALF,
    ("kernel.compiled-graph", "half_rel_error_max"): HALF,
    ("kernel.parity", "half_rel_error_max"): HALF,
    ("moe.balance", "even_error_max"): LEVEL,
    ("moe.balance", "uneven_excess_min"): LEVEL,
    ("moe.balance", "step_error_max"): "steps of one size, whose signs are compared exactly",
    ("moe.balance", "updates"): CLOSED_LOOP,
    ("moe.balance", "skew_left_max"): CLOSED_LOOP,
    "moe.router-collapse": LEVEL,
    ("precision.loss-scale", "rel_error_max"): HALF,
    "precision.declared": COUNTS,
    ("export.logit-parity", "float32_positions"): SELECTS,
    ("export.logit-parity", "argmax_differences_max"): COUNTS,
    (
        "sampling.distribution",
        "p_value_min",
    ): "a probability; two percentage points are seen: test_chi_square_sees_two_percent",
    ("sampling.distribution", "draws_min"): SELECTS,
    "sampling.coherence": LEVEL,
    "sampling.dominance": LEVEL,
    "sampling.memorised": LEVEL,
    "sampling.recitation": LEVEL,
    "sampling.loops": LEVEL,
    ("sampling.generation", "wrong_max"): COUNTS,
    ("sampling.generation", "margin_min"): SELECTS,
    ("sampling.generation", "judged_frac_min"): SELECTS,
    (
        "model.dropout-law",
        "rate_z_max",
    ): "standard errors of a share; twice the share is tried beside the factor",
    ("model.dropout-law", "likeness_max"): LEVEL,
    ("model.dropout-law", "entries_min"): SELECTS,
    "evaluation.held-out": LEVEL,
    ("evaluation.byte-conservation", "lost_bytes_max"): COUNTS,
    ("evaluation.invariance", "repeat_abs_max"): BITWISE,
    "evaluation.answers": COUNTS,
    ("evaluation.rescored", "half_rel_error_max"): HALF,
    "evaluation.plausible": LEVEL,
    ("model.traced", "logit_abs_max"): BITWISE,
    "moe.dropped-choices": LEVEL,
    "precision.whole-step": HALF,
    ("model.reference-differential", "half_rel_error_max"): HALF,
    "sampling.drawn": COUNTS,
    "evaluation.stop-rule": LEVEL,
    "evaluation.divergence": LEVEL,
    "evaluation.same-batches": COUNTS,
    "evaluation.overfit-onset": LEVEL,
    "evaluation.leaves-no-trace": COUNTS,
}


@pytest.mark.parametrize("wrong", [louder, flipped])
@pytest.mark.parametrize(("gate_id", "limit"), CASES)
def test_a_percent_and_a_sign_are_refused(spec, subject, gate_id, limit, wrong):
    verdict = call_check(spec.gates[gate_id], CASES[gate_id, limit](wrong, subject))
    assert verdict.outcome == "fail" and limit in spec.gates[gate_id].limits, verdict.measured


@pytest.mark.parametrize(("gate_id", "limit"), CASES)
def test_the_same_detour_without_an_error_is_green(spec, subject, gate_id, limit):
    """What is refused above is the error and not the way it came in."""
    verdict = call_check(spec.gates[gate_id], CASES[gate_id, limit](lambda x: x, subject))
    assert verdict.outcome == "pass", verdict.message


@pytest.mark.parametrize("factor", [1.01, 0.99, -1.0])
def test_clip_norm_is_red_on_one_percent(spec, factor):
    check = ClipNorm(limits_of(spec.gates["optim.clip-norm"]))
    assert check.observe(step_taken(grad_norm=4.0, clipped_grad_norm=1.0, max_grad_norm=1.0)).passed
    assert not check.observe(
        step_taken(grad_norm=4.0, clipped_grad_norm=factor, max_grad_norm=1.0)
    ).passed


def test_every_limit_is_tried_or_its_exemption_is_given(spec):
    """Gates that are for foreign trainers alone have plants of one percent and more in
    tests/contracts/callbacks.
    """
    asked = [
        g for g in spec.gates.values() if g.subsystem in SUBSYSTEMS and g.kinds != ("foreign",)
    ]
    all_limits = {(g.id, name) for g in asked for name in g.limits}
    exempt = {pair for pair in all_limits if pair in NOT_SO or pair[0] in NOT_SO}
    assert set(CASES) | set(ELSEWHERE) | exempt == all_limits
    assert not set(CASES) & set(ELSEWHERE) and not (set(CASES) | set(ELSEWHERE)) & exempt
    assert {k if isinstance(k, str) else k[0] for k in NOT_SO} <= set(spec.gates)


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_the_tests_elsewhere_exist(test):
    path, _, name = test.partition("::")
    functions = Repo(ROOT).python_functions(path)
    assert functions and (not name or name in functions)
