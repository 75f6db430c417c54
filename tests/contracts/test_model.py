"""Gates of the model: green on the stack, red on every plant,
and sharp enough to see small errors.
"""

from types import SimpleNamespace

import pytest
import torch

from stackproof.contracts import model as model_gates
from stackproof.contracts.gate import call_check
from stackproof.contracts.subject import MicroBatch, Subject
from stackproof.data.tokenizer import Bytes
from stackproof.kernels import attention
from stackproof.model import transformer
from stackproof.model.build import build_model
from stackproof.museum.plant import load_museum, swap, touches
from stackproof.recipes.pocket import pocket
from stackproof.subject.assemble import subject_of
from stackproof.subject.declared import RunDeclared
from stackproof.subject.model import RunModel
from tests.subjects import changed

CPU = torch.device("cpu")
GATES = [
    "model.init-law",
    "model.tied-head",
    "model.causal",
    "model.isolation",
    "model.reference-differential",
    "model.gradient",
    "model.training-forward",
    "model.overfit-one-batch",
]
PLANTS = [
    "model.far-keys-unseen",
    "model.layers-drawn-alike",
    "model.branches-drawn-wide",
    "model.dropout-undeclared",
    "model.scaled-in-training",
    "model.head-init-wrong",
    "model.init-std-too-big",
    "model.norm-garbage-buffer",
    "model.head-untied",
    "model.causal-mask-off-by-one",
    "model.rows-mixed",
    "model.document-mask-lost",
    "model.document-mask-off-by-one",
    "model.positions-restart-late",
    "model.missing-scale",
    "model.double-scale",
    "model.rope-bf16-table",
    "model.shared-gradient-clobbered",
    "model.attention-branch-lost",
    "model.labels-of-the-past",
]


def test_the_museum_can_show_what_the_gates_look_for(small_cfg):
    model = small_cfg.model
    assert 1 < model.n_kv_heads < model.n_heads and model.dropout > 0 and model.max_seq_len > 256


@pytest.mark.parametrize("gate_id", GATES)
def test_gate_is_green_on_the_stack(spec, subject, gate_id):
    verdict = call_check(spec.gates[gate_id], subject)
    assert verdict.outcome == "pass", verdict.message


@pytest.mark.parametrize("plant_id", PLANTS)
def test_gate_is_red_on_its_plant(spec, small_cfg, dataset, plant_id):
    plant, before = load_museum()[plant_id], touches()
    with plant.apply():
        verdict = call_check(spec.gates[plant.gate], subject_of(small_cfg, dataset, CPU))
    assert verdict.outcome == "fail" and verdict.message and touches() > before
    assert plant.id in spec.gates[plant.gate].plants


@pytest.mark.parametrize("plant_id", ["model.future-in-half", "model.documents-mixed-in-half"])
def test_a_leak_in_half_precision_alone_is_red_in_its_run(spec, small_cfg, dataset, plant_id):
    """The gate judges the precision of the run: of the same code, a run in float32 is green."""
    plant, train = load_museum()[plant_id], small_cfg.train
    found = {}
    with plant.apply():
        for dtype in ("float32", "bfloat16", "float16"):
            cfg = small_cfg.model_copy(update={"train": train.model_copy(update={"dtype": dtype})})
            found[dtype] = call_check(spec.gates[plant.gate], subject_of(cfg, dataset, CPU))
    assert {dtype: v.outcome for dtype, v in found.items()} == {
        "float32": "pass",
        "bfloat16": "fail",
        "float16": "fail",
    }
    assert (
        found["float32"].measured["gradient_abs"] == 0 < found["bfloat16"].measured["gradient_abs"]
    )


def test_a_plant_leaves_nothing_behind(spec, small_cfg, dataset):
    for plant_id in PLANTS:
        with load_museum()[plant_id].apply():
            pass
    judged = subject_of(small_cfg, dataset, CPU)
    assert call_check(spec.gates["model.reference-differential"], judged).passed


def test_training_forward_sees_one_percent(spec, subject):
    original = transformer.Transformer.logits
    with swap(
        transformer.Transformer,
        "logits",
        lambda self, x: original(self, x) * (1.01 if self.training else 1.0),
    ):
        verdict = call_check(spec.gates["model.training-forward"], subject)
    assert verdict.outcome == "fail" and verdict.measured["rel_error"] == pytest.approx(
        0.01, rel=0.01
    )


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_init_law_sees_five_percent(spec, factor):
    gate, subject = spec.gates["model.init-law"], wide_subject()
    assert call_check(gate, subject).passed
    with torch.no_grad():
        subject.model.module.layers[0].ffn.up.weight.mul_(factor)
    verdict = call_check(gate, subject)
    assert verdict.outcome == "fail" and verdict.measured["worst"] == "layers.0.ffn.up.weight"


@pytest.mark.parametrize("seed", range(10))
def test_init_law_raises_no_false_alarm(spec, seed):
    verdict = call_check(spec.gates["model.init-law"], wide_subject(seed))
    assert verdict.passed and verdict.measured["z"] < 5  # measured worst of ten seeds 2.97


def wide_subject(seed=5):
    """The default model for a vocabulary of bytes."""
    cfg = pocket()
    of_bytes = SimpleNamespace(tokenizer=Bytes())
    model = RunModel(cfg, of_bytes, CPU, build_model(cfg.model, 257, seed=seed))
    return Subject(declared=RunDeclared(cfg, 257), model=model)


@pytest.mark.parametrize("change", ["uniform", "halves", "twin"])
def test_init_law_sees_draws_of_another_shape_and_draws_made_twice(spec, change):
    subject = wide_subject()
    weight = subject.model.module.layers[0].ffn.up.weight
    with torch.no_grad():
        if change == "uniform":
            weight.uniform_(
                -(3**0.5) * 0.02, 3**0.5 * 0.02, generator=torch.Generator().manual_seed(1)
            )
        elif change == "halves":
            weight[len(weight) // 2 :] = weight[: len(weight) // 2]
        else:  # neither the first tensor nor the one before, and of another size
            far = subject.model.module.layers[-1].attention.k.weight
            far.flatten()[:] = weight.flatten()[: far.numel()]
    verdict = call_check(spec.gates["model.init-law"], subject)
    assert verdict.outcome == "fail" and "layers.0.ffn.up.weight" in verdict.message
    assert verdict.measured["z" if change == "uniform" else "likeness_z"] > 10


@pytest.mark.parametrize("change", ["gain", "nan", "stranger"])
def test_init_law_sees_other_breaches(spec, small_cfg, dataset, change):
    subject = subject_of(small_cfg, dataset, CPU)
    model = subject.model.module
    with torch.no_grad():
        match change:
            case "gain":
                model.final_norm.weight[3] = 1.0001
            case "nan":
                model.layers[1].ffn.up.weight[0, 0] = float("nan")
            case "stranger":
                model.extra = torch.nn.Linear(2, 2)
    assert call_check(spec.gates["model.init-law"], subject).outcome == "fail"


def test_tied_head_sees_a_copy_and_a_tie_that_nobody_declared(spec, subject):
    gate, tied = spec.gates["model.tied-head"], subject.declared.tied_head
    copied = subject.model.embedding.weight.detach().clone()
    for head_weight, declared in ((copied, True), (subject.model.embedding.weight, False)):
        judged = changed(
            subject, model={"head_weight": head_weight}, declared={"tied_head": declared}
        )
        verdict = call_check(gate, judged)
        assert verdict.outcome == "fail" and verdict.measured["tied"] is not declared
    assert tied and call_check(gate, subject).measured == {"tied": True, "declared": True}


def test_differential_sees_one_percent_of_scale(spec, subject):
    original = attention.whole
    with swap(attention, "whole", lambda q, k, v, **more: original(q * 1.01, k, v, **more)):
        verdict = call_check(spec.gates["model.reference-differential"], subject)
    assert verdict.outcome == "fail"
    assert (
        verdict.measured["attention_rel_error"]
        > 5 * spec.gates["model.reference-differential"].limits["rel_error_max"].value
    )


def test_differential_is_far_below_its_limit_on_the_stack(spec, subject):
    measured = call_check(spec.gates["model.reference-differential"], subject).measured
    errors = [
        measured[f"{part}_rel_error"] for part in ("attention", "logit", "drawn", "full_length")
    ]
    assert max(errors) < 2e-6  # measured worst case 3.3e-7
    assert measured["table_abs_error"] < 1e-7


def test_overfit_refuses_a_batch_without_ambiguity(spec, subject, monkeypatch):
    ids = torch.arange(10).view(1, -1)
    monkeypatch.setattr(model_gates, "overfit_batch", lambda *sizes: MicroBatch(ids, ids + 1))
    verdict = call_check(spec.gates["model.overfit-one-batch"], subject)
    assert verdict.outcome == "fail" and "one successor" in verdict.message


def test_overfit_is_red_when_nothing_is_learned(spec, subject):
    def idle(model, optimizer):
        return SimpleNamespace(update=lambda batches: 0.01)

    verdict = call_check(
        spec.gates["model.overfit-one-batch"], changed(subject, training={"trainee_of": idle})
    )
    assert verdict.outcome == "fail" and verdict.measured["loss_nats"] > 1
