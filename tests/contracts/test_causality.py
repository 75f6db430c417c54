"""Gates of causality and isolation: they see an effect of any size where bits are promised, and one
beyond rounding elsewhere.
"""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stackproof.config import ModelConfig
from stackproof.contracts.callbacks.subject import foreign_subject
from stackproof.contracts.causality import difference, packing
from stackproof.contracts.gate import call_check
from stackproof.contracts.model import in_mode
from stackproof.contracts.subject import Declared, Model, Subject
from stackproof.kernels import attention
from stackproof.model.build import build_model
from stackproof.museum.plant import load_museum, swap, touches
from stackproof.museum.script import Small
from stackproof.subject.assemble import subject_of
from tests.contracts.test_model_variants import declared
from tests.subjects import changed

CPU = torch.device("cpu")


class Plain(Model):
    """A model that is called with ids, and with document ids if it takes them."""

    def __init__(self, module, vocab_size, max_length):
        self.module, self.vocab_size, self.max_length = module, vocab_size, max_length

    def logits(self, ids_BT, mask_BT=None, labels_BT=None):
        return self.module(ids_BT)

    def packed_logits(self, ids_BT, document_ids_BT):
        return self.module(ids_BT, document_ids_BT=document_ids_BT)

    def training(self, mode):
        return in_mode(self.module, mode)

    @property
    def embedding(self):
        return self.module.embed


class Architecture(Declared):
    def __init__(self, architecture):
        self.architecture = architecture


class Deaf(nn.Module):
    """Logits that no token changes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 4)

    def forward(self, ids, document_ids_BT=None):
        return 0 * self.embed(ids) + torch.arange(4)


def deaf():
    return Subject(declared=Architecture(declared()), model=Plain(Deaf(), 4, 32))


# --- how tensors are compared ---------------------------------------------------------------------


def test_a_difference_is_the_largest_and_a_lone_nan_is_infinite():
    a = torch.tensor([[-4.0, 1.0, float("nan")]])
    assert difference(a, a.clone(), relative=False) == 0
    assert difference(a, a + torch.tensor([0.0, 2.0, 0.0]), relative=False) == 2
    assert difference(a, a + torch.tensor([0.0, 2.0, 0.0]), relative=True) == 0.5
    assert difference(a, a.nan_to_num(1.0), relative=False) == float("inf")


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("nan", "nan", 0.0),
        ("inf", "inf", 0.0),
        ("nan", "1", math.inf),
        ("1", "nan", math.inf),
        ("inf", "1", math.inf),
        ("1", "-inf", math.inf),
        ("inf", "-inf", math.inf),
        ("inf", "nan", math.inf),
    ],
)
def test_only_equal_values_that_are_not_finite_are_no_difference(before, after, expected, relative):
    pair = (torch.tensor([2.0, float(x)]) for x in (before, after))
    assert difference(*pair, relative=relative) == expected


# --- causality ------------------------------------------------------------------------------------


def test_causal_refuses_a_model_that_ignores_its_input(spec):
    assert "sees nothing" in call_check(spec.gates["model.causal"], deaf()).message


def test_causal_leaves_mode_and_random_state(spec, subject):
    model = subject.model.module
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert call_check(spec.gates["model.causal"], subject).passed
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes


def test_a_rounding_is_no_leak_where_bits_are_not_promised(spec, subject):
    """A future of 1e-6 of the logits: red for a declared architecture, green to rounding without
    one, and red there too once it is 1e-3.
    """

    def peeking(size):
        honest = subject.model.logits
        return lambda ids, mask=None, labels=None: honest(ids) + size * ids.sum() / 1e4

    gate = spec.gates["model.causal"]
    small = changed(subject, model={"logits": peeking(1e-4)})
    verdict = call_check(gate, small)
    assert verdict.outcome == "fail" and verdict.measured["leak_abs"] < 1e-2
    verdict = call_check(gate, replace(small, declared=Declared()))
    assert verdict.passed and 0 < verdict.measured["leak_rel"] < 1e-4
    large = changed(subject, model={"logits": peeking(1.0)})
    verdict = call_check(gate, replace(large, declared=Declared()))
    assert verdict.outcome == "fail" and verdict.measured["leak_rel"] > 1e-3


def test_causal_sees_rows_and_labels_of_any_trainer(spec, subject):
    honest, gate = subject.model.logits, spec.gates["model.causal"]
    subject, other = replace(subject, declared=Declared()), {"takes_labels": True}

    def rows(ids, mask=None, labels=None):
        return honest(ids) + 0.01 * ids[0, 0]

    def labelled(ids, mask=None, labels=None):
        return honest(ids) + (0 if labels is None else 0.01 * labels[..., None])

    assert call_check(gate, changed(subject, model=other)).passed
    verdict = call_check(gate, changed(subject, model=other | {"logits": rows}))
    assert "one row of a batch" in verdict.message and verdict.measured["leak_rel"] == 0
    verdict = call_check(gate, changed(subject, model=other | {"logits": labelled}))
    assert verdict.message == "the labels change the logits"
    assert verdict.measured["row_rel"] == 0 < verdict.measured["labels_leak_rel"]


@pytest.mark.parametrize(
    ("plant_id", "gate_id"),
    [
        ("model.foreign-mask-missing", "model.causal"),
        ("model.foreign-padding-seen", "model.isolation"),
        ("model.foreign-head-untied", "model.tied-head"),
    ],
)
def test_a_plant_in_a_foreign_model_is_seen_by_the_gate_of_all_trainers(spec, plant_id, gate_id):
    gate, before = spec.gates[gate_id], touches()
    torch.manual_seed(0)
    assert call_check(gate, foreign_subject(Small())).passed
    with load_museum()[plant_id].apply():
        assert call_check(gate, foreign_subject(Small())).outcome == "fail" and touches() > before
    assert plant_id in gate.plants and load_museum()[plant_id].gate == gate_id


# --- isolation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads, max_seq_len, tied",
    [((6, 3), 131, False), ((4, 1), 20, True), ((2, 2), 7, True), ((1, 1), 2, True)],
)
def test_isolation_holds_for_other_shapes(spec, heads, max_seq_len, tied):
    cfg = ModelConfig(
        d_model=24,
        n_layers=3,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=6,
        d_ff=40,
        max_seq_len=max_seq_len,
        tied_head=tied,
    )
    model = Plain(build_model(cfg, 61, seed=3).eval(), 61, max_seq_len)
    judged = Subject(declared=Architecture(cfg.model_dump()), model=model)
    verdict = call_check(spec.gates["model.isolation"], judged)
    assert verdict.passed, verdict.message
    assert verdict.measured["rel_error"] < 2e-6  # measured worst case 2.6e-7


def test_isolation_looks_at_short_documents_full_rows_and_padding():
    for length in (17, 129):
        full, padded = (
            row.unique_consecutive(return_counts=True)[1].tolist() for row in packing(length)
        )
        assert (
            full[0] == 1
            and len(full) == 3
            and padded[1] == 1
            and len(padded) == 4
            and sum(full) == sum(padded) == length
        )


def test_isolation_is_far_from_its_limit_on_both_sides(spec, small_cfg, dataset, subject):
    gate = spec.gates["model.isolation"]
    limit = gate.limits["rel_error_max"].value
    assert call_check(gate, subject).measured["rel_error"] < limit / 100  # measured 2e-7
    elsewhere = "foreign", "half", "again"  # plants of other runs than this one
    for plant_id in (p for p in gate.plants if not any(of in p for of in elsewhere)):
        with load_museum()[plant_id].apply():
            measured = call_check(gate, subject_of(small_cfg, dataset, CPU)).measured
        assert measured["rel_error"] > 10 * limit  # measured 4.4e-3 or more
        assert (
            (measured["leak_abs"] > 0.05)
            == (measured["gradient_abs"] > 0.05)
            == ("mask" in plant_id)
        )


def test_isolation_sees_a_leak_in_the_gradient_alone(spec, subject):
    original = attention.document_attention

    def leaks_backward(q, k, v, mask, *, scale=None, chunks=False):
        seen = original(q, k, v, mask.new_ones(mask.shape).tril(), scale=scale)
        return original(q, k, v, mask, scale=scale) + (seen - seen.detach())

    with swap(attention, "document_attention", leaks_backward):
        verdict = call_check(spec.gates["model.isolation"], subject)
    assert verdict.outcome == "fail" and verdict.measured["gradient_abs"] > 0.1
    assert verdict.measured["leak_abs"] == 0 and verdict.measured["rel_error"] < 1e-5


def test_isolation_sees_packed_rows_that_are_scored_another_way(spec, subject):
    honest = subject.model.packed_logits
    shifted = {"packed_logits": lambda ids, documents: honest(ids, documents) * 1.001}
    verdict = call_check(spec.gates["model.isolation"], changed(subject, model=shifted))
    assert (
        verdict.outcome == "fail"
        and verdict.measured["leak_abs"] == verdict.measured["gradient_abs"] == 0
    )


def test_isolation_refuses_a_model_that_ignores_its_input(spec):
    verdict = call_check(spec.gates["model.isolation"], deaf())
    assert (
        verdict.outcome == "fail"
        and "sees nothing" in verdict.message
        and verdict.measured["unlearned"] > 0
    )


def test_isolation_leaves_modes_gradients_and_random_state(spec, subject):
    model = subject.model.module.train()
    model.layers[0].ffn.eval()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert call_check(spec.gates["model.isolation"], subject).passed
    assert (
        torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    )
    assert all(p.grad is None for p in model.parameters()) and not model.embed._forward_hooks
    model.train()


def test_isolation_judges_what_is_offered_and_names_it(spec, subject):
    """Documents in our trainer, padding where a mask is taken, both where both are; neither is no
    verdict.
    """
    gate = spec.gates["model.isolation"]
    assert call_check(gate, subject).measured["judged"] == "documents"
    padded = call_check(gate, foreign_subject(Small()))
    assert padded.passed and padded.measured.keys() == {"judged", "padding_rel", "longer_rel"}
    assert padded.measured["judged"] == "padding"
    honest = subject.model.logits
    masked = {"takes_mask": True, "logits": lambda ids, mask=None, labels=None: honest(ids)}
    both = call_check(gate, changed(subject, model=masked))
    assert both.outcome == "fail" and both.measured["judged"] == "documents and padding"
    assert "left padding" in both.message and both.measured["leak_abs"] == 0

    class Unmasked(Small):
        def forward(self, input_ids):
            return F.linear(self.embed(input_ids), self.embed.weight)

    verdict = call_check(gate, foreign_subject(Unmasked()))
    assert verdict.outcome == "not_run" and "no attention mask" in verdict.message


class Wrong(Model):
    """A model whose logits are not finite, or do not depend on its input."""

    takes_mask, max_length, vocab_size = True, 32, 16

    def __init__(self, value):
        self.value = value

    def logits(self, ids_BT, mask_BT=None, labels_BT=None):
        return torch.full((*ids_BT.shape, self.vocab_size), self.value)

    def training(self, mode):
        return nullcontext()


@pytest.mark.parametrize("value", [float("nan"), 1.0])
@pytest.mark.parametrize("gate_id", ["model.causal", "model.isolation"])
def test_logits_that_are_not_finite_or_constant_are_red(spec, gate_id, value):
    verdict = call_check(spec.gates[gate_id], Subject(model=Wrong(value)))
    assert verdict.outcome == "fail", verdict
