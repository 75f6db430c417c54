"""Products of oneDNN against float64: a linear layer, the head, and what is left to torch.
R rows, D inputs, M outputs, V vocabulary
"""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from stackproof.contracts import kernel_reference as reference
from stackproof.kernels import cross_entropy, onednn
from tests.kernels.support import broken, compare, double, flipped, gradients, is_red, walled
from tests.kernels.test_linear_cross_entropy import check as check_loss

F32 = torch.float32
head = partial(cross_entropy.linear_cross_entropy, by_onednn=True)

pytestmark = pytest.mark.skipif(bool(onednn.WHY_NOT), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch):
    monkeypatch.setattr(onednn, "LEAST_MULTIPLY_ADDS", 0)


def check(linear, lead: tuple[int, ...], D: int, M: int, bias: bool) -> None:
    x, weight = (
        walled(torch.randn(*lead, D).requires_grad_()),
        walled(torch.randn(M, D).requires_grad_()),
    )
    given = (x, weight, torch.randn(M, requires_grad=True)) if bias else (x, weight)
    wide, grad = double(*given), walled(torch.randn(*lead, M))
    got, want = linear(*given), reference.linear(*wide)
    for what, a, b in zip(
        ("y", "dx", "dweight", "dbias"),
        (got, *gradients(got, given, [grad])),
        (want, *gradients(want, wide, [grad])),
    ):
        compare(what, a, b, F32)


SIZES = [
    ((1,), 3, 5),
    ((2, 17), 24, 40),
    ((3, 65), 40, 24),
    ((130,), 127, 3),
    ((4, 2, 9), 1, 33),
    ((2, 1000), 64, 96),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("lead", "D", "M"), SIZES)
def test_a_linear_layer_equals_float64(lead, D, M, bias):
    """Inputs lie in buffers of NaN with gaps between rows. Measured worst case 5.8e-07."""
    check(onednn.linear, lead, D, M, bias)


def test_gradients_lie_as_their_parameters_do():
    for D, M in ((24, 40), (40, 24)):
        x, weight = torch.randn(3, 7, D, requires_grad=True), torch.randn(M, D, requires_grad=True)
        dx, dweight = gradients(onednn.linear(x, weight), (x, weight), [torch.randn(3, 7, M)])
        assert dx.is_contiguous() and dweight.is_contiguous()


def test_only_gradients_that_are_wanted_are_computed(monkeypatch):
    asked = []
    monkeypatch.setattr(onednn, "_weight_gradient", lambda *a: asked.append("weight"))
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    assert onednn.linear(x, weight).sum().backward() is None and x.grad is not None and asked == []


def test_a_wrong_scale_and_a_turned_channel_are_seen():
    x, weight = torch.randn(40, 24), torch.randn(16, 24)
    got, want = onednn.linear(x, weight), reference.linear(*double(x, weight))
    assert not is_red("output", got, want, F32)
    assert is_red("1 % more", got * 1.01, want, F32) and is_red(
        "one channel", flipped(got), want, F32
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('weight_MD, bias_M, "none"', 'weight_MD, None, "none"'),
        ("return outputs(grad_RM, weight_MD.T)", "return outputs(grad_RM, weight_MD.T.abs())"),
        (
            "return outputs(x_RD.T, grad_RM.T).T.contiguous()",
            "return outputs(x_RD[1:].T, grad_RM[1:].T).T.contiguous()",
        ),
        ("F.pad(x_RD, (0, 0, 0, missing))", "F.pad(x_RD, (0, 0, 0, missing), value=1.0)"),
        ("grad.flatten(0, -2).sum(0) if", "grad.flatten(0, -2).mean(0) if"),
    ],
)
def test_a_broken_copy_is_caught(tmp_path, old, new):
    copy = broken(onednn, old, new, tmp_path)
    copy.LEAST_MULTIPLY_ADDS = 0
    with pytest.raises(AssertionError, match="errors"):
        check(copy.linear, (2, 17), 24, 40, bias=True)


@pytest.mark.parametrize(
    ("dtype", "autocast", "least"),
    [(torch.float64, False, 0), (torch.bfloat16, False, 0), (F32, True, 0), (F32, False, 10**6)],
)
def test_what_is_not_for_it_is_torchs_to_the_bit(monkeypatch, dtype, autocast, least):
    monkeypatch.setattr(onednn, "outputs", None)
    monkeypatch.setattr(onednn, "LEAST_MULTIPLY_ADDS", least)
    x, weight, bias = (
        torch.randn(5, 8, dtype=dtype),
        torch.randn(6, 8, dtype=dtype),
        torch.randn(6, dtype=dtype),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = onednn.linear(x, weight, bias)
        assert got.dtype == (torch.bfloat16 if autocast else dtype) and torch.equal(
            got, F.linear(x, weight, bias)
        )


@pytest.mark.parametrize("bias", [torch.randn(12)[::2], torch.randn(1).expand(6)])
def test_a_bias_that_does_not_lie_dense_is_torchs_to_the_bit(bias):
    """oneDNN reads a bias without asking for its strides."""
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    assert torch.equal(onednn.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("width", "bias"), [(7, None), (8, torch.randn(5)), (8, torch.randn(6, dtype=torch.float64))]
)
def test_what_does_not_fit_is_refused_as_torch_refuses_it(width, bias):
    with pytest.raises(RuntimeError) as ours:
        onednn.linear(torch.randn(5, width), torch.randn(6, 8), bias)
    with pytest.raises(RuntimeError) as theirs:
        F.linear(torch.randn(5, width), torch.randn(6, 8), bias)
    assert str(ours.value) == str(theirs.value) and "primitive" not in str(ours.value)


def test_a_small_product_becomes_a_large_one_at_the_limit(monkeypatch):
    calls, original = [], onednn.outputs
    monkeypatch.setattr(onednn, "outputs", lambda *a: calls.append(1) or original(*a))
    monkeypatch.setattr(onednn, "LEAST_MULTIPLY_ADDS", 3 * 5 * 8)
    onednn.linear(torch.ones(3, 8), torch.ones(5, 8))
    assert len(calls) == 1
    onednn.linear(torch.ones(2, 8), torch.ones(5, 8))
    assert len(calls) == 1


def test_few_numbers_of_rows_reach_onednn_and_little_is_added_to_them(monkeypatch):
    """Each number is a program that it writes and keeps.
    At most eight for each doubling, an eighth more rows.

    D 2 and M 3: what is neither is the number of rows, in the weight gradient the inner dimension.
    """
    seen, original = {"y": {}, "dx": {}, "dw": {}}, onednn.outputs

    def counting(a, b, *rest):
        product = (
            "dw"
            if a.shape[0] in (2, 3) and b.shape[0] in (2, 3)
            else "y"
            if a.shape[1] == 2
            else "dx"
        )
        seen[product].setdefault(a.shape[1] if product == "dw" else len(a), set()).add(n_rows)
        return original(a, b, *rest)

    monkeypatch.setattr(onednn, "outputs", counting)
    for n_rows in range(4, 1025):
        y = onednn.linear(
            torch.ones(n_rows, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
        )
        assert y.shape == (n_rows, 3)
        y.sum().backward()
    for product in seen.values():
        assert set(range(4, 17)) | {1024} <= set(product) and len(product) == 13 + 6 * 8
        assert all(n <= rows <= n * 1.125 for rows, given in product.items() for n in given)


@pytest.mark.parametrize("n_rows", [16, 17])
def test_what_it_returns_can_be_changed_in_place_like_torchs(n_rows):
    """With and without rows filled up."""
    x, weight = torch.randn(2, n_rows, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    found = []
    for linear in (onednn.linear, reference.linear):
        y = linear(x, weight)
        y[0].zero_()
        y.mul_(3)
        found.append([y, *gradients(y, (x, weight), [torch.ones_like(y)])])
    for a, b in zip(*found):
        compare("in place", a, b, F32)


def test_twice_the_same_bits():
    def once():
        torch.manual_seed(5)
        x, weight = (
            torch.randn(2, 700, 64, requires_grad=True),
            torch.randn(96, 64, requires_grad=True),
        )
        y = onednn.linear(x, weight)
        return [y, *gradients(y, (x, weight), [torch.randn(2, 700, 96)])]

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_compiled_it_is_the_same():
    given = torch.randn(4, 9, 16, requires_grad=True), torch.randn(24, 16, requires_grad=True)
    grad = torch.randn(4, 9, 24)
    graph = torch.compile(lambda *a: 2 * onednn.linear(*a), fullgraph=True)
    got, want = graph(*given), 2 * onednn.linear(*given)
    assert torch.equal(got, want)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(got, given, [grad]), gradients(want, given, [grad]))
    )


def test_gradients_of_gradients_are_refused_not_wrong():
    x = torch.randn(4, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(
        onednn.linear(x, torch.ones(3, 8)).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="autograd"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("softcap", "z_loss", "factors"), [(None, 0.0, (0.25, 0.25)), (6.0, 1e-2, (0.5, 2.0))]
)
@pytest.mark.parametrize(("R", "D", "V"), [(5, 8, 3), (33, 24, 97), (70, 16, 4100)])
def test_the_head_equals_float64(monkeypatch, R, D, V, softcap, z_loss, factors):
    """In one chunk and in several, the last of them shorter. Measured worst case 1.1e-06."""
    for n_bytes in (2**26, 4 * V * 16):
        monkeypatch.setattr(cross_entropy, "HEAD_CHUNK_BYTES", n_bytes)
        check_loss(head, F32, R, D, V, softcap, z_loss, "cpu", factors)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sum_DV.add_(part_DV)", "part_DV"),
        (
            "out_CD.copy_(input_gradient(grad_CV, weight_VD))",
            "out_CD.copy_(input_gradient(grad_CV, weight_VD)).mul_(1.01)",
        ),
        ("outputs(x_CD.T, grad_CV.T)", "outputs(x_CD.T, grad_CV.T).mul_(1.01)"),
    ],
)
def test_a_broken_head_is_caught(monkeypatch, tmp_path, old, new):
    copy = broken(onednn, old, new, tmp_path)
    parts = dict(input_gradient=copy.head_input_gradient, add_head_gradient=copy.add_head_gradient)
    monkeypatch.setattr(cross_entropy, "ONEDNN", replace(cross_entropy.ONEDNN, **parts))
    monkeypatch.setattr(cross_entropy, "HEAD_CHUNK_BYTES", 4 * 97 * 16)
    with pytest.raises(AssertionError, match="errors"):
        check_loss(head, F32, 33, 24, 97, None, 0.0, "cpu")


def test_the_head_without_rows_has_a_gradient_of_zeros():
    for by_onednn in (False, True):
        x, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
        nats, _ = cross_entropy.linear_cross_entropy(
            x, weight, torch.zeros(0, dtype=torch.int64), by_onednn=by_onednn
        )
        nats.backward()
        assert (
            nats.item() == 0
            and torch.equal(weight.grad, torch.zeros(5, 8))
            and x.grad.shape == (0, 8)
        )


def test_the_head_under_autocast_is_torchs(monkeypatch):
    monkeypatch.setattr(onednn, "outputs", None)
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        nats, _ = head(x, weight, torch.zeros(9, dtype=torch.int64))
    nats.backward()
    assert weight.grad.dtype == F32 and weight.grad.any()


def test_the_first_call_imports_no_compiler():
    """Nor does that of attention in chunks: `torch.library.custom_op` would,
    a second and 120 MB of it.
    """
    code = """
import sys, torch
from stackproof.kernels import chunked_attention, onednn
onednn.LEAST_MULTIPLY_ADDS = 0
onednn.linear(torch.ones(4, 8, requires_grad=True), torch.ones(6, 8)).sum().backward()
chunked_attention.attention(*[torch.ones(4, 2, 128, 8, requires_grad=True)] * 3).sum().backward()
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
