"""Gates of the optimizer: green on the stack, red on what they are for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stackproof.config import AdamW, MixtureOfExperts, Muon
from stackproof.contracts import optim as optim_checks
from stackproof.contracts.callbacks.subject import ForeignTraining, foreign_subject
from stackproof.contracts.events import StepTaken
from stackproof.contracts.gate import call_check, limits_of
from stackproof.contracts.optim import ClipNorm, Move, move_error
from stackproof.contracts.subject import Subject
from stackproof.contracts.update_rules import RULES
from stackproof.museum import script
from stackproof.museum.plant import load_museum
from stackproof.subject.assemble import subject_of
from stackproof.train.optimizer import Muon as OurMuon
from tests.subjects import changed, with_trainees


def step_taken(**changes) -> StepTaken:
    """A healthy step, changed where a test wants it."""
    values = {
        "step": 1,
        "loss_nats": 5.0,
        "grad_norm": 3.0,
        "clipped_grad_norm": 1.0,
        "max_grad_norm": 1.0,
        "lr": 1e-3,
        "n_valid_tokens": 100,
        "n_expected_tokens": 100,
        "tokens_seen": 100,
        "wall_s": 0.1,
        "flops": 1e9,
        "peak_flops": 1e11,
    }
    return StepTaken(**values | changes)


GROUPS = "optim.parameter-groups"


def test_groups_are_green_on_the_stack(spec, subject):
    verdict = call_check(spec.gates[GROUPS], subject)
    assert verdict.outcome == "pass", verdict.message
    named = list(subject.training.module.named_parameters())
    assert verdict.measured["owned"] == len(named)
    assert verdict.measured["judged"] == "ownership, laws, movement"


def test_groups_measure_which_parts_were_judged(spec, subject):
    """A live model and its optimizer, without laws and trainees, are judged for ownership alone."""
    model = torch.nn.Linear(3, 2)
    live = foreign_subject(model, torch.optim.SGD(model.parameters(), lr=0.1))
    verdict = call_check(spec.gates[GROUPS], live)
    assert verdict.passed and verdict.measured["judged"] == "ownership"
    without = call_check(spec.gates[GROUPS], foreign_subject(model))
    assert without.outcome == "not_run" and "no optimizer" in without.message


def test_groups_see_what_is_missing_twice_or_strange(spec, subject):
    first, *rest = subject.training.optimizer.param_groups
    for params, measured in (
        (first["params"][:-1], "missing"),
        ([*first["params"], rest[0]["params"][0]], "twice"),
        ([*first["params"], torch.nn.Parameter(torch.ones(2))], "strangers"),
    ):
        optimizer = SimpleNamespace(param_groups=[first | {"params": params}, *rest])
        verdict = call_check(
            spec.gates[GROUPS], changed(subject, training={"optimizer": optimizer})
        )
        assert verdict.outcome == "fail" and verdict.measured[measured] == 1
        assert verdict.measured["judged"] == "ownership"


def test_groups_are_red_on_the_foreign_plant(spec):
    with load_museum()["optim.foreign-parameter-missing"].apply():
        verdict, _ = script.verdict_of(GROUPS)
    assert verdict.outcome == "fail" and verdict.measured["missing"] >= 1
    assert script.verdict_of(GROUPS)[0].passed


def test_groups_are_red_on_an_optimizer_that_owns_nothing(spec):
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    training = ForeignTraining(frozen, SimpleNamespace(param_groups=[]))
    verdict = call_check(spec.gates[GROUPS], Subject(training=training))
    assert verdict.outcome == "fail" and "owns no parameter" in verdict.message


def test_decay_groups_are_red_on_the_foreign_plant(spec):
    with load_museum()["optim.foreign-decay-on-norms"].apply():
        verdict, _ = script.verdict_of("optim.decay-groups")
    assert verdict.outcome == "fail" and verdict.measured["decayed_vectors"] >= 1
    assert script.verdict_of("optim.decay-groups")[0].passed


@pytest.mark.parametrize("plant_id", ["optim.decay-on-norms", "optim.no-decay"])
def test_decay_is_judged_where_biases_and_gains_decay(spec, subject, small_cfg, dataset, plant_id):
    """The gate of biases and gains is red on the first alone: no decay at all pulls none."""
    gate = spec.gates["optim.decay-groups"]
    assert call_check(gate, subject).passed
    with load_museum()[plant_id].apply():
        verdict = call_check(gate, under(small_cfg.optim, small_cfg, dataset))
    assert verdict.outcome == ("fail" if plant_id == "optim.decay-on-norms" else "pass")


def test_groups_see_a_dead_parameter(spec, subject):
    def with_dead_weight(options):
        trainee = subject.training.trainee(options)
        trainee.model.layers[0].unused = torch.nn.Linear(3, 3, bias=False)
        return trainee

    verdict = call_check(
        spec.gates[GROUPS], changed(subject, training={"trainee": with_dead_weight})
    )
    assert verdict.outcome == "fail" and "unused" in verdict.message


@pytest.mark.parametrize("change", ["rule", "lr", "weight_decay"])
def test_groups_see_a_parameter_in_the_wrong_group(spec, subject, change):
    """One parameter of all is declared otherwise than the optimizer has it."""
    other = {"rule": "adamw", "lr": 2.9e-3, "weight_decay": 0.0}[change]

    def otherwise(name, parameter):
        return subject.declared.update_law(name, parameter) | (
            {change: other} if name == "layers.1.ffn.up.weight" else {}
        )

    verdict = call_check(spec.gates[GROUPS], changed(subject, declared={"update_law": otherwise}))
    assert verdict.outcome == "fail" and "layers.1.ffn.up.weight" in verdict.message


OPTIMS = {
    "adamw": AdamW(lr=6e-4),
    "adamw with a tiny rate": AdamW(lr=1e-6, weight_decay=0.01),
    "muon": Muon(lr=3e-3, adamw_lr=3e-4),
    "muon, original": Muon(
        lr=2e-2, adamw_lr=3e-4, lr_scale="original", nesterov=False, weight_decay=0.0
    ),
    "muon in bfloat16": Muon(lr=2e-2, adamw_lr=3e-4, dtype="bfloat16"),
}


def under(optim, small_cfg, dataset) -> Subject:
    """The small run with another optimizer."""
    return subject_of(small_cfg.model_copy(update={"optim": optim}), dataset, torch.device("cpu"))


@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_reference_update_is_green_on_the_stack(spec, small_cfg, dataset, optim):
    for gate in (GROUPS, "optim.reference-update"):
        verdict = call_check(spec.gates[gate], under(optim, small_cfg, dataset))
        assert verdict.outcome == "pass", (verdict.message, verdict.measured)


MUON_ONLY = ["momentum", "muon lr", "nesterov", "lr_scale", "ns_steps"]


@pytest.mark.parametrize("change", ["weight_decay", "lr", "betas", *MUON_ONLY])
def test_reference_update_is_red_on_one_percent(spec, subject, change):
    """Of a number; or on another choice. The weakest, decay by Muon, is ten times its limit."""

    def otherwise(name, parameter):
        law = dict(subject.declared.update_law(name, parameter))
        if (law["rule"] == "muon") != (change in MUON_ONLY) and change != "weight_decay":
            return law
        match change:
            case "muon lr":
                law["lr"] *= 1.01
            case "nesterov":
                law["nesterov"] = False
            case "lr_scale":
                law["lr_scale"] = "original"
            case "ns_steps":
                law["ns_steps"] += 1
            case "betas":
                law["betas"] = (law["betas"][0], 0.955)
            case _:
                law[change] *= 1.01
        return law

    verdict = call_check(
        spec.gates["optim.reference-update"], changed(subject, declared={"update_law": otherwise})
    )
    assert verdict.outcome == "fail"
    # measured 6.4e-3 and more
    assert verdict.measured["muon_rel_error" if change in MUON_ONLY else "error_over_lr"] > 5e-3


def test_reference_update_is_far_from_its_limits_on_both_sides(spec, subject, small_cfg, dataset):
    """Clean distances a tenth of the limits (bfloat16: half);
    plants ten times the limit that sees them.
    """
    gate, plants = spec.gates["optim.reference-update"], load_museum()
    limit = {name: gate.limits[name].value for name in gate.limits}
    clean = call_check(gate, subject).measured
    assert (
        clean["error_over_lr"] < limit["error_over_lr_max"] / 10
        and clean["muon_rel_error"] < limit["muon_rel_error_max"] / 10
    )
    # measured 1.1e-2
    assert (
        call_check(gate, under(OPTIMS["muon in bfloat16"], small_cfg, dataset)).measured[
            "muon_bf16_rel_error"
        ]
        < 0.015
    )
    for plant_id in gate.plants:
        with plants[plant_id].apply():
            measured = call_check(gate, subject).measured
        far = (
            measured.get("error_over_lr", 0) > 0.1
            or measured.get("muon_rel_error", 0) > 10 * limit["muon_rel_error_max"]
        )
        assert far or measured.get("moved", 0) > 0, plant_id


def test_a_parameter_without_decay_stays_under_zero_gradients(spec, subject):
    def with_decay_on_all(model):
        optimizer = subject.training.make_optimizer(model)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
        return optimizer

    verdict = call_check(
        spec.gates["optim.reference-update"],
        changed(subject, training={"make_optimizer": with_decay_on_all}),
    )
    assert (
        verdict.outcome == "fail"
        and "zero gradients" in verdict.message
        and verdict.measured["moved"] == 5
    )


def test_clip_spike_is_green_on_the_stack(spec, subject):
    assert call_check(spec.gates["optim.clip-spike"], subject).outcome == "pass"


def test_clip_spike_is_red_on_a_sign_flip(spec, subject):
    def flipped(model):
        norm = subject.training.clip(model)
        if norm > 1:
            model.parameters()[0].grad.mul_(-1)
        return norm

    verdict = call_check(
        spec.gates["optim.clip-spike"], changed(subject, training={"clip": flipped})
    )
    assert verdict.outcome == "fail" and verdict.measured["cosine"] < 0


def test_clip_spike_is_red_on_its_plants(spec, subject):
    for plant_id in spec.gates["optim.clip-spike"].plants:
        with load_museum()[plant_id].apply():
            assert call_check(spec.gates["optim.clip-spike"], subject).outcome == "fail", plant_id


def test_clip_norm_band_is_two_sided(spec):
    check = ClipNorm(limits_of(spec.gates["optim.clip-norm"]))
    assert check.observe(step_taken()).passed
    assert check.observe(step_taken(grad_norm=0.4, clipped_grad_norm=0.4)).passed
    assert not check.observe(step_taken(clipped_grad_norm=1.01)).passed
    assert not check.observe(step_taken(clipped_grad_norm=0.99)).passed
    assert not check.observe(step_taken(clipped_grad_norm=float("nan"))).passed


def test_eps_under_the_root_is_seen_only_where_gradients_are_tiny(spec, subject, monkeypatch):
    """Measured 4.7 rates off with gradients as small as eps; without them the plant
    is 2e-4 off and would pass.
    """
    gate, plant = spec.gates["optim.reference-update"], load_museum()["optim.eps-inside-the-root"]
    with plant.apply():
        assert call_check(gate, subject).measured["error_over_lr"] > 1
        driven = optim_checks._driven
        monkeypatch.setattr(
            optim_checks, "_driven", lambda *arguments: driven(*arguments[:-1], False)
        )
        assert call_check(gate, subject).passed


def many_experts(small_cfg, n_experts=64):
    """So many experts that a batch of 256 tokens leaves some without any."""
    ffn = MixtureOfExperts(n_experts=n_experts, top_k=1)
    return small_cfg.model_copy(update={"model": small_cfg.model.model_copy(update={"ffn": ffn})})


@pytest.mark.parametrize("gate_id", [GROUPS, "optim.reference-update", "optim.train-step"])
def test_a_declared_rule_without_a_formula_is_not_run(spec, subject, gate_id):
    def lion(name, parameter):
        return subject.declared.update_law(name, parameter) | {"rule": "Lion"}

    verdict = call_check(spec.gates[gate_id], changed(subject, declared={"update_law": lion}))
    assert verdict.outcome == "not_run" and "is updated by Lion" in verdict.message


@pytest.mark.parametrize("setting", ["eps", "betas"])
def test_groups_hold_every_setting_of_the_declared_rule(spec, subject, setting):
    """An optimizer of another rule may share settings, such as betas, with the declared one."""
    groups = subject.training.optimizer.param_groups
    for other in ({k: v for k, v in g.items() if k != setting} for g in groups if setting in g):
        rest = [g for g in groups if g["params"] is not other["params"]]
        wrong = SimpleNamespace(param_groups=[*rest, other])
        off = changed(subject, training={"optimizer": wrong})
        verdict = call_check(spec.gates[GROUPS], off)
        assert verdict.outcome == "fail" and "not the declared one" in verdict.message


def test_groups_excuse_an_expert_without_tokens_and_no_other(spec, small_cfg, dataset):
    gate = spec.gates[GROUPS]
    experts = subject_of(many_experts(small_cfg), dataset, torch.device("cpu"))
    clean = call_check(gate, experts)
    assert clean.outcome == "pass" and clean.measured["unreached"] > 0, clean
    unexcused = call_check(gate, with_trainees(experts, idle_parameters=lambda trainee: set))
    assert unexcused.outcome == "fail" and "experts." in unexcused.message

    def cut_off(options):
        trainee = experts.training.trainee(options)
        for expert in trainee.model.layers[0].ffn.experts:
            expert.register_forward_hook(lambda module, inputs, output: output.detach())
        return trainee

    verdict = call_check(gate, changed(experts, training={"trainee": cut_off}))
    assert verdict.outcome == "fail" and "layers.0.ffn.experts." in verdict.message


def test_groups_see_a_weight_that_is_no_parameter(spec, subject):
    """A tied and a recomputed model have none; a probe in a list is one."""
    hidden = torch.nn.Parameter(torch.ones(()))
    verdict = call_check(
        spec.gates[GROUPS],
        with_trainees(subject, loss_sum=lambda t: lambda batch: t.loss_sum(batch) * hidden),
    )
    assert verdict.outcome == "fail" and verdict.measured["unregistered"] == 1


@pytest.mark.parametrize("plant_id", ["optim.frozen-moves", "optim.probe-in-a-list"])
def test_groups_are_red_on_plants_of_movement(spec, subject, plant_id):
    with load_museum()[plant_id].apply():
        verdict = call_check(spec.gates[GROUPS], subject)
    assert verdict.outcome == "fail" and "movement" in verdict.measured["judged"]


def reporting(**changes):
    """Steps whose report is otherwise: a factor by field."""

    def member(trainee):
        def step(batches):
            report = trainee.step(batches)
            fields = {n: getattr(report, n) for n in changes}
            return replace(report, **{n: _times(v, changes[n]) for n, v in fields.items()})

        return step

    return member


def _times(value, factor):
    return {k: factor * v for k, v in value.items()} if isinstance(value, dict) else factor * value


def moving(change):
    """Steps after which `change` is done to the model."""

    def member(trainee):
        @torch.no_grad()
        def step(batches):
            with torch.enable_grad():
                report = trainee.step(batches)
            change(trainee.model)
            return report

        return step

    return member


def test_train_step_is_green_on_the_stack(spec, subject):
    gate, drawn, reports = spec.gates["optim.train-step"], [], []
    keeping = with_trainees(
        subject,
        draw=lambda trainee: lambda: drawn.append(trainee.draw()) or drawn[-1],
        step=lambda trainee: lambda batches: reports.append(trainee.step(batches)) or reports[-1],
    )
    verdict = call_check(gate, keeping)
    assert verdict.outcome == "pass", verdict.message
    # measured 1.7e-7 and 6.4e-6
    assert verdict.measured["error_over_lr"] < 1e-5 and verdict.measured["muon_rel_error"] < 1e-4
    trainee = subject.training.trainee()
    watched = optim_checks._watched(trainee.model, subject.declared)
    assert len(drawn) == 3 and {*watched} == {n for n, _ in trainee.model.named_parameters()}
    assert [r.changed_tensor_frac == 1 for r in reports] == [True, True, False], "one is frozen"
    assert all(r.grad_norm > r.clipped_grad_norm for r in reports), "every step clips"


def test_train_step_is_red_on_its_plants(spec, subject):
    gate = spec.gates["optim.train-step"]
    for plant_id in gate.plants:
        with load_museum()[plant_id].apply():
            assert call_check(gate, subject).outcome == "fail", plant_id


@pytest.mark.parametrize(
    "field",
    ["grad_norm", "clipped_grad_norm", "n_valid_tokens", "changed_tensor_frac", "group_lrs"],
)
@pytest.mark.parametrize("factor", [0.99, 1.01, float("nan")])
def test_train_step_is_red_on_a_report_that_is_one_percent_off(spec, subject, field, factor):
    gate = spec.gates["optim.train-step"]
    verdict = call_check(gate, with_trainees(subject, step=reporting(**{field: factor})))
    assert verdict.outcome == "fail" and "in step" in verdict.message
    limit = gate.limits["report_rel_error_max"]
    assert verdict.measured["report_rel_error"] > 20 * limit.value
    assert call_check(gate, subject).measured["report_rel_error"] < limit.value / 20


@pytest.mark.parametrize("change", ["lr", "weight_decay"])
def test_train_step_is_red_on_another_law(spec, subject, change):
    def otherwise(name, parameter):
        law = subject.declared.update_law(name, parameter)
        return law | {change: 1.01 * law[change]}

    off = changed(subject, declared={"update_law": otherwise})
    assert call_check(spec.gates["optim.train-step"], off).outcome == "fail"


@pytest.mark.parametrize("factor", [0.99, 1.01, float("nan")])
def test_train_step_is_red_on_a_weight_that_something_else_moves(spec, subject, factor):
    off = with_trainees(subject, step=moving(lambda model: model.embed.weight.mul_(factor)))
    verdict = call_check(spec.gates["optim.train-step"], off)
    assert verdict.outcome == "fail" and "weight in step" in verdict.message


def test_train_step_is_red_on_a_weight_that_moves_without_a_gradient(spec, subject):
    def frozen(options):
        trainee = subject.training.trainee(options)
        trainee.model.embed.weight.requires_grad_(False)
        return trainee

    still = changed(subject, training={"trainee": frozen})
    assert call_check(spec.gates["optim.train-step"], still).passed
    off = with_trainees(still, step=moving(lambda model: model.embed.weight.mul_(0.999)))
    verdict = call_check(spec.gates["optim.train-step"], off)
    assert verdict.outcome == "fail" and "embed.weight" in verdict.message


def test_train_step_is_red_on_another_maximum_norm(spec, subject):
    """No rule is changed by one factor for all steps; the norm that clipping leaves shows it."""

    def trainee(options):
        return subject.training.trainee(
            replace(options, max_grad_norm=1.01 * options.max_grad_norm)
        )

    off = changed(subject, training={"trainee": trainee})
    verdict = call_check(spec.gates["optim.train-step"], off)
    assert verdict.outcome == "fail" and "the norm that clipping left" in verdict.message


def test_train_step_holds_over_schedules_and_rules(spec, small_cfg, dataset):
    """Rates far from 1, a warm-up as long as the run, and AdamW alone: at most 2.5e-7 of a rate was
    measured over seven of these.
    """
    for optim in (
        AdamW(lr=1e-6),
        AdamW(lr=3e-3, weight_decay=0.0),
        Muon(lr=2e-2, adamw_lr=3e-4, dtype="bfloat16", nesterov=False),
    ):
        verdict = call_check(spec.gates["optim.train-step"], under(optim, small_cfg, dataset))
        assert verdict.outcome == "pass", (optim, verdict.message)


def test_groups_call_a_model_that_explodes_by_its_name(spec, subject):
    """Not a frozen weight that moves: numbers that are not finite."""

    def exploding(trainee):
        @torch.no_grad()
        def update(batches):
            with torch.enable_grad():
                nats = trainee.update(batches)
            for p in trainee.model.parameters():
                p.mul_(float("inf"))
            return nats

        return update

    verdict = call_check(spec.gates[GROUPS], with_trainees(subject, update=exploding))
    assert (
        verdict.outcome == "fail"
        and "not finite" in verdict.message
        and "frozen" not in verdict.message
    )


@pytest.mark.parametrize("norm", [0.0, 1e-9, 1e-7, 1e-5])
def test_muon_turns_a_small_gradient_as_declared(norm):
    """Of a gradient below the least norm the update is smaller, and of none it is zero, as in
    torch.optim.Muon. Measured: off by 4e-6 of the largest update at most.
    """
    weight = torch.nn.Parameter(torch.zeros(6, 9))
    cfg = Muon(lr=1e-2, adamw_lr=1e-3, weight_decay=0.0)
    group = {"params": [weight], "lr": 1e-2, "weight_decay": 0.0}
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    weight.grad = gradient / gradient.norm() * norm
    law = cfg.model_dump() | {"lr": 1e-2, "rule": "muon"}
    there = RULES["muon"].update(weight.detach().double(), weight.grad.double(), {}, law, 1)
    OurMuon([group], cfg).step()
    assert float((weight.detach() - there).norm()) <= 2e-5 * max(float(there.norm()), 1e-4)
    assert bool(there.any()) == (norm > 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_muon_gradient_that_is_not_finite_is_infinitely_wrong(subject, value):
    """Also where the weight stood still; the decomposition of such a gradient raises."""
    named = list(subject.training.module.named_parameters())
    laws = {n: subject.declared.update_law(n, p) for n, p in named}
    before = next(p.detach() for n, p in named if laws[n]["rule"] == "muon")
    law = next(law for law in laws.values() if law["rule"] == "muon")
    gradient = torch.ones_like(before)
    gradient[0, 0] = value
    for after in (0.9 * before, before, value * before):
        kind, error = move_error(Move(law, before, gradient, after), {"t": 0}, clip=1.0)
        assert kind == "muon_rel_error" and not error <= 1e300


@pytest.mark.parametrize("optim", [OPTIMS["adamw"], OPTIMS["muon"]], ids=["adamw", "muon"])
def test_reference_update_is_red_where_one_weight_becomes_no_number(
    spec, small_cfg, dataset, optim
):
    """Whichever of the weights it is: an error that is NaN is larger than any limit."""
    honest = under(optim, small_cfg, dataset)

    def breaking(place):
        def make(model):
            optimizer, weight = (
                honest.training.make_optimizer(model),
                list(model.parameters())[place],
            )
            step = optimizer.step

            def broken():
                step()
                if bool(weight.grad.any()):
                    weight.data.fill_(torch.nan)

            optimizer.step = broken
            return optimizer

        return make

    for place in (0, 1, len(list(honest.training.module.parameters())) - 1):
        verdict = call_check(
            spec.gates["optim.reference-update"],
            changed(honest, training={"make_optimizer": breaking(place)}),
        )
        assert verdict.outcome == "fail" and float("inf") in verdict.measured.values(), place
