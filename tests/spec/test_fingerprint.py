"""What re-opens a gate and what does not, on a small tree of checks;
and the table that carries gates over.
"""

import json

import pytest

from stackproof.spec.errors import IntegrityError
from stackproof.spec.fingerprint import Carried, check_source, code_below, read_carried
from stackproof.spec.gates import load_spec

GATE = '''
"""Verdicts."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Verdict:
    """A verdict."""
    outcome: str
    message: str = ""

def decide(ok, message, **measured):
    if any(v != v for v in measured.values()):
        return Verdict("fail", message)
    return Verdict("pass", "") if ok else Verdict("fail", message)

def decide_all(problems, **measured):
    wrong = [message for message in problems if message is not False]
    return decide(not wrong, "; ".join(wrong), **measured)
'''
NUMBERS = '''
import math
from stackproof.spec.errors import DataError

TABLE = {"a": 1.0}
TABLE["b"] = 2.0
for _name in ("c", "d"):
    TABLE[_name] = 3.0
try:
    import numpy as fast
except ImportError:
    fast = None

def spread(values, scale=2.0):
    """Largest difference."""
    if not values:
        raise DataError("there are no values", value="0")
    low, high = min(values), max(values)
    return math.fabs(high - low) * scale * len(TABLE)

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)
'''
CHECK = '''
"""The check."""
import stackproof.contracts.numbers as numbers
from stackproof.contracts.gate import decide
from stackproof.contracts.numbers import spread, even

class Base:
    width: int = 3

def golden(limits, *, loss, rows):
    """Compare."""
    # a comment
    measured = [loss(row) for row in rows if even(row)]
    wide = spread(values=measured)
    backend = numbers.fast
    return decide(wide < limits.wide_max and Base.width == 3, f"too wide: {wide:.3g}", wide=wide, backend=backend)

def unrelated():
    return 1
'''  # noqa: E501


MANY = """
from stackproof.contracts.gate import decide_all

def golden(limits, rows):
    return decide_all([not rows and limits.n < 1 and f"{rows} is odd", limits.n > 2 and "wide"])
"""


@pytest.fixture
def tree(tmp_path):
    for folder in ("contracts", "spec"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "spec/errors.py").write_text("class DataError(Exception):\n    pass\n")
    for name, text in {"gate": GATE, "numbers": NUMBERS, "loss": CHECK, "many": MANY}.items():
        (tmp_path / f"contracts/{name}.py").write_text(text)
    return tmp_path


def digest(root, check: str = "contracts.loss:golden") -> str:
    code_below.cache_clear()
    return code_below(root).hash(check)


def edit(root, file: str, old: str, new: str) -> None:
    path = root / "contracts" / f"{file}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


FREE = {
    "docstring": ("loss", '"""Compare."""', '"""Compare two things, at length."""'),
    "no docstring": ("numbers", '    """Largest difference."""\n', ""),
    "comment": ("loss", "# a comment", "# another comment"),
    "layout": (
        "loss",
        "measured = [loss(row) for row in rows if even(row)]",
        "measured = [\n        loss(row)\n        for row in rows\n        if even(row)\n    ]",
    ),
    "local name": ("loss", "measured", "found"),
    "name in a comprehension": (
        "loss",
        "loss(row) for row in rows if even(row)",
        "loss(r) for r in rows if even(r)",
    ),
    "two local names": (
        "numbers",
        "low, high = min(values), max(values)\n    return math.fabs(high - low)",
        "a, b = min(values), max(values)\n    return math.fabs(b - a)",
    ),
    "annotation": ("numbers", "def even(n):", "def even(n: int) -> bool:"),
    "annotation of a local": ("loss", "wide = spread", "wide: float = spread"),
    "function nobody reaches": ("loss", "return 1", "return 2"),
    "words of a verdict": ("loss", 'f"too wide: {wide:.3g}"', 'f"the spread is {wide:.4f}"'),
    "words of an error": ("numbers", '"there are no values"', '"values are missing"'),
    "import by another path": ("numbers", "import math\n", "from math import fabs\n"),
    "string split in two": ("numbers", '"a": 1.0', '"" "a": 1.0'),
}
DECISIVE = {
    "comparison": ("loss", "wide < limits", "wide <= limits"),
    "limit": ("loss", "wide_max", "wide_min"),
    "constant in a helper": ("numbers", "scale=2.0", "scale=2.5"),
    "type of a constant": ("numbers", "scale=2.0", "scale=2"),
    "table": ("numbers", '"a": 1.0', '"a": 1.5'),
    "later change of a table": ("numbers", 'TABLE["b"] = 2.0', 'TABLE["b"] = 2.5'),
    "loop that changes a table": ("numbers", "TABLE[_name] = 3.0", "TABLE[_name] = 3.5"),
    "module-level branch": ("numbers", "fast = None", "fast = 0"),
    "module that is imported in a branch": (
        "numbers",
        "import numpy as fast",
        "import torch as fast",
    ),
    "function of another package": ("numbers", "math.fabs", "math.sqrt"),
    "operand order": ("numbers", "high - low", "low - high"),
    "local that is another local": ("numbers", "max(values)", "max(low, 0)"),
    "mutual recursion": ("numbers", "n != 0 and even", "n != 1 and even"),
    "class attribute": ("loss", "width: int = 3", "width: int = 4"),
    "keyword-only parameter": ("loss", "*, loss, rows", "*, rows, loss"),
    "how measurements become a verdict": (
        "gate",
        "if any(v != v for v in measured.values())",
        "if False",
    ),
    "field of a verdict": ("gate", 'message: str = ""', 'message: str = "ok"'),
    "value in a message": ("loss", "{wide:.3g}", "{rows}"),
    "error class": ("numbers", "raise DataError", "raise ValueError"),
    "text that is compared": ("numbers", '"a": 1.0', '"x": 1.0'),
}


@pytest.mark.parametrize("change", FREE.values(), ids=FREE)
def test_rewording_is_free(tree, change):
    before = digest(tree)
    edit(tree, *change)
    if change[1] == "import math\n":
        edit(tree, "numbers", "math.fabs", "fabs")
    assert digest(tree) == before


@pytest.mark.parametrize("change", DECISIVE.values(), ids=DECISIVE)
def test_a_change_of_what_is_decided_is_seen(tree, change):
    before = digest(tree)
    edit(tree, *change)
    assert digest(tree) != before


def test_only_the_words_of_a_problem_are_free(tree):
    before = digest(tree, "contracts.many:golden")
    edit(tree, "many", '"wide"', '"much too wide"')
    edit(tree, "many", "{rows} is odd", "{rows} rows")
    assert digest(tree, "contracts.many:golden") == before
    for old, new in (("limits.n < 1", "limits.n < 2"), ("{rows} rows", "{limits} rows")):
        edit(tree, "many", old, new)
        assert digest(tree, "contracts.many:golden") != before
        edit(tree, "many", new, old)
    edit(tree, "many", ', limits.n > 2 and "much too wide"', "")
    assert digest(tree, "contracts.many:golden") != before


def test_renaming_a_helper_and_its_parameter_is_free(tree):
    before = digest(tree)
    for file in ("loss", "numbers"):
        edit(tree, file, "spread", "extent")
    edit(tree, "numbers", "def extent(values,", "def extent(xs,")
    edit(tree, "numbers", "min(values), max(values)", "min(xs), max(xs)")
    edit(tree, "numbers", "if not values", "if not xs")
    edit(tree, "loss", "extent(values=measured)", "extent(xs=measured)")
    assert digest(tree) == before


def test_calling_by_position_is_not_calling_by_another_keyword(tree):
    before = digest(tree)
    edit(tree, "loss", "spread(values=measured)", "spread(scale=measured)")
    assert digest(tree) != before


def test_a_parameter_that_an_unknown_call_names_keeps_its_name(tree):
    edit(tree, "numbers", "len(TABLE)", "len(TABLE) * (lambda scale, low: scale - low)(1, 2)")
    edit(tree, "loss", "backend = numbers.fast", "backend = rows.apply(scale=1)")
    before = digest(tree)
    edit(tree, "numbers", "lambda scale, low", "lambda low, scale")
    assert digest(tree) != before


def test_parameters_of_lambdas_in_decorators_are_names(tree):
    decorated = "@contract(lambda scale, values: scale > 0)\ndef spread"
    edit(tree, "numbers", "def spread", decorated)
    before = digest(tree)
    edit(tree, "numbers", "lambda scale, values: scale", "lambda values, scale: values")
    assert digest(tree) != before


def test_moving_a_definition_is_free(tree):
    before = digest(tree)
    text = (tree / "contracts/numbers.py").read_text()
    (tree / "contracts/arithmetic").mkdir()
    (tree / "contracts/arithmetic/__init__.py").write_text("")
    (tree / "contracts/arithmetic/tables.py").write_text(text)
    (tree / "contracts/numbers.py").unlink()
    edit(tree, "loss", "contracts.numbers", "contracts.arithmetic.tables")
    assert digest(tree) == before
    (tree / "contracts/better.py").write_text(
        (tree / "contracts/loss.py").read_text().replace("golden", "gilded")
    )
    assert digest(tree, "contracts.better:gilded") == before


def test_the_installed_package_name_is_free(tree):
    before = digest(tree)
    for file in ("loss", "numbers"):
        path = tree / f"contracts/{file}.py"
        path.write_text(path.read_text().replace("stackproof.", ""))
    assert digest(tree) == digest(tree, "stackproof.contracts.loss:golden") == before


def test_a_re_export_leads_to_the_definition(tree):
    before = digest(tree)
    (tree / "contracts/front.py").write_text(
        "from stackproof.contracts.numbers import even, spread\n"
    )
    edit(
        tree,
        "loss",
        "from stackproof.contracts.numbers import spread, even",
        "from stackproof.contracts.front import spread, even",
    )
    assert digest(tree) == before


def test_what_cannot_be_followed_is_refused(tree):
    edit(
        tree,
        "loss",
        "from stackproof.contracts.numbers import spread, even",
        "from stackproof.contracts.numbers import *",
    )
    with pytest.raises(IntegrityError, match="star or relative import"):
        digest(tree)
    edit(
        tree,
        "loss",
        "from stackproof.contracts.numbers import *",
        "from stackproof.contracts.numbers import spread, uneven as even",
    )
    with pytest.raises(IntegrityError, match="defines no uneven"):
        digest(tree)
    with pytest.raises(IntegrityError, match="does not exist"):
        digest(tree, "contracts.gate:nothing")


def test_the_form_is_the_same_on_every_python(tree):
    """Golden hashes. Computed with Python 3.11.7, 3.12.1 and 3.13.0."""
    edit(tree, "loss", 'f"too wide: {wide:.3g}"', '""')
    edit(tree, "numbers", "len(TABLE)", "len(f'{high!r:>{scale}} {low=}' 'and' f'{TABLE[\"a\"]:}')")
    assert digest(tree) == "fa790bdf0c9362172eba977c24ad6f32952577c4c381f564f075a2c3c4b77ff6"


def test_source_shows_what_is_hashed(tree):
    code_below.cache_clear()
    source = check_source("contracts.loss:golden", tree)
    assert all(
        part in source
        for part in (
            "def golden",
            "def spread",
            'TABLE["b"] = 2.0',
            "import numpy as fast",
            "class Verdict",
        )
    )
    assert "unrelated" not in source


def test_a_carried_gate_has_two_fingerprints(tmp_path):
    spec = load_spec()
    gate, new = "loss.golden", spec.fingerprint("loss.golden")
    rows = (
        Carried(gate, "a" * 64, "b" * 64, "c" * 40),
        Carried(gate, "b" * 64, new, "d" * 40),
        Carried("loss.other", "e" * 64, new, "d" * 40),
    )
    assert spec.model_copy(update={"carried": rows}).fingerprints(gate) == {new, "b" * 64, "a" * 64}
    assert spec.model_copy(update={"carried": rows[:1]}).fingerprints(gate) == {new}


def test_a_broken_line_of_the_table_is_named(tmp_path):
    path = tmp_path / "carried.jsonl"
    assert read_carried(path) == ()
    path.write_text(
        json.dumps({"gate": "a.b", "old": "x", "new": "y", "commit": "z"}) + '\n{"gate": "a.b"}\n'
    )
    with pytest.raises(IntegrityError, match="line 2"):
        read_carried(path)
