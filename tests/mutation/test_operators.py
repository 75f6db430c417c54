"""Mutation operators change one place each, and leave checks and texts alone."""

import ast
import textwrap

from stackproof.mutation.operators import WEIGHTS, changes
from stackproof.mutation.sites import replaced


def changed(source: str, **types: str) -> dict[str, set[str]]:
    """The changed bodies of a function by operator."""
    source = textwrap.dedent(source).strip() + "\n"
    found: dict[str, set[str]] = {}
    for change in changes(ast.parse(source).body[0], types):
        body = replaced(source, change).split("\n", 1)[1]
        found.setdefault(change.operator, set()).add(textwrap.dedent(body).strip())
    return found


def test_each_operator_changes_its_place():
    assert changed("def f(a, b):\n    return a + b") == {"arithmetic": {"return (a - b)"}}
    assert changed("def f(a, b):\n    return a < b") == {"comparison": {"return (a <= b)"}}
    assert changed("def f(a):\n    return not a") == {"boolean": {"return (a)"}}
    assert changed("def f(a):\n    return a[:3]")["bounds"] == {
        "return (a[:3 + 1])",
        "return (a[:3 - 1])",
    }
    assert changed("def f(a):\n    return a.sum(dim=-1)") == {
        "reduction": {"return (a.mean(dim=-1))"},
        "detached": {"return a.sum(dim=-1).detach()"},
        "axis": {"return a.sum(dim=0)"},
        "constant": {"return a.sum(dim=-2)", "return a.sum(dim=-0)"},
    }
    assert changed("def f(a):\n    return a.clone()") == {"dropped-call": {"return (a)"}}
    assert changed("def f(a):\n    a = g(a)\n    return a")["stale-value"] == {"pass\nreturn a"}
    assert changed("def f(a):\n    g(a)") == {
        "dropped-statement": {"pass"},
        "doubled-statement": {"g(a)\ng(a)"},
    }
    assert changed("def f(a):\n    if a:\n        return 1\n    return a")["skipped-branch"] == {
        "if False:\n    return 1\nreturn a",
        "if True:\n    return 1\nreturn a",
    }
    assert changed("def f(a):\n    with a():\n        return 1")["dropped-context"] == {
        "with __import__('contextlib').suppress():\n    return 1"
    }
    assert changed("def f(a, b):\n    return g(a, b)") == {
        "swapped-arguments": {"return (g(b, a))"}
    }


def test_a_variable_is_replaced_by_one_of_its_type():
    source = "def f(a, b, c):\n    return a"
    assert changed(source, a="Tensor", b="Tensor", c="int") == {"wrong-variable": {"return b"}}


def test_a_first_value_is_not_dropped():
    assert "stale-value" not in changed("def f(a):\n    b = g(a)\n    return b")


def test_checks_and_texts_stay():
    assert changed('def f(a):\n    """Of 2 + 2."""\n    if a < 0:\n        raise E(1)\n') == {}
    assert changed("def f(a):\n    return f'{a} is 3 + 4'") == {}


def test_every_operator_has_a_weight():
    source = """
        def f(a, b):
            a = a.clone().sum(dim=1) + b[1:]
            if not a or b < 2:
                g(a, b)
            with a():
                return -b
        """
    assert changed(source, a="int", b="int").keys() <= WEIGHTS.keys()
    assert all(weight > 0 for weight in WEIGHTS.values())
