"""A plant that is an edit runs the changed text wherever the function is called, counts it,
and leaves no trace.
"""

import pytest

from stackproof.museum.edit import Edit, edited, find
from stackproof.spec.errors import IntegrityError
from tests.museum import edited_code as code

HERE = "tests.museum.edited_code"


class Count:
    def __init__(self):
        self.n = 0

    def __call__(self):
        self.n += 1


def changing(name, old, new, *, imports=(), count=lambda: None):
    return edited([Edit(f"{HERE}:{name}", old, new, imports)], count)


def test_every_alias_runs_the_changed_text_and_afterwards_the_original():
    before, held = code.mean.__code__, [code.alias]
    with changing("mean", "/ len(values)", "/ (len(values) + 1)"):
        assert code.mean([2, 2, 2]) == code.alias([2, 2, 2]) == held[0]([2, 2, 2]) == 1.5
    assert code.mean.__code__ is before and code.alias([2, 2, 2]) == 2
    assert not [n for n in vars(code) if n.startswith("__plant")]


@pytest.mark.parametrize(
    ("old", "new", "values", "runs"),
    [
        ("total -= value", "total += value", [-1, 5, -2], 2),
        ("total += 100", "total += 0", [500, 1], 1),
        ("        elif value > 100:\n            total += 100\n", "", [500, 1], 2),
        ("            total -= value\n", "", [-1, 5], 1),
        ("value > 100", "value > 3", [1, 2], 2),
        ("scale * total", "total", [1], 1),
        ("total = 0.0", "total = 1.0", [1, 2, 3], 1),
    ],
)
def test_the_changed_place_is_counted_each_time_it_runs(old, new, values, runs):
    count = Count()
    with changing("mean", old, new, count=count):
        code.mean(values)
    assert count.n == runs


def test_a_place_that_never_runs_is_not_counted():
    count = Count()
    with changing("mean", "total -= value", "total += value", count=count):
        code.mean([1, 2])
    assert count.n == 0


def test_defaults_are_changed_and_put_back():
    with changing("mean", "scale=1.0", "scale=3.0"):
        assert code.mean([1]) == 3
    assert code.mean([1]) == 1


def test_imports_come_before_the_changed_text():
    with changing("mean", "scale * total", "math.floor(total)", imports=["import math"]):
        assert code.mean([1.5]) == 1


@pytest.mark.parametrize(
    ("name", "old", "new", "call", "clean", "planted"),
    [
        ("guarded", "x + 1", "x + 2", lambda: code.guarded(1), 2, 3),
        ("remembered", "x * 2", "x * 3", lambda: code.remembered(5), 10, 15),
        ("Counter.up", "self.n += 1", "self.n += 2", lambda: code.Counter().up(), 2, 3),
        ("Counter.double", "2 *", "4 *", lambda: code.Counter().double, 2, 4),
        ("Counter.triple", "3 *", "6 *", lambda: code.Counter().triple, 3, 6),
        ("Counter.fresh", "cls().n", "-cls().n", lambda: code.Counter.fresh(), 1, -1),
        ("Counter.one", "return 1", "return 7", lambda: code.Counter.one(), 1, 7),
        ("Child.up", "+ 10", "+ 20", lambda: code.Child().up(), 12, 22),
    ],
)
def test_decorated_functions_methods_and_closures(name, old, new, call, clean, planted):
    assert call() == clean
    with changing(name, old, new):
        assert call() == planted
    assert call() == clean


def test_a_context_manager_is_changed_inside():
    with changing("opened", "yield x", "yield -x"), code.opened(3) as x:
        assert x == -3


def test_a_contract_still_holds_under_an_edit():
    with changing("guarded", "x + 1", "x + 2"), pytest.raises(Exception, match="x > 0"):
        code.guarded(-1)


def test_several_edits_of_one_function_are_all_made():
    edits = [
        Edit(f"{HERE}:mean", "total = 0.0", "total = 1.0"),
        Edit(f"{HERE}:mean", "/ len(values)", "/ 1"),
    ]
    with edited(edits, lambda: None):
        assert code.mean([2, 2]) == 5


def test_an_error_inside_puts_the_function_back():
    with pytest.raises(ZeroDivisionError), changing("mean", "/ len(values)", "/ 0"):
        code.mean([1])
    assert code.mean([1]) == 1


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("mean", "/ size(values)", "/ 1", "stands there 0 times"),
        ("mean", "total", "sum", "stands there 5 times"),
        ("mean", "scale * total", "scale * total", "changes nothing"),
        ("median", "x", "y", "does not exist"),
        ("Counter.down", "x", "y", "does not exist"),
        ("built_in", "x", "y", "not a Python function"),
        ("Child.up", "super().up()", "1", "closure variables"),
    ],
)
def test_an_edit_that_cannot_be_made_is_refused(name, old, new, message):
    with pytest.raises(IntegrityError, match=message), changing(name, old, new):
        pass


def test_compiled_functions_are_refused():
    torch = pytest.importorskip("torch")
    code.compiled = torch.compile(code.mean)
    try:
        with pytest.raises(IntegrityError, match="compiled"):
            find(f"{HERE}:compiled")
    finally:
        del code.compiled


def test_triton_kernels_are_refused():
    triton = pytest.importorskip("triton")
    code.jitted = triton.jit(code.mean)
    try:
        with pytest.raises(IntegrityError, match="compiled"):
            find(f"{HERE}:jitted")
    finally:
        del code.jitted
