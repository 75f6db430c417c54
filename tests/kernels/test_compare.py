"""The comparison of all kernels on one device: what is timed, what may win, and that the reference
in pieces is the whole one.
"""

import json

import pytest
import torch

from stackproof.contracts import kernel_call
from stackproof.contracts.kernel_call import Case, Layout
from stackproof.contracts.kernel_reference import REFERENCES
from stackproof.contracts.loss import gradient_errors
from stackproof.kernels import choice, compare, dispatch, eager, samples
from stackproof.kernels.table import OPERATIONS
from stackproof.kernels.triton import launch

CPU = torch.device("cpu")
SMALL = {
    "LINEAR": {"cpu": ((6, 5, 4),)},
    "ATTENTION": {"cpu": ((3, 4, 2, 9, 6),)},
    "HEAD": {"cpu": ((7, 5, 11),)},
    "NORM": {"cpu": ((6, 5),)},
    "SWIGLU": {"cpu": ((6, 5),)},
}


@pytest.fixture
def small(monkeypatch):
    for name, sizes in SMALL.items():
        monkeypatch.setattr(samples, name, sizes)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("numbers", [1, 40, 2**20])
def test_the_reference_in_pieces_is_the_whole_one(monkeypatch, op, numbers):
    """Outputs and gradients of every sample, in as many pieces as can be and in one;
    a kernel in float64 gives the same.
    """
    for one in samples.cases(OPERATIONS[op], CPU, torch.float64):
        drawn = one.draw()
        whole = one.results(REFERENCES[op], drawn)
        monkeypatch.setattr(kernel_call, "PIECE_NUMBERS", numbers)
        assert max(gradient_errors(one.expected(drawn), whole).values()) < 1e-12
        by_torch = one.results(dispatch.function_of(OPERATIONS[op].kernels["torch"]), drawn)
        assert (
            max(gradient_errors(by_torch, whole).values()) < 1e-12
            and by_torch.keys() == whole.keys()
        )


def test_pieces_keep_documents_masks_and_shared_heads(monkeypatch):
    start = torch.tensor([[0, 0, 2, 2, 4, 4, 4], [0, 1, 1, 1, 1, 5, 5]])
    heads = [
        Layout((2, n, t, 4), (n * t * 4, t * 4, 4, 1), torch.float64)
        for n, t in ((4, 5), (2, 7), (2, 7))
    ]
    qkv = dict(zip(("q_BNTH", "k_BKSH", "v_BKSH"), heads))
    for seen in (
        {"start_BS": start},
        {"start_BS": start, "window": 2},
        {"mask_B1TS": torch.rand(1, 1, 5, 7) < 0.6},
    ):
        one = Case("attention", qkv | seen, CPU)
        whole = one.results(REFERENCES["attention"], one.draw())
        for numbers in (1, 14, 30, 150):
            monkeypatch.setattr(kernel_call, "PIECE_NUMBERS", numbers)
            assert max(gradient_errors(one.expected(one.draw()), whole).values()) < 1e-12


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_kernel_of_the_table_takes_the_arguments_of_its_reference(op, small):
    """By every kernel that runs here; each function is where the table says."""
    for name, kernel in OPERATIONS[op].kernels.items():
        if not kernel.why_not(CPU):
            for one in samples.cases(OPERATIONS[op], CPU, torch.float32):
                drawn = one.draw()
                got = one.results(dispatch.function_of(kernel), drawn)
                assert max(gradient_errors(got, one.expected(drawn)).values()) < 1e-5, name


def test_strides_and_repeated_dimensions_are_drawn_as_they_were():
    drawn = Layout((2, 3, 4), (0, 1, 3), torch.float32).draw(CPU, torch.Generator().manual_seed(0))
    assert (
        drawn.stride() == (0, 1, 3)
        and torch.equal(drawn[0], drawn[1])
        and len(drawn.unique()) == 12
    )


def raced(kernel, seconds, rel_error=1e-7):
    return compare.Raced(Case("rope", {}, CPU), kernel, seconds, rel_error)


@pytest.mark.parametrize(
    ("of_triton", "wins"),
    [
        ([([1.0, 1.0], 1e-7), ([1.0, 1.9], 1e-7)], True),
        ([([1.0, 1.0], 1e-7), ([1.0, 2.1], 1e-7)], False),
        ([([1.0, 1.0], 1e-7), ([1.0, 1.0], 1e-2)], False),
        ([([1.0, 1.0], 1e-7), ([], None)], False),
    ],
    ids=[
        "faster in every round",
        "slower in one round of one case",
        "wrong in one case",
        "absent in one case",
    ],
)
def test_what_may_win(of_triton, wins):
    cases = [[raced("torch", [2.0, 2.0]), raced("triton", *found)] for found in of_triton]
    assert compare.winner(cases, lambda one: 1e-5) == ("triton" if wins else "torch")


@pytest.mark.usefixtures("small")
def test_a_comparison_names_winners_of_what_has_a_choice(monkeypatch):
    """A kernel that is wrong does not win however fast it is; one that fails is reported."""
    wrong = lambda x, cos, sin: eager.rope(x, cos, sin) * 1.01  # noqa: E731
    real = dispatch.function_of
    monkeypatch.setattr(launch, "why_not", lambda device: "")
    monkeypatch.setattr(
        dispatch,
        "function_of",
        lambda kernel: wrong if kernel.module == "triton.rope" else real(kernel),
    )
    monkeypatch.setattr(compare, "seconds_of", lambda call, times, device: 1.0)
    seen = []
    found = compare.measure(CPU, lambda one: 1e-5, rounds=1, seconds=0.0, on_case=seen.append)
    assert found.winners == {"float32": dict.fromkeys(OPERATIONS, "torch")}
    rows = {(r["operation"], r["kernel"]): r for r in found.rows}
    assert (
        rows["rope", "triton"]["rel_error"] > 5e-3 and rows["rope", "torch"]["times_torch"] == 1.0
    )
    assert len(seen) == len(
        {(r["operation"], r["shapes"]) for r in found.rows}
    ) and not found.why_stale(OPERATIONS["rope"], found.device)


def test_a_kernel_that_fails_is_told_and_does_not_win(monkeypatch, small):
    def failing(*arguments, **options):
        raise RuntimeError("out of memory\nand more")

    real = dispatch.function_of
    monkeypatch.setattr(
        dispatch,
        "function_of",
        lambda kernel: failing if kernel.name == "in_chunks" else real(kernel),
    )
    (one, *_) = samples.cases(OPERATIONS["attention"], CPU, torch.float32)
    torchs, chunks = compare.race(one, ("torch", "chunks"), rounds=1, seconds=0.0)
    assert (
        chunks.missing == "does not run here: out of memory"
        and not chunks.seconds
        and torchs.seconds
    )
    assert compare.winner([[torchs, chunks]], lambda one: 1e-5) == "torch"


def test_doctor_compares_keeps_and_shows(monkeypatch, small, tmp_path, capsys):
    """Once without a comparison and once with; `auto` then takes what won, and says so."""
    from stackproof.cli import doctor

    monkeypatch.setenv("STACKPROOF_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "MEASURED", {})
    monkeypatch.setattr(launch, "why_not", lambda device: "not here")
    doctor.doctor(kernels=False, json=True)
    before = json.loads(capsys.readouterr().out)
    assert {(k["kernel"], k["origin"]) for k in before["kernels"]} == {
        ("torch", "default")
    } and "comparison" not in before
    monkeypatch.setattr(compare, "winner", lambda raced, limit: raced[0][-1].kernel)
    doctor.doctor(kernels=True, json=True)
    after = json.loads(capsys.readouterr().out)
    assert (
        after["comparison"]["winners"]["float32"]["attention"] == "chunks"
        and (tmp_path / "kernels.json").is_file()
    )
    shown = {k["operation"]: k for k in after["kernels"] if k["dtype"] == "float32"}
    assert (
        shown["attention"]["kernel"],
        shown["attention"]["origin"],
        shown["rope"]["kernel"],
    ) == ("chunks", "measured-here", "torch")
    doctor.doctor(kernels=True, json=False)
    printed = capsys.readouterr().out
    assert (
        "attention by chunks, q 3×4×9×6" in printed
        and "written to" in printed
        and "measured-here" in printed
    )
