"""Gates of mixtures of experts: green on a second implementation, red on every plant in the stack,
and sharp enough to see small errors.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stackproof.config import ModelConfig
from stackproof.contracts import expert_choices
from stackproof.contracts.events import Started
from stackproof.contracts.expert_choices import DroppedChoices, RouterCollapse
from stackproof.contracts.gate import call_check, limits_of
from stackproof.contracts.subject import MicroBatch
from stackproof.model.build import build_model
from stackproof.model.moe import dropped_fracs
from stackproof.museum.plant import load_museum, swap, touches
from stackproof.subject.assemble import subject_of
from tests.contracts import experts, variants
from tests.contracts.test_optim import step_taken
from tests.subjects import changed

SIZES = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "max_seq_len": 64,
    "dropout": 0.1,
}
AUXILIARY, BIASED = {"kind": "moe"}, {"kind": "moe", "balance": {"kind": "selection-bias"}}
JUDGED = [
    ("moe.dispatch-parity", BIASED),
    ("moe.balance", AUXILIARY),
    ("moe.balance", BIASED),
]
SHAPES = [
    {},
    {"n_experts": 4, "capacity_factor": 1.0},
    {"n_experts": 3, "top_k": 1, "expert": {"kind": "gelu"}},
    {"n_experts": 2, "top_k": 1},
    {"n_experts": 64, "top_k": 6},
]


def declared(ffn):
    return ModelConfig(**SIZES, ffn=ffn).model_dump()


def judged(spec, gate_id, ffn, training=None, **changes):
    """`changes` are members of the experts, or their functions."""
    subject = experts.subject_of(declared(ffn))
    members = {name: changes.pop(name) for name in ("layer", "model") if name in changes}
    members["functions"] = SimpleNamespace(**vars(variants) | changes) if changes else variants
    subject = changed(subject, experts=members, training=training or {})
    return call_check(spec.gates[gate_id], subject)


def plants_of(*gate_ids):
    return [p.id for p in load_museum().values() if p.gate in gate_ids]


@pytest.mark.parametrize(("gate_id", "ffn"), JUDGED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_preflight_gate_is_green_on_a_second_implementation(spec, gate_id, ffn, shape):
    verdict = judged(spec, gate_id, ffn | shape)
    assert verdict.outcome == "pass", verdict.message


@pytest.mark.parametrize("gate_id", ["moe.dispatch-parity", "moe.balance"])
def test_a_model_without_experts_is_not_run(spec, gate_id):
    verdict = judged(spec, gate_id, {"kind": "swiglu"})
    assert verdict.outcome == "not_run" and "model.ffn.kind" in verdict.message


def test_balance_of_a_kind_without_a_rule_is_not_run(spec):
    a = declared(AUXILIARY)
    a["ffn"]["balance"] = {"kind": "by-hand"}
    verdict = call_check(spec.gates["moe.balance"], experts.subject_of(a))
    assert verdict.outcome == "not_run" and "model.ffn.balance.kind is by-hand" in verdict.message


def test_balance_measures_what_its_declared_kind_has(spec):
    term, bias = (judged(spec, "moe.balance", ffn).measured for ffn in (AUXILIARY, BIASED))
    assert {"formula_rel_error", "entry_rel_error"} <= term.keys()
    assert {"step_error_over_rate", "skew_after"} <= bias.keys() and not term.keys() & bias.keys()


def test_biases_of_experts_that_are_all_chosen_are_not_judged(spec):
    verdict = judged(spec, "moe.balance", BIASED | {"n_experts": 2, "top_k": 2})
    assert verdict.outcome == "not_run" and "every token" in verdict.message


@pytest.mark.parametrize("plant_id", plants_of("moe.dispatch-parity", "moe.balance"))
def test_preflight_gate_is_red_on_its_plant(spec, small_cfg, dataset, plant_id):
    plant, before = load_museum()[plant_id], touches()
    term = plant.gate == "moe.balance" and not plant.museum
    model = ModelConfig(**SIZES, ffn=AUXILIARY if term else BIASED)
    cfg = small_cfg.model_copy(update={"model": model})

    def of_the_stack():
        return call_check(spec.gates[plant.gate], subject_of(cfg, dataset, torch.device("cpu")))

    with plant.apply():
        verdict = of_the_stack()
    assert verdict.outcome == "fail" and verdict.message and touches() > before
    assert plant.id in spec.gates[plant.gate].plants
    assert of_the_stack().passed, "the plant leaves nothing behind"


# --- dispatch -------------------------------------------------------------------------------------


def test_dispatch_sees_one_percent(spec):
    def louder(*inputs):
        y_RD, load_E, dropped = variants.dispatch(*inputs)
        return y_RD * 1.01, load_E, dropped

    verdict = judged(spec, "moe.dispatch-parity", BIASED, dispatch=louder)
    limit = spec.gates["moe.dispatch-parity"].limits["rel_error_max"].value
    assert (
        verdict.outcome == "fail"
        and verdict.measured["rel_error"] == pytest.approx(0.01)
        and verdict.measured["layer_rel_error"] < limit / 1e6
    )


def test_dispatch_sees_ties_that_go_to_the_higher_id(spec):
    def backwards(logits_RE, top_k, bias_E):
        bias_E = None if bias_E is None else bias_E.flip(0)
        experts_Rk, weights_Rk, probs_RE = variants.route(logits_RE.flip(1), top_k, bias_E)
        return logits_RE.shape[1] - 1 - experts_Rk, weights_Rk, probs_RE.flip(1)

    verdict = judged(spec, "moe.dispatch-parity", BIASED, route=backwards)
    assert (
        verdict.outcome == "fail"
        and verdict.measured["swapped"] > 100
        and "lower of equals" in verdict.message
    )


@pytest.mark.parametrize(
    "wrong", ["drops in evaluation", "no drops in training", "drops the first"]
)
def test_dispatch_sees_a_layer_that_drops_otherwise(spec, wrong):
    def other(self, x_BTD):
        if wrong == "drops the first":
            return original(self, x_BTD.flip(0, 1)).flip(0, 1)
        mode, self.training = self.training, wrong == "drops in evaluation"
        y_BTD = original(self, x_BTD)
        self.training = mode
        return y_BTD

    original = variants.MixtureOfExperts.forward
    with swap(variants.MixtureOfExperts, "forward", other):
        verdict = judged(spec, "moe.dispatch-parity", BIASED | {"capacity_factor": 1.0})
    assert (
        verdict.outcome == "fail"
        and verdict.measured["layer_rel_error"] > 0.1
        and verdict.measured["rel_error"] < 1e-14
    )


@pytest.mark.parametrize("lost", [(0, 1), (1, 0)])
def test_dispatch_sees_wrong_counts(spec, lost):
    def miscounting(*inputs):
        y_RD, load_E, dropped = variants.dispatch(*inputs)
        return y_RD, load_E - lost[0], dropped + lost[1]

    assert "miscounted" in judged(spec, "moe.dispatch-parity", BIASED, dispatch=miscounting).message


def test_dispatch_refuses_weights_and_probabilities_that_are_nan(spec):
    def of_nan(logits_RE, top_k, bias_E):
        experts_Rk, weights_Rk, probs_RE = variants.route(logits_RE, top_k, bias_E)
        return experts_Rk, weights_Rk * math.nan, probs_RE * math.nan

    verdict = judged(spec, "moe.dispatch-parity", BIASED, route=of_nan)
    assert verdict.outcome == "fail" and "weights are not the declared ones" in verdict.message
    assert verdict.measured["weight_error"] == verdict.measured["sum_error"] == math.inf


# --- balance --------------------------------------------------------------------------------------


def test_balance_is_red_when_it_enters_once_per_micro_batch(spec):
    class Hasty(experts.SecondTrainee):
        def accumulate(self, batches):
            self.model.a["ffn"]["balance"]["weight"] *= len(batches)
            return super().accumulate(batches)

    verdict = judged(spec, "moe.balance", AUXILIARY, training={"trainee_of": Hasty})
    assert verdict.outcome == "fail" and verdict.measured["entry_rel_error"] == pytest.approx(
        3, rel=1e-3
    )


def test_balance_sees_one_percent(spec):
    def louder(weight):
        return experts.SecondExperts(declared(AUXILIARY)).model(weight * 1.01)

    entry = judged(spec, "moe.balance", AUXILIARY, model=louder)
    assert entry.outcome == "fail" and entry.measured["entry_rel_error"] == pytest.approx(
        0.01, rel=1e-2
    )
    value = judged(
        spec, "moe.balance", AUXILIARY, balance=lambda *inputs: variants.balance(*inputs) * 1.01
    )
    assert value.outcome == "fail" and value.measured["even_error"] == pytest.approx(0.01)


def test_balance_refuses_one_that_prefers_the_uneven(spec):
    verdict = judged(
        spec, "moe.balance", AUXILIARY, balance=lambda *inputs: 2 - variants.balance(*inputs)
    )
    assert (
        verdict.outcome == "fail"
        and verdict.measured["uneven_excess"] < 0
        and verdict.measured["even_error"] < 1e-12
    )


@pytest.mark.parametrize("call", [1, 2, 3, 5, 20, 30])
def test_balance_refuses_a_term_that_is_nan_in_any_call(spec, call):
    calls = iter(range(1, 1000))

    def once_nan(*inputs):
        return variants.balance(*inputs) * (math.nan if next(calls) == call else 1.0)

    assert judged(spec, "moe.balance", AUXILIARY, balance=once_nan).outcome == "fail"
    assert next(calls) > call


# --- bias -----------------------------------------------------------------------------------------


def test_bias_is_red_when_only_the_last_micro_batch_counts(spec):
    class Forgetful(experts.SecondTrainee):
        def mean_loss(self, batch):
            self.loads_LE = 0
            return super().mean_loss(batch)

    verdict = judged(spec, "moe.balance", BIASED, training={"trainee_of": Forgetful})
    assert verdict.outcome == "fail" and verdict.measured["step_error_over_rate"] == pytest.approx(
        2
    )


def test_bias_loop_is_red_when_nothing_moves(spec):
    verdict = judged(
        spec, "moe.balance", BIASED, update_selection_bias=lambda model, loads_LE, rate: None
    )
    assert (
        verdict.outcome == "fail"
        and verdict.measured["skew_after"] == verdict.measured["skew_before"] > 1
    )


def test_bias_refuses_steps_that_are_nan_under_accumulation_alone(spec):
    class Broken(experts.SecondTrainee):
        def update(self, batches):
            nats = super().update(batches)
            if len(batches) > 1:
                for name, bias_E in self.model.named_buffers():
                    if name.endswith("selection_bias"):
                        bias_E.fill_(math.nan)
            return nats

    verdict = judged(spec, "moe.balance", BIASED, training={"trainee_of": Broken})
    assert verdict.outcome == "fail" and verdict.measured["step_error_over_rate"] == math.inf


def test_bias_refuses_loads_that_show_nothing(spec):
    def even(logits_RE, top_k, bias_E):
        """Token after token, the next experts in turn."""
        n_tokens, n_experts = logits_RE.shape
        experts_Rk = torch.arange(n_tokens * top_k).view(n_tokens, top_k) % n_experts
        return experts_Rk, None, None

    verdict = judged(spec, "moe.balance", BIASED, route=even)
    assert verdict.outcome == "fail" and "show nothing" in verdict.message


# --- collapse -------------------------------------------------------------------------------------

EVEN = (0.25, 0.25, 0.25, 0.25)
CROWDED, IDLE = (0.97, 0.01, 0.01, 0.01), (0.33, 0.33, 0.335, 0.005)
ALMOST = ((0.8, 0.06, 0.07, 0.07), (0.33, 0.33, 0.32, 0.02))


def watcher(spec, **plan) -> RouterCollapse:
    check = RouterCollapse(limits_of(spec.gates["moe.router-collapse"]))
    plan = {"warmup_steps": 10, "expert_layers": 2, "n_experts": 4, "top_k": 1} | plan
    assert check.observe(Started(0, plan)) is None
    return check


def seen(check, steps, *shares):
    return [check.observe(replace(step_taken(step=step), expert_shares=shares)) for step in steps]


@pytest.mark.parametrize("shares, state", [(CROWDED, "crowded"), (IDLE, "idle")])
def test_collapse_is_red_on_a_crowded_and_on_an_idle_expert(spec, shares, state):
    check = watcher(spec)
    allowed = int(check.limits.steps_max)
    assert all(v.passed for v in seen(check, range(1, 11 + allowed), EVEN, shares))
    verdict = seen(check, [11 + allowed], EVEN, shares)[0]
    assert verdict.outcome == "fail" and state in verdict.message and "layer 1" in verdict.message
    assert verdict.measured["steps"] == allowed + 1


def test_collapse_leaves_what_is_inside_the_band(spec):
    assert all(v.passed for v in seen(watcher(spec), range(1, 600), *ALMOST))


def test_collapse_needs_steps_in_a_row(spec):
    check = watcher(spec)
    for first in range(11, 1200, 200):
        assert all(v.passed for v in seen(check, range(first, first + 199), IDLE, EVEN))
        assert seen(check, [first + 199], EVEN, EVEN)[0].measured["steps"] == 0


def test_collapse_counts_an_expert_that_takes_all_with_several_choices(spec):
    check = watcher(spec, top_k=2)
    # of two choices per token, so 96 % of the tokens visit the first
    busy = (0.48, 0.18, 0.17, 0.17)
    assert seen(check, range(11, 400), EVEN, busy)[-1].outcome == "fail"


def test_collapse_goes_on_over_a_resume(spec):
    check = watcher(spec)
    half = int(check.limits.steps_max) // 2
    seen(check, range(11, 11 + half), EVEN, IDLE)
    resumed = watcher(spec)
    resumed.load_state_dict(check.state_dict())
    later = range(11 + half, 12 + int(check.limits.steps_max))
    whole, continued = seen(check, later, EVEN, IDLE), seen(resumed, later, EVEN, IDLE)
    assert whole == continued and [v.outcome for v in continued].count("fail") == 1


def test_collapse_refuses_steps_without_shares(spec):
    for shares in ((), (EVEN,), (EVEN, EVEN[:3])):
        assert "no shares" in seen(watcher(spec), [1], *shares)[0].message
    assert seen(watcher(spec), range(11, 400), EVEN, (float("nan"),) * 4)[-1].outcome == "fail"


def test_collapse_is_not_run_without_a_choice(spec):
    assert seen(watcher(spec, expert_layers=0, n_experts=0, top_k=0), [1])[0].outcome == "not_run"
    assert seen(watcher(spec, top_k=4), [1], EVEN, EVEN)[0].outcome == "not_run"


def test_collapse_is_red_under_its_plant(spec):
    model = build_model(ModelConfig(**SIZES, ffn=AUXILIARY), 61, seed=3)
    ids_BT = torch.randint(0, 61, (8, 64), generator=torch.Generator().manual_seed(1))
    check = watcher(spec, n_experts=8, top_k=2)
    with load_museum()["moe.router-reads-the-mean"].apply(), torch.no_grad():
        loads = model.hidden_states(ids_BT)[1].loads
    shares = [tuple((load.load_E / load.load_E.sum()).tolist()) for load in loads]
    assert seen(check, range(11, 400), *shares)[-1].outcome == "fail"
    assert seen(check, [400], *shares)[0].measured["busiest_frac"] == 1.0


# --- the rows of a run, and what is dropped -------------------------------------------------------


def of_the_run(small_cfg, dataset, ffn, **train):
    cfg = small_cfg.model_copy(update={"model": ModelConfig(**SIZES, ffn=ffn)})
    train = cfg.train.model_copy(update=train)
    return subject_of(cfg.model_copy(update={"train": train}), dataset, torch.device("cpu"))


@pytest.mark.parametrize("ffn", [AUXILIARY, BIASED, AUXILIARY | {"capacity_factor": 0.75}], ids=str)
@pytest.mark.parametrize(
    "train", [{}, {"dtype": "bfloat16"}, {"activation_checkpointing": "blocks"}], ids=str
)
def test_run_choices_is_green_on_the_stack(spec, small_cfg, dataset, ffn, train):
    verdict = call_check(
        spec.gates["moe.run-choices"], of_the_run(small_cfg, dataset, ffn, **train)
    )
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured["strangers"] == 0 and verdict.measured["padding_rel_error"] < 1e-6


@pytest.mark.parametrize("plant_id", plants_of("moe.run-choices"))
def test_run_choices_is_red_on_its_plants(spec, small_cfg, dataset, plant_id):
    gate, before, plant = spec.gates["moe.run-choices"], touches(), load_museum()[plant_id]
    factor = plant.museum.get("model.ffn.capacity_factor")
    with plant.apply():
        subject = of_the_run(small_cfg, dataset, AUXILIARY | {"capacity_factor": factor})
        verdict = call_check(gate, subject)
    assert verdict.outcome == "fail" and touches() > before and plant.id in gate.plants


def test_run_choices_counts_padding_that_a_router_reads(spec, small_cfg, dataset):
    subject = of_the_run(small_cfg, dataset, AUXILIARY)

    class Padded(type(subject.training.trainee())):
        def draw(self):
            (batch, *_), n = super().draw(), 10
            padding = torch.arange(batch.input_ids.shape[1]) >= batch.input_ids.shape[1] - n
            labels = batch.labels.where(~padding, -100)
            documents = torch.where(padding, -1, 0).expand_as(labels)
            return [MicroBatch(batch.input_ids, labels, documents)]

    subject = changed(subject, training={"trainee": lambda: Padded(subject.training.build())})
    assert call_check(spec.gates["moe.run-choices"], subject).passed
    with load_museum()["moe.padding-routed"].apply():
        verdict = call_check(spec.gates["moe.run-choices"], subject)
    rows = len(subject.training.trainee().draw()[0].input_ids)
    assert verdict.measured["strangers"] == 2 * 10 * rows  # in both layers
    assert "experts read" in verdict.message


@pytest.mark.parametrize("factor", [1.01, 0.99, -1.0])
def test_run_choices_sees_one_percent(spec, small_cfg, dataset, monkeypatch, factor):
    """Of the reported shares and drops, and of the balance term of a padded row."""
    subject = of_the_run(small_cfg, dataset, AUXILIARY | {"capacity_factor": 0.75})

    class Louder(type(subject.training.trainee())):
        def step(self, batches):
            report = super().step(batches)
            return replace(report, **{self.name: scaled(getattr(report, self.name))})

    def scaled(values):
        return tuple(scaled(v) if isinstance(v, tuple) else factor * v for v in values)

    for Louder.name in ("expert_shares", "dropped_choice_fracs"):
        trainee = {"trainee": lambda: Louder(subject.training.build())}
        verdict = call_check(spec.gates["moe.run-choices"], changed(subject, training=trainee))
        assert verdict.outcome == "fail", Louder.name
    gradients = expert_choices.router_gradients

    def of_padding(subject, weight, batches):
        weights, found = gradients(subject, weight, batches)
        padded = batches[0].document_ids is not None and (batches[0].document_ids < 0).any()
        return weights, {n: factor * g if padded else g for n, g in found.items()}

    monkeypatch.setattr(expert_choices, "router_gradients", of_padding)
    verdict = call_check(spec.gates["moe.run-choices"], subject)
    assert verdict.outcome == "fail" and "padding" in verdict.message


def drops(spec, factor=1.0) -> DroppedChoices:
    check = DroppedChoices(limits_of(spec.gates["moe.dropped-choices"]))
    plan = {"warmup_steps": 10, "expert_layers": 2, "capacity_factor": factor}
    assert check.observe(Started(0, plan)) is None
    return check


def dropping(check, steps, *fracs):
    return [
        check.observe(replace(step_taken(step=step), dropped_choice_fracs=fracs)) for step in steps
    ]


def test_drops_are_two_sided(spec):
    assert dropping(drops(spec, None), [1], 0.0, 0.0)[0].passed
    assert dropping(drops(spec, None), [1], 0.0, 1e-9)[0].outcome == "fail"
    assert "no dropped choices" in dropping(drops(spec, None), [1], 0.0)[0].message
    for factor, allowed in ((1.0, 0.5), (2.0, 0.5), (0.5, 0.75)):
        assert all(v.passed for v in dropping(drops(spec, factor), range(11, 500), 0.0, allowed))
        verdict = dropping(drops(spec, factor), range(11, 500), 0.0, allowed + 0.01)[-1]
        assert verdict.outcome == "fail" and "layer 1" in verdict.message
    assert dropping(drops(spec), range(11, 400), 0.0, float("nan"))[-1].outcome == "fail"


def test_drops_need_steps_in_a_row(spec):
    check = drops(spec)
    allowed = int(check.limits.steps_max)
    assert all(v.passed for v in dropping(check, range(1, 11 + allowed), 0.9, 0.0))
    resumed = drops(spec)
    resumed.load_state_dict(check.state_dict())
    assert dropping(resumed, [11 + allowed], 0.9, 0.0)[0].outcome == "fail"
    assert dropping(check, [11 + allowed], 0.0, 0.0)[0].measured["steps"] == 0


def test_drops_are_red_under_their_plant(spec):
    model = build_model(ModelConfig(**SIZES, ffn=AUXILIARY), 61, seed=3)
    ids_BT = torch.randint(0, 61, (8, 64), generator=torch.Generator().manual_seed(1))
    with load_museum()["moe.drops-undeclared"].apply(), torch.no_grad():
        fracs = dropped_fracs([model.hidden_states(ids_BT)[1].loads]).tolist()
    assert dropping(drops(spec, None), [1], *fracs)[0].outcome == "fail"
    assert dropped_fracs([]).tolist() == []
