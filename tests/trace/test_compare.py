"""Two computations point by point: what rounding adds, what arrives, what is refused,
and how much memory it takes.
"""

import copy
import io
import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stackproof.config import ModelConfig
from stackproof.export import reading
from stackproof.kernels import dispatch
from stackproof.model.build import build_model
from stackproof.spec.errors import UsageError
from stackproof.trace import bisect, compare, stats, variant
from stackproof.trace.bisect import FAR
from stackproof.trace.compare import Spill, difference
from stackproof.trace.model_variant import in_precision, module_path, reference_kernels, swapped
from stackproof.trace.points import Point
from stackproof.trace.scratch import BufferPool
from stackproof.trace.stats import SupportError
from tests.trace import models

# The worst share of the bound that rounding took, over everything below: 0.22 (output of
# differential attention in bfloat16).
WORST = 0.4


def worst(found):
    return max(c.excess for c in found.points)


@pytest.mark.parametrize("name", models.THEIRS)
def test_ours_and_hugging_faces_differ_by_rounding_at_every_point(name, tmp_path):
    """The same folder read by both libraries; logits came within 6e-7 of each other."""
    theirs = models.theirs(name)
    theirs.save_pretrained(tmp_path)
    ours = reading.load_weights(reading.open_folder(tmp_path))
    found = compare(variant(ours), variant(theirs), models.ids(tokens=39))
    assert found.first_divergence is None and worst(found) < WORST and found.logits.rel_err < 3e-6
    assert found.only_b == () and all("experts" in n for n in found.only_a)
    assert not [c.point.name for c in found.points if c.added_err is None]


@pytest.mark.parametrize("way", ["float64", "reference", "bfloat16"])
@pytest.mark.parametrize("name", models.OURS)
def test_another_way_to_compute_differs_by_rounding_at_every_point(name, way):
    model = models.ours(name)
    found = compare(variant(model), variant(model, way), models.ids(tokens=39))
    assert found.first_divergence is None and worst(found) < WORST and worst(found) > 0
    if way == "bfloat16":
        assert found.logits.rel_err > 1e-3


def test_a_matrix_that_is_wrong_by_one_part_in_100_000_is_not_rounding():
    """The bound is not so wide that nothing is beyond it."""
    good = models.ours()
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.layers[0].attention.k.weight.mul_(1 + 1e-5)
    found = compare(variant(good), variant(bad), models.ids())
    assert [c.point.name for c in found.suspects] == ["layers.0.k"] and found.suspects[
        0
    ].added_err == pytest.approx(1e-5, rel=0.05)


def test_added_errors_of_right_operations_are_exactly_nothing():
    """Downstream of the plant everything arrives wrong and nothing is added."""
    good = models.ours()
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.layers[0].ffn.up.weight[3] += 0.5
    found = compare(variant(good), variant(bad), models.ids())
    later = [c for c in found.points if c.point.order > found.first_divergence.point.order]
    assert all(c.added_err == 0 for c in later) and all(
        c.arrived.rel_err > 1e-4 for c in later if c.point.layer == 1
    )


def test_experts_that_saw_other_tokens_are_noted_and_not_compared():
    good = models.ours("experts")
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.layers[0].ffn.router.weight.copy_(bad.layers[0].ffn.router.weight.flip(0))
    found = compare(variant(good), variant(bad), models.ids())
    assert found.first_divergence.point.name == "layers.0.router"
    notes = [c.note for c in found.points if c.point.slot.startswith("experts")]
    assert any("saw other tokens" in n for n in notes)


def test_another_shape_is_refused():
    a, b = models.ours("small"), models.ours("plain")
    with pytest.raises(SupportError, match="shape"):
        compare(variant(a), variant(b), models.ids())


def test_no_common_point_is_refused():
    with pytest.raises(UsageError, match="no point in common"):
        compare(
            variant(models.ours(), where={"a": "embed"}),
            variant(models.ours(), where={"b": "embed"}),
            models.ids(),
        )


@pytest.mark.parametrize(
    ("a", "b", "rel_err"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([3.0, 0.0], [3.0, 4.0], 0.8),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], math.inf),
        ([math.nan, 1.0], [2.0, 1.0], math.inf),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.inf, 1.0], [math.inf, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_a_difference_is_what_its_formula_says(a, b, rel_err, monkeypatch):
    found = difference(torch.tensor(a), torch.tensor(b))
    assert found.rel_err == pytest.approx(rel_err) and found.nmse == pytest.approx(rel_err**2)
    # the function of this name hides the module
    monkeypatch.setattr(sys.modules["stackproof.trace.compare"], "CHUNK", 1)
    assert difference(torch.tensor(a), torch.tensor(b)).rel_err == pytest.approx(rel_err)


def test_errors_are_shares_of_the_right_side_whichever_is_larger():
    good = models.ours()
    for factor in (1000.0, 1e-3):
        bad = copy.deepcopy(good)
        with torch.no_grad():
            bad.layers[0].ffn.down.weight.mul_(factor)
        first = compare(variant(good), variant(bad), models.ids()).first_divergence
        assert first.point.name == "layers.0.ffn.out" and first.added_err == pytest.approx(
            abs(factor - 1), rel=1e-4
        )


def test_a_nan_is_infinitely_far_and_named():
    good = models.ours()
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.layers[1].attention.v.weight[0, 0] = math.nan
    found = compare(variant(good), variant(bad), models.ids())
    assert found.first_divergence.point.name == "layers.1.v" and math.isinf(
        found.first_divergence.added_err
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_spilled_tensors_come_back_to_the_bit(dtype):
    spill = Spill(io.BytesIO())
    kept = {}
    for i, shape in enumerate([(2, 3, 4), (1, 0, 5), (7,), (2, 3, 4)]):
        kept[f"p{i % 3}"] = x = (torch.randn(shape) * 100).to(dtype)
        spill.write(f"p{i % 3}", x.transpose(0, -1))
    for name, x in kept.items():
        assert torch.equal(spill.read(name), x.transpose(0, -1)) and spill.read(name).dtype == dtype


def test_one_tensor_of_each_side_is_in_memory_at_a_time(monkeypatch):
    """What is read of the file lives no longer than its comparison, however deep the model is."""
    alive: list[weakref.ref] = []
    most = 0
    original = Spill.read

    def counted(self, name):
        nonlocal most
        x = original(self, name)
        alive.append(weakref.ref(x))
        most = max(most, sum(r() is not None for r in alive))
        return x

    monkeypatch.setattr(Spill, "read", counted)
    model = models.ours("small", n_layers=6)
    n = len(compare(variant(model), variant(copy.deepcopy(model)), models.ids(tokens=5)).points)
    # one that is compared, and one that was put into the model and is still read
    # there as the residual stream
    assert len(alive) == 2 * n and most <= 4


# ---- ways


def test_kernels_are_put_back_and_parameters_of_the_model_stay():
    model = models.ours()
    before = {n: p.clone() for n, p in model.named_parameters()}
    for way in ("bfloat16", "float64", "reference"):
        compare(variant(model), variant(model, way), models.ids())
    with pytest.raises(RuntimeError), reference_kernels():
        raise RuntimeError
    assert dispatch._replace is None
    assert all(
        torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in model.named_parameters()
    )


def test_precision_is_of_parameters_and_not_of_rotary_tables():
    model = in_precision(copy.deepcopy(models.ours()), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and {
        b.dtype for b in model.buffers()
    } == {torch.float32}


@pytest.mark.parametrize(
    ("side_of", "name", "path"),
    [
        ("ours", "layers.1.ffn", "layers.1.ffn"),
        ("ours", "final_norm", "final_norm"),
        ("theirs", "layers.1.ffn", "model.layers.1.mlp"),
        ("theirs", "layers.0.attention", "model.layers.0.self_attn"),
        ("theirs", "layers.0.q", "model.layers.0.self_attn.q_proj"),
        ("theirs", "model.layers.0.mlp", "model.layers.0.mlp"),
    ],
)
def test_modules_go_by_their_own_names_or_by_those_of_points(side_of, name, path):
    one = variant(models.ours() if side_of == "ours" else models.theirs("llama-2"))
    assert module_path(one.model, one.where, name) == path


@pytest.mark.parametrize(
    ("side_of", "how"),
    [("ours", "reference"), ("ours", "float64"), ("theirs", "float64"), ("theirs", "bf16")],
)
def test_one_module_alone_is_computed_otherwise_and_put_back(side_of, how):
    model = models.ours() if side_of == "ours" else models.theirs("llama-2")
    one, ids = variant(model), models.ids()
    # the plain kernels of attention sum in another order; those of the feed-forward happen to agree
    # to the bit on some machines
    part = "layers.1.attention"

    def around():
        return swapped(model, one.where, part, how)

    found = compare(one, replace(one, around=around), ids)
    changed = {c.point.name for c in found.points if c.added_err}
    assert changed and all(n.startswith("layers.1.") for n in changed)
    assert compare(one, variant(model), ids).logits.rel_err == 0


def test_what_only_our_model_has_is_refused_elsewhere():
    with pytest.raises(UsageError, match="only models of this stack"):
        variant(models.theirs("llama-2"), "reference")
    with pytest.raises(UsageError, match="unknown compute mode faster"):
        variant(models.ours(), "faster")
    one = variant(models.ours())
    for module, how in (
        ("layers.1.ffn", "eager"),
        ("layers.1.ffn", "faster"),
        ("layers.1.fnn", "float64"),
    ):
        with pytest.raises(UsageError), swapped(one.model, one.where, module, how):
            pass


def test_moments_about_a_sampled_shift_are_the_same():
    """What other devices than a CPU do, where asking for a second pass would make them wait."""
    x = torch.randn(4, 90, 33, generator=torch.Generator().manual_seed(8)) * 3 + 70
    x_RC = x.flatten(0, 1)
    shifted = stats._moments(x_RC, stats._sample(x_RC).mean(), BufferPool())
    gatherer = stats.Gatherer()
    gatherer.see(Point("x", None, "x", 0), x)
    plain = gatherer.finish()["x"]
    found = stats._stat(plain.support, *shifted, stats._sample(x_RC))
    for name in (
        "mean",
        "std",
        "rms",
        "absmax",
        "kurtosis",
        "top_token_energy_frac",
        "argmax",
        "frac_zero",
        "frac_nonfinite",
    ):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-5), name


def test_the_folder_of_tensors_is_gone_afterwards(monkeypatch, tmp_path):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compare(variant(models.ours()), variant(models.ours()), models.ids())
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_half_precision_of_a_wide_model_hides_no_operation_that_is_off_by_a_twentieth(factor):
    """ε·√width is a fifth here; rounding adds 0.0036."""
    cfg = ModelConfig(
        d_model=768, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=96, d_ff=1024, max_seq_len=64
    )
    good, bad = (
        variant(build_model(cfg, models.VOCAB, seed=0).eval(), "bfloat16") for _ in range(2)
    )
    precise = variant(build_model(cfg, models.VOCAB, seed=0).eval())
    assert compare(precise, good, models.ids()).first_divergence is None
    ffn = bad.model.layers[1].ffn
    original = ffn.down.forward
    ffn.down.forward = lambda x: original(x) * factor
    assert compare(precise, bad, models.ids()).first_divergence.point.name == "layers.1.ffn.out"
    assert bisect(precise, bad, models.ids()).tolerance == FAR


def test_rounding_is_granted_for_the_precision_a_side_says_it_computes_in():
    good = variant(models.ours())
    around = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    said = compare(good, replace(good, around=around, computes=torch.bfloat16), models.ids())
    assert said.first_divergence is None and said.logits.rel_err > 1e-4
    unsaid = compare(good, replace(good, around=around), models.ids())
    assert unsaid.first_divergence.point.name == "layers.0.q", (
        "half precision that nobody declared is a finding"
    )
