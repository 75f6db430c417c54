"""Linear cross-entropy in chunks against float64. R rows, D d_model, V vocabulary"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stackproof.contracts import kernel_reference as reference
from stackproof.kernels import cross_entropy, eager
from stackproof.kernels.triton import linear_cross_entropy
from stackproof.spec.errors import UsageError
from tests.kernels.support import (
    DEVICE,
    FLOATS,
    Margins,
    broken,
    cases,
    compare,
    double,
    flipped,
    gradients,
    is_red,
    walled,
)

F32, F16, BF16 = FLOATS
VARIANTS = [(None, 0.0), (6.0, 0.0), (None, 1e-2), (6.0, 1e-2)]
SMALL = [
    (F32, 5, 8, 3, None, 0.0),
    (F32, 33, 24, 97, 6.0, 1e-2),
    (F32, 70, 16, 4100, None, 1e-2),
    (F16, 40, 32, 300, None, 1e-2),
    (BF16, 70, 24, 130, 6.0, 0.0),
    (BF16, 70, 24, 130, None, 0.0),
]
SIZES = [(R, 64, V) for R in (5, 65, 1500) for V in (3, 97, 4097)]
FULL = [
    (dtype, *size, *variant) for dtype, size, variant in itertools.product(FLOATS, SIZES, VARIANTS)
]


def inputs(dtype, R, D, V, device, ignored=0.3):
    """Inputs and weights that give logits of a few units, and labels some of which do not count."""
    x = walled(torch.randn(R, D, device=device).to(dtype).requires_grad_())
    weight = walled((torch.randn(V, D, device=device) * 2 / D**0.5).to(dtype).requires_grad_())
    labels = torch.randint(V, (R,), device=device)
    labels[torch.rand(R, device=device) < ignored] = -100
    return x, weight, walled(labels, poison=10**9)


def check(loss, dtype, R, D, V, softcap, z_loss, device, factors=(0.25, 0.25)):
    x, weight, labels = inputs(dtype, R, D, V, device)
    wide = double(x, weight)
    sums = loss(x, weight, labels, softcap=softcap, z_loss=z_loss)
    want = reference.linear_cross_entropy(*wide, labels, softcap=softcap, z_loss=z_loss)
    factors = [torch.tensor(f, device=device) for f in factors]
    assert all(s.dtype == torch.float32 and s.shape == () for s in sums)
    got_and_true = (
        *zip(sums, want),
        *zip(gradients(sums, (x, weight), factors), gradients(want, wide, factors)),
    )
    for what, (a, b) in zip(("nats", "z", "dx", "dweight"), got_and_true):
        compare(what, a, b, dtype)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of rows, the last of them shorter."""
    monkeypatch.setattr(linear_cross_entropy, "MIN_CHUNK", 16)


@pytest.mark.parametrize(
    ("device", "dtype", "R", "D", "V", "softcap", "z_loss"), cases(SMALL, FULL)
)
def test_sums_and_gradients_equal_float64(
    guard, small_chunks, device, dtype, R, D, V, softcap, z_loss
):
    check(linear_cross_entropy.linear_cross_entropy, dtype, R, D, V, softcap, z_loss, device)


@pytest.mark.parametrize("factors", [(0.5, 2.0), (0.5, 0.0), (0.0, 3.0)])
def test_both_sums_have_gradients_of_their_own(small_chunks, factors):
    """The forward's gradients are for equal weights; for others they are found anew."""
    check(linear_cross_entropy.linear_cross_entropy, F32, 40, 16, 90, 6.0, 1e-2, DEVICE, factors)


def test_the_factor_is_not_rounded_to_the_inputs_dtype(small_chunks):
    """A count such as 1021 has no exact inverse in bfloat16; rounded first,
    it would be off for all gradients alike.
    """
    x, weight, labels = inputs(BF16, 40, 16, 90, DEVICE)
    nats, _ = linear_cross_entropy.linear_cross_entropy(x, weight, labels)
    (whole,) = torch.autograd.grad(nats, x, retain_graph=True)
    (part,) = torch.autograd.grad(nats / 1021, x)
    assert torch.equal(part, (whole.double() * (torch.tensor(1.0) / 1021).double()).bfloat16())


def test_no_label_gives_exactly_nothing(small_chunks):
    x, weight, labels = inputs(BF16, 40, 16, 90, DEVICE, ignored=2.0)
    nats, z = linear_cross_entropy.linear_cross_entropy(x, weight, labels, z_loss=0.1)
    assert nats.item() == 0 and z.item() == 0
    assert not any(
        g.any() for g in gradients((nats, z), (x, weight), [torch.ones((), device=DEVICE)] * 2)
    )


@pytest.mark.parametrize("wrong", [90, -1, -101, 10**12])
def test_a_label_out_of_range_is_refused_and_never_counts(wrong, monkeypatch):
    x, weight, labels = (t.detach() for t in inputs(F32, 20, 16, 90, "cpu"))
    labels[7] = wrong
    with pytest.raises(UsageError, match="label"):
        linear_cross_entropy.check(x, weight, labels, -100, None, 0.0)
    if DEVICE == "cpu":
        monkeypatch.setattr(linear_cross_entropy, "check", lambda *_: None)
        assert linear_cross_entropy.linear_cross_entropy(x, weight, labels)[0].isnan()


class Widest(TorchDispatchMode):
    """Remembers the most rows of any matrix as wide as the vocabulary."""

    def __init__(self, V):
        super().__init__()
        self.V, self.rows = V, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == self.V:
            self.rows = max(self.rows, len(out))
        return out


def test_the_logits_are_never_held_as_a_whole(small_chunks, monkeypatch):
    monkeypatch.setattr(cross_entropy, "HEAD_CHUNK_BYTES", 16 * 256 * 4)
    x, weight, labels = inputs(F32, 64, 8, 256, DEVICE)
    seen = {}
    for loss in (linear_cross_entropy.linear_cross_entropy, cross_entropy.linear_cross_entropy):
        with Widest(256) as widest:
            loss(x, weight, labels)[0].backward()
        seen[loss.__module__.rpartition(".")[2]] = widest.rows
    assert seen == {"linear_cross_entropy": 16, "cross_entropy": 16}


def test_autocast_and_a_run_without_gradients(small_chunks):
    x, weight, labels = inputs(F32, 40, 16, 90, DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        nats, _ = linear_cross_entropy.linear_cross_entropy(x, weight, labels)
    want, _ = reference.linear_cross_entropy(
        x.detach().bfloat16().double(), weight.detach().bfloat16().double(), labels
    )
    compare("nats under autocast", nats, want, BF16)
    assert gradients(nats, (x, weight), [torch.ones((), device=DEVICE)])[1].dtype == F32
    with torch.no_grad():
        sums = linear_cross_entropy.linear_cross_entropy(x, weight, labels)
    assert not sums[0].requires_grad
    compare(
        "nats without gradients",
        sums[0],
        reference.linear_cross_entropy(*double(x, weight), labels)[0],
        F32,
    )


@pytest.mark.parametrize(("device", "dtype"), cases([(F32,), (BF16,)], [(d,) for d in FLOATS]))
def test_a_wrong_scale_and_a_turned_channel_are_seen(device, dtype):
    x, weight, labels = inputs(dtype, 30, 16, 90, device)
    wide, one = double(x, weight), [torch.ones((), device=device)]
    (nats, _), (want, _) = (
        linear_cross_entropy.linear_cross_entropy(x, weight, labels),
        reference.linear_cross_entropy(*wide, labels),
    )
    assert not is_red("as it is", nats, want, dtype) and is_red(
        "1 % more", nats * 1.01, want, dtype
    )
    for a, b in zip(gradients(nats, (x, weight), one), gradients(want, wide, one)):
        assert not is_red("as it is", a, b, dtype)
        assert is_red("1 % more", a * 1.01, b, dtype) and is_red(
            "one channel", flipped(a), b, dtype
        )


@pytest.mark.parametrize(
    ("old", "new", "softcap", "z_loss"),
    [
        ("tl.where(v0 + e_E < V, logit_E, float(\"-inf\"))", "logit_E", None, 0.0),
        ("counted = label != ignore_index", "counted = label != label + 1", None, 0.0),
        ("slope_E *= 1.0 - (logit_E / softcap) * (logit_E / softcap)", "slope_E *= 1.0", 6.0, 0.0),
        ("* 2.0 * z_loss * norm", "* z_loss * norm", None, 0.5),
        ("total * tl.exp(top - new)", "total", None, 0.0),
        ("dweight_VD += logits_CV.T", "dweight_VD = logits_CV.T", None, 0.0),
    ],
)  # fmt: skip
def test_a_broken_copy_is_caught(monkeypatch, tmp_path, old, new, softcap, z_loss):
    copy = broken(linear_cross_entropy, old, new, tmp_path)
    monkeypatch.setattr(copy, "MIN_CHUNK", 16)
    monkeypatch.setattr(copy, "BLOCK", 64)
    with pytest.raises(AssertionError, match="errors"):
        check(copy.linear_cross_entropy, F32, 40, 16, 150, softcap, z_loss, DEVICE)


def test_a_copy_without_its_mask_is_caught(monkeypatch, tmp_path):
    margins = Margins()
    margins.install(monkeypatch)
    copy = broken(
        linear_cross_entropy,
        "slope_E.to(logits.dtype.element_ty), mask=inside_E",
        "slope_E.to(logits.dtype.element_ty)",
        tmp_path,
    )
    x, weight, labels = inputs(F32, 40, 16, 90, DEVICE)
    copy.linear_cross_entropy(x, weight, labels)
    with pytest.raises(AssertionError, match="written outside"):
        margins.check()


@pytest.mark.parametrize(("softcap", "z_loss"), VARIANTS)
def test_torchs_own_equal_the_definition(softcap, z_loss):
    x, weight, labels = (
        torch.randn(9, 4, dtype=torch.float64),
        torch.randn(7, 4, dtype=torch.float64),
        torch.randint(7, (9,)),
    )
    labels[::3] = -100
    got = cross_entropy.linear_cross_entropy(x, weight, labels, softcap=softcap, z_loss=z_loss)
    want = reference.linear_cross_entropy(x, weight, labels, softcap=softcap, z_loss=z_loss)
    # float64, another order of sums: measured worst case 6e-16
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    if softcap is None and not z_loss:
        nats, z = eager.library_linear_cross_entropy(x.float(), weight.float(), labels)
        assert nats.item() == pytest.approx(want[0].item(), rel=1e-6) and z.item() == 0
    else:
        with pytest.raises(UsageError, match="neither"):
            eager.library_linear_cross_entropy(x, weight, labels, softcap=softcap, z_loss=z_loss)


def test_what_does_not_fit_is_refused():
    x, weight, labels = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    for bad, options, message in (
        ((x, torch.zeros(5, 3), labels), {}, "fit"),
        ((x, weight, labels[:2]), {}, "fit"),
        ((x, weight, labels.int()), {}, "dtype"),
        ((x, weight.half(), labels), {}, "dtypes differ"),
        ((x.double(), weight.double(), labels), {}, "dtype"),
        ((x, weight, labels), {"softcap": 0.0}, "softcap"),
        ((x, weight, labels), {"z_loss": -1.0}, "z_loss"),
    ):
        with pytest.raises(UsageError, match=message):
            linear_cross_entropy.linear_cross_entropy(*bad, **options)
