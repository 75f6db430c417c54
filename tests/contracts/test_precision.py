"""The gate of half precision: green on the stack and on a second implementation, red on its plants
and on every path in half precision.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stackproof.config import AdamW, LayerNorm, MixtureOfExperts
from stackproof.contracts.gate import call_check
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.precision import SCALES
from stackproof.contracts.subject import Declared, HalfPrecision, Subject
from stackproof.kernels import eager
from stackproof.model import norm
from stackproof.museum.plant import load_museum, swap, touches
from stackproof.spec.gates import Gate
from stackproof.subject.assemble import subject_of
from stackproof.train import state
from tests.subjects import altered, changed, with_trainees

GATE = "precision.shadow"
CPU = torch.device("cpu")
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EXPERTS = {"ffn": MixtureOfExperts(n_experts=8, top_k=2)}


def in_half(cfg, dtype, **model):
    train, model = cfg.train.model_copy(update={"dtype": dtype}), cfg.model.model_copy(update=model)
    return cfg.model_copy(update={"train": train, "model": model})


@pytest.mark.parametrize(
    "changes", [{}, {"norm": LayerNorm()}, EXPERTS], ids=["plain", "layernorm", "experts"]
)
@pytest.mark.parametrize("dtype", HALVES)
def test_gate_is_green_on_the_stack(spec, small_cfg, dataset, dtype, changes):
    subject = subject_of(in_half(small_cfg, dtype, **changes), dataset, CPU)
    verdict = call_check(spec.gates[GATE], subject)
    assert verdict.outcome == "pass", verdict.message
    measured = verdict.measured
    # measured 6.6e-3 and 8.5e-5
    assert 0 < measured["norm_roundings"] < 0.01 and 0 < measured["loss_roundings"] < 1e-3
    assert (0 < measured["router_roundings"] < 1e-3) == (changes is EXPERTS)  # measured 2.7e-4


@pytest.mark.parametrize("plant_id", ["precision.norm-in-half", "precision.loss-in-half"])
def test_gate_is_red_on_its_plants_and_nothing_else_is(spec, small_cfg, dataset, plant_id):
    gate, before = spec.gates[GATE], touches()
    with load_museum()[plant_id].apply():
        subject = subject_of(in_half(small_cfg, "bfloat16"), dataset, CPU)
        verdict = call_check(gate, subject)
        others = [
            "loss.golden",
            "loss.partition-equivalence",
            "model.reference-differential",
            "model.gradient",
            "model.isolation",
        ]
        assert all(call_check(spec.gates[gate_id], subject).passed for gate_id in others)
    assert verdict.outcome == "fail" and touches() > before and plant_id in gate.plants
    red = [name for name, error in verdict.measured.items() if name != "rounding" and error > 0.1]
    assert red == [f"{plant_id.split('.')[1].split('-')[0]}_roundings"]


def by_hand(small_cfg, dtype, **wrong):
    """The subject of a second implementation, of which some parts are computed otherwise."""
    half = HALVES[dtype]

    class ByHand(HalfPrecision):
        dtype = half

        def norm(self, x, gain):
            wide = x.float()
            return (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain).to(x.dtype)

        def route(self, logits, top_k):
            probs = logits.float().softmax(-1)
            weights, experts = probs.topk(top_k)
            return experts, weights / weights.sum(-1, keepdim=True), probs

        def loss(self, x, head, labels):
            logits = (x.to(half) @ head.to(half).T)[0].float()
            return F.cross_entropy(logits, labels[0], reduction="sum")

    declared = Declared()
    declared.architecture = in_half(small_cfg, "bfloat16", **EXPERTS).model.model_dump()
    subject = Subject(declared=declared, half_precision=ByHand())
    return changed(subject, half_precision=wrong)


def rounded_before_its_gain(x, gain):
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * gain.to(
        x.dtype
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_gate_is_green_on_a_second_implementation(spec, small_cfg, dtype):
    assert call_check(spec.gates[GATE], by_hand(small_cfg, dtype)).passed
    verdict = call_check(spec.gates[GATE], by_hand(small_cfg, dtype, norm=rounded_before_its_gain))
    assert verdict.passed and verdict.measured["norm_roundings"] < 0.028  # measured 0.025


def everything_in_half(half):
    def rms(x, gain):
        return (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain.to(x.dtype)).to(
            x.dtype
        )

    def under_autocast(x, gain):
        return rms(x.to(half), gain).to(x.dtype)

    def factor(x, gain):
        return (
            x
            * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype)
            * gain.to(x.dtype)
        )

    def route(logits, top_k):
        probs = logits.softmax(-1)
        weights, experts = probs.topk(top_k)
        return experts, weights / weights.sum(-1, keepdim=True), probs

    def weights_alone(logits, top_k):
        probs = logits.float().softmax(-1)
        weights, experts = probs.topk(top_k)
        return experts, (weights / weights.sum(-1, keepdim=True)).to(half), probs

    def logits_kept(x, head, labels):
        return F.cross_entropy((x.to(half) @ head.to(half).T)[0], labels[0], reduction="sum")

    def sum_alone(x, head, labels):
        return (
            F.cross_entropy((x.to(half) @ head.to(half).T)[0].float(), labels[0], reduction="none")
            .to(half)
            .sum()
        )

    return {
        "norm": (rms, under_autocast, factor),
        "route": (route, weights_alone),
        "loss": (logits_kept, sum_alone),
    }


@pytest.mark.parametrize(
    "part, number",
    [(part, i) for part, wrong in everything_in_half(None).items() for i in range(len(wrong))],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_gate_sees_one_path_in_half_precision(spec, small_cfg, dtype, part, number):
    wrong = {part: everything_in_half(HALVES[dtype])[part][number]}
    verdict = call_check(spec.gates[GATE], by_hand(small_cfg, dtype, **wrong))
    name = {"route": "router"}.get(part, part)
    assert verdict.outcome == "fail" and name in verdict.message
    assert (
        verdict.measured[f"{name}_roundings"]
        > 5 * spec.gates[GATE].limits[f"{name}_roundings_max"].value
    )


@pytest.mark.parametrize("part", ["norm", "loss"])
@pytest.mark.parametrize("dtype", HALVES)
def test_gate_sees_one_percent(spec, small_cfg, dtype, part):
    honest = getattr(by_hand(small_cfg, dtype).half_precision, part)
    louder = by_hand(small_cfg, dtype, **{part: lambda *given: 1.01 * honest(*given)})
    verdict = call_check(spec.gates[GATE], louder)
    assert verdict.outcome == "fail"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gate_is_red_on_what_is_no_number(spec, small_cfg, value):
    broken = by_hand(small_cfg, "float16", loss=lambda x, head, labels: torch.tensor(value))
    assert call_check(spec.gates[GATE], broken).outcome == "fail"


def test_the_path_that_trains_is_judged(spec, small_cfg, dataset):
    """With gradients wanted, the norm takes another way than without."""
    told = subject_of(in_half(small_cfg, "bfloat16"), dataset, CPU)
    with swap(eager, "_normalised", lambda x, weight, eps: (torch.zeros_like(x), x[..., :1])):
        assert call_check(spec.gates[GATE], told).outcome == "fail"
    before = touches()
    with swap(
        norm.RMSNorm,
        "forward",
        lambda self, x: eager._RMSNorm.apply(x.float(), self.weight, self.eps).to(x.dtype),
    ):
        assert call_check(spec.gates[GATE], told).passed and touches() == before + 2


def test_gate_is_absent_in_float32(spec, small_cfg, subject):
    assert GATE not in Gatekeeper(spec, config=small_cfg.to_dict()).states
    assert call_check(spec.gates[GATE], subject).outcome == "not_run"
    for dtype in HALVES:
        assert GATE in Gatekeeper(spec, config=in_half(small_cfg, dtype).to_dict()).states
    assert spec.gates[GATE].normative()["when"] == {"train.dtype": ["bfloat16", "float16"]}


def test_a_choice_of_configurations_needs_one_for_the_museum(spec):
    gate = spec.gates[GATE].model_dump()
    for museum in ({}, {"train.dtype": "float32"}):
        with pytest.raises(ValueError, match="museum must hold one of the values"):
            Gate.model_validate(gate | {"museum": museum})


def run_in(dtype, cfg, dataset):
    """The subject of a run in another precision."""
    return subject_of(in_half(cfg, dtype), dataset, CPU)


def test_loss_scale_is_green_on_the_stack(spec, small_cfg, dataset):
    verdict = call_check(spec.gates["precision.loss-scale"], run_in("float16", small_cfg, dataset))
    # measured 8.2e-7 over three seeds
    assert verdict.passed and verdict.measured["rel_error"] < 1e-3


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_loss_scale_is_red_on_its_plant(spec, small_cfg, dataset, kind):
    """With Muon the scaler divides in its step, with fused AdamW the optimizer itself: the clip has
    seen the scaled norm in both.
    """
    gate = spec.gates["precision.loss-scale"]
    optim = small_cfg.optim if kind == "muon" else AdamW(lr=3e-3, max_grad_norm=0.5)
    subject = run_in("float16", small_cfg.model_copy(update={"optim": optim}), dataset)
    assert call_check(gate, subject).passed
    with load_museum()["precision.unscale-left-out"].apply():
        verdict = call_check(gate, subject)
    assert verdict.outcome == "fail" and verdict.measured["rel_error"] > 10


@pytest.mark.parametrize("field", ["grad_norm", "clipped_grad_norm"])
def test_loss_scale_is_red_on_a_few_percent(spec, small_cfg, dataset, field):
    """Of the norm before clipping or of the one after it, where the scale is the larger one."""

    def dependent(options):
        trainee = honest.training.trainee(options)
        factor = 1.03 if options.loss_scale == SCALES[1] else 1.0

        def step(batches):
            report = trainee.step(batches)
            return replace(report, **{field: factor * getattr(report, field)})

        return altered(trainee, step=step)

    honest = run_in("float16", small_cfg, dataset)
    off = changed(honest, training={"trainee": dependent})
    assert call_check(spec.gates["precision.loss-scale"], off).outcome == "fail"


def test_loss_scale_is_for_float16_alone(spec, small_cfg):
    seats = [
        Gatekeeper(spec, config=in_half(small_cfg, dtype).to_dict()).states
        for dtype in ("bfloat16", "float16")
    ]
    assert ["precision.loss-scale" in s for s in seats] == [False, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_declared_is_two_sided(spec, small_cfg, dataset, dtype, monkeypatch):
    """Half precision is entered where it is declared and nowhere else; one layer that computes
    otherwise is enough.
    """
    gate, subject = spec.gates["precision.declared"], run_in(dtype, small_cfg, dataset)
    verdict = call_check(gate, subject)
    assert verdict.outcome == "pass" and verdict.measured["layers"] == 14

    def one_odd(options=None):
        trainee = subject.training.trainee()
        layer = trainee.model.get_submodule("layers.1.ffn.up")
        layer.register_forward_hook(lambda module, inputs, output: output.double())
        return trainee

    odd = call_check(gate, changed(subject, training={"trainee": one_odd}))
    assert odd.outcome == "fail" and odd.measured["odd"] >= 1
    assert "layers.1.ffn.up in float64" in odd.message
    unseen = with_trainees(subject, step=lambda trainee: lambda batches: None)
    assert call_check(gate, unseen).outcome == "fail", "no layer ran"
    other = {"float32": torch.bfloat16, "bfloat16": None}[dtype]
    monkeypatch.setitem(state.AUTOCAST, dtype, other)
    assert call_check(gate, subject).measured["odd"] == 14


# --- the whole step -------------------------------------------------------------------------------

WHOLE = "precision.whole-step"


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["plain", "experts"])
@pytest.mark.parametrize("dtype", HALVES)
def test_whole_step_is_green_on_the_stack(spec, small_cfg, dataset, dtype, changes):
    subject = subject_of(in_half(small_cfg, dtype, **changes), dataset, CPU)
    verdict = call_check(spec.gates[WHOLE], subject)
    assert verdict.outcome == "pass", verdict.message
    measured = verdict.measured
    kind = "routed_rel_error" if changes else "gradient_rel_error"
    assert 1e-5 < measured[kind] < spec.gates[WHOLE].limits[kind + "_max"].value / 2
    assert 0 < measured["loss_rel_error"] < 1e-4 and 0 < measured["evaluation_rel_error"] < 1e-3


@pytest.mark.parametrize(
    ("plant_id", "of"),
    [
        ("precision.rotation-lost-in-half", "gradient_rel_error"),
        ("precision.labels-shifted-in-half", "gradient_rel_error"),
        ("precision.evaluation-in-half", "evaluation_rel_error"),
    ],
)
def test_whole_step_is_red_on_its_plants(spec, small_cfg, dataset, plant_id, of):
    gate, before = spec.gates[WHOLE], touches()
    with load_museum()[plant_id].apply():
        subject = subject_of(in_half(small_cfg, "bfloat16"), dataset, CPU)
        verdict = call_check(gate, subject)
    assert verdict.outcome == "fail" and touches() > before and plant_id in gate.plants
    assert verdict.measured[of] > 2 * gate.limits[of + "_max"].value


def test_whole_step_is_red_where_evaluations_are_computed_in_float32(spec, small_cfg, dataset):
    """The step itself is in half precision; the two held-out losses are then one number."""
    with load_museum()["precision.evaluation-in-float32"].apply():
        verdict = call_check(
            spec.gates[WHOLE], subject_of(in_half(small_cfg, "bfloat16"), dataset, CPU)
        )
    assert verdict.outcome == "fail" and "equals that in float32" in verdict.message
    assert verdict.measured["evaluation_rel_error"] == 0


def test_whole_step_sees_one_lost_gradient(spec, small_cfg, dataset):
    subject = subject_of(in_half(small_cfg, "bfloat16"), dataset, CPU)

    class Forgetful(type(subject.training.trainee())):
        def accumulate(self, batches):
            nats = super().accumulate(batches)
            if self.state.cfg.train.dtype == "bfloat16":
                self.model.layers[0].ffn.down.weight.grad = None
            return nats

    subject = changed(
        subject, training={"trainee": lambda *o: Forgetful(subject.training.build(*o))}
    )
    verdict = call_check(spec.gates[WHOLE], subject)
    assert verdict.outcome == "fail" and verdict.measured["worst"] == "layers.0.ffn.down.weight"
    assert verdict.measured["gradient_rel_error"] == float("inf")
