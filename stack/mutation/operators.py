"""Mutation operators: small changes of one place of a function, each a mistake that a developer
could make and a reviewer overlook.

The operators and their weights are fixed. A draw that could choose them could be tuned to the
gates.
"""

import ast
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# How often an operator is drawn where it applies, relative to the others: those whose mutants
# mostly end in a traceback are drawn less.
WEIGHTS: Mapping[str, float] = {
    "arithmetic": 3.0,
    "comparison": 2.0,
    "boolean": 1.0,
    "constant": 2.0,
    "axis": 2.0,
    "bounds": 1.0,
    "reduction": 2.0,
    "dropped-statement": 2.0,
    "doubled-statement": 1.0,
    "stale-value": 2.0,
    "skipped-branch": 2.0,
    "dropped-context": 2.0,
    "dropped-call": 2.0,
    "detached": 1.0,
    "swapped-arguments": 0.3,
    "wrong-variable": 0.3,
}

ARITHMETIC: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
COMPARISONS: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
REDUCTIONS: Mapping[str, str] = {
    "sum": "mean",
    "mean": "sum",
    "min": "max",
    "max": "min",
    "amin": "amax",
    "amax": "amin",
    "any": "all",
    "all": "any",
    "argmax": "argmin",
    "argmin": "argmax",
    "floor": "ceil",
    "ceil": "floor",
    "cos": "sin",
    "sin": "cos",
}
AXES = ("dim", "axis")
# Calls that return the type of their input: `x.detach()` becomes `x`, `sorted(x)` becomes `x`.
DROPPED_METHODS = frozenset(
    "clone contiguous detach double float to half bfloat16 abs sqrt clamp exp log neg mT T copy "
    "strip lower rstrip sort".split()
)
DROPPED_FUNCTIONS = frozenset("sorted abs reversed set tuple list round int float".split())


class Change(NamedTuple):
    """Replace the text of `node` by `text`."""

    operator: str
    node: ast.expr | ast.stmt | ast.withitem
    text: str


def changes(
    function: ast.FunctionDef | ast.AsyncFunctionDef, types: Mapping[str, str]
) -> Iterator[Change]:
    """All changes of a function, of its decorators none. `types` are the types that its local
    variables were seen with.
    """
    bound = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
    for statement in _in_order(function.body):
        yield from _of_statement(statement, frozenset(bound))
        for node in _own_expressions(statement):
            yield from _of_expression(node, types)
        bound |= {n.id for n in ast.walk(statement) if _is_stored(n)}


def _in_order(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body and those in them, but not those of a check that only raises."""
    for statement in body:
        if _is_check(statement) or _is_text(statement):
            continue
        yield statement
        for field in ("body", "orelse", "finalbody"):
            yield from _in_order(getattr(statement, field, []))
        for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            yield from _in_order(part.body)


def _is_check(statement: ast.stmt) -> bool:
    """Whether a statement can only raise: on a right run every mutant that raises less is equal."""
    match statement:
        case ast.Assert() | ast.Raise():
            return True
        case ast.If(body=[ast.Raise()], orelse=[]):
            return True
    return False


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _own_expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """The expressions of a statement, without those of the statements in it."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.JoinedStr):
                continue
            waiting.append(child)
            if isinstance(child, ast.expr):
                yield child


def _of_statement(statement: ast.stmt, bound: frozenset[str]) -> Iterator[Change]:
    match statement:
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield Change("dropped-statement", statement, "pass")
            yield Change("doubled-statement", statement, _twice(statement))
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield Change("stale-value", statement, "pass")
        case ast.Assign(targets=[ast.Name(id=name)]) if name in bound:
            yield Change("stale-value", statement, "pass")
        case ast.If(test=test) if not _is_main(test):
            yield Change("skipped-branch", test, "False")
            yield Change("skipped-branch", test, "True")
        case ast.With(items=[ast.withitem(optional_vars=None) as item]):
            yield Change(
                "dropped-context", item.context_expr, "__import__('contextlib').suppress()"
            )
        case ast.Continue() | ast.Break():
            yield Change("dropped-statement", statement, "pass")


def _twice(statement: ast.stmt) -> str:
    text = ast.unparse(statement)
    return f"{text}\n{' ' * statement.col_offset}{text}"


def _is_main(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _of_expression(node: ast.expr, types: Mapping[str, str]) -> Iterator[Change]:
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            if not _is_literal_text(left) and not _is_literal_text(right):
                swapped = ast.BinOp(left, ARITHMETIC[type(op)](), right)
                yield _replaced("arithmetic", node, swapped)
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield _replaced("arithmetic", node, operand)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield _replaced("boolean", node, operand)
        case ast.Compare(left=left, ops=[op], comparators=right):
            swapped = ast.Compare(left, [COMPARISONS[type(op)]()], right)
            yield _replaced("comparison", node, swapped)
        case ast.BoolOp(op=op, values=values):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield _replaced("boolean", node, ast.BoolOp(other, values))
        case ast.IfExp(body=body, orelse=orelse):
            yield _replaced("skipped-branch", node, body)
            yield _replaced("skipped-branch", node, orelse)
        case ast.Constant(value=value):
            for other in _other_constants(value):
                yield Change("constant", node, repr(other))
        case ast.Subscript(value=value, slice=ast.Slice() as part):
            for bounds in _other_bounds(part):
                yield _replaced("bounds", node, ast.Subscript(value, bounds, node.ctx))
        case ast.Call():
            yield from _of_call(node)
        case ast.Name(id=name, ctx=ast.Load()) if name in types:
            for other in sorted(n for n, t in types.items() if t == types[name] and n != name):
                yield Change("wrong-variable", node, other)


def _of_call(call: ast.Call) -> Iterator[Change]:
    match call:
        case ast.Call(func=ast.Attribute(value=value, attr=name) as method, args=arguments):
            if name in REDUCTIONS:
                other = ast.Attribute(value, REDUCTIONS[name], method.ctx)
                yield _replaced("reduction", call, ast.Call(other, arguments, call.keywords))
            if name in DROPPED_METHODS:
                yield _replaced("dropped-call", call, value)
            if name in ("sum", "mean", "softmax", "log_softmax", "matmul"):
                yield Change("detached", call, f"{ast.unparse(call)}.detach()")
        case ast.Call(func=ast.Name(id=name), args=[first, *_]):
            if name in REDUCTIONS:
                other = ast.Name(REDUCTIONS[name], ast.Load())
                if name not in ("sum", "mean"):  # Python has no mean
                    yield _replaced("reduction", call, ast.Call(other, call.args, call.keywords))
            if name in DROPPED_FUNCTIONS and len(call.args) == 1:
                yield _replaced("dropped-call", call, first)
    match call.args:
        case [first, second, *rest] if not isinstance(first, ast.Starred) and not isinstance(
            second, ast.Starred
        ):
            swapped = ast.Call(call.func, [second, first, *rest], call.keywords)
            yield _replaced("swapped-arguments", call, swapped)
    for keyword in call.keywords:
        if keyword.arg in AXES and (axis := _integer(keyword.value)) is not None:
            other = 0 if axis else 1
            yield Change("axis", keyword.value, repr(other))


def _replaced(operator: str, node: ast.expr, other: ast.expr) -> Change:
    return Change(operator, node, f"({ast.unparse(other)})")


def _is_literal_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _integer(node: ast.expr) -> int | None:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            return -value
    return None


def _other_constants(value: object) -> tuple[object, ...]:
    match value:
        case bool():
            return (not value,)
        case int():
            return (value + 1, value - 1)
        case float():
            return (value * 2, value / 2) if value else (1.0,)
    return ()


def _other_bounds(part: ast.Slice) -> Iterator[ast.Slice]:
    """One further or one less at the given ends of a slice."""
    one = ast.Constant(1)
    for op in (ast.Add(), ast.Sub()):
        if part.lower is not None:
            yield ast.Slice(ast.BinOp(part.lower, op, one), part.upper, part.step)
        if part.upper is not None:
            yield ast.Slice(part.lower, ast.BinOp(part.upper, op, one), part.step)
