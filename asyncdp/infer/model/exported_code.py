"""Text inside an exported program that torch would run as Python: formulas of shapes, guards, names.

Loading a program evaluates its formulas, and calling it runs a function that is pasted together from its
guards and names. All of these come from the file, so each must look like what torch itself writes there.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Nothing of these characters leaves the place in the code where it is pasted.
_is_plain = re.compile(r"[\w .,:/<>@+*-]*").fullmatch
_is_name = re.compile(r"\w*").fullmatch
_ONE_LINE = re.compile(r"[^#\\\r\n]*")
_SYMBOL = re.compile(r"[\w.+-]*")

_FUNCTIONS_OF_SHAPES = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|floor|ceiling|sign|And|Or|Not|true|false|oo|nan"
    r"|Equality|Unequality|Eq|Ne|Ge|Le|Gt|Lt|(Strict)?(Greater|Less)Than|Piecewise|ExprCondPair"
    r"|FloorDiv|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift"
    r"|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat"
    r"|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|OpaqueUnaryFn_\w+|BitwiseFn_\w+"
    r"|[a-z]+\d+"  # a symbol by itself, as older versions of torch write it
)
_NAMES_IN_GUARDS = re.compile(
    r"L|math|torch|max|min|abs|round|int|float|bool"
    r"|cast_symbool_to_symint_guardless|IsNonOverlappingAndDenseIndicator"
)
_ATTRIBUTES_IN_GUARDS = {
    "math": re.compile(r"[a-z]\w*"),
    "torch": re.compile(r"_?sym_\w+"),
    None: re.compile(r"size|stride|storage_offset"),
}

# Operators that read or write a file that the program names.
_USES_FILES = re.compile(r"torch\.ops\.(aten\.(save|from_file)|debugprims)\b.*")
_OPERATOR = re.compile(r"torch\.ops(\.(?!__)\w+){2,3}")

_SYNTAX = (
    *(ast.Expression, ast.Load, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.keyword),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def find_code(program: Any) -> str | None:
    """Return a text that no program of torch's own making holds there, None when there is no such text.

    Args:
        program: contents of `models/*.json` in a `.pt2` file.
    """
    return next(_refused(program, "", free=False), None)


def find_code_in_keys(inputs: Any) -> str | None:
    """Return a key in the example inputs of a program that would leave the guard it is pasted into."""
    return next((repr(key) for key in _keys(inputs) if not _is_plain_key(key)), None)


def _refused(value: Any, key: str, *, free: bool) -> Iterator[str]:
    """Yield refused texts; they are `free` where torch quotes or never runs them: nodes and metadata."""
    free = free or key in ("nodes", "metadata")
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if key != "range_constraints" and not _is_plain(name):
                yield name
            yield from _refused(entry, name, free=free)
    elif isinstance(value, list):
        for entry in value:
            yield from _refused(entry, key, free=free)
    elif isinstance(value, str):
        rule = _RULES.get(key)
        if not (rule(value) if rule else free or _is_plain(value)):
            yield value


def _is_target(text: str) -> bool:
    # That it is an operator at all, torch checks; but not for operators that are arguments.
    return not _USES_FILES.fullmatch(text)


def _is_operator(text: str) -> bool:
    return _OPERATOR.fullmatch(text) is not None and _is_target(text)


def _is_tree(text: str) -> bool:
    return all(_is_plain_key(leaf) for leaf in _leaves(json.loads(text)))


def _leaves(tree: Any) -> Iterator[Any]:
    """Yield what a description of nested inputs or outputs holds; itself where it would import something."""
    if isinstance(tree, Mapping):
        if not {"type", "context", "children_spec"}.issuperset(tree):
            yield tree  # a default factory or an enumeration, named by its module
        yield from _leaves([*tree.values()])
    elif isinstance(tree, list):
        for entry in tree:
            yield from _leaves(entry)
    elif isinstance(tree, str) and tree.startswith(("[", "{", '"')):
        yield from _leaves(json.loads(tree))
    else:
        yield tree


def _keys(inputs: Any) -> Iterator[Any]:
    if isinstance(inputs, Mapping):
        yield from inputs
    if isinstance(inputs, Mapping | list | tuple):
        for entry in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from _keys(entry)


def _is_plain_key(key: Any) -> bool:
    return bool(_is_plain(key)) if isinstance(key, str) else key is None or isinstance(key, int | float)


def _is_formula(text: str) -> bool:
    return _consists_of(text, _is_part_of_formula)


def _is_guard(text: str) -> bool:
    return _consists_of(text, _is_part_of_guard)


def _consists_of(text: str, allows: Callable[[ast.AST], bool]) -> bool:
    # Other parsers take comments and line ends out in another way.
    if not _ONE_LINE.fullmatch(text):
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return all(isinstance(node, _SYNTAX) or allows(node) for node in ast.walk(tree))


def _is_part_of_formula(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        # sympy evaluates a text in the place of a number.
        return not isinstance(node.value, str) or _SYMBOL.fullmatch(node.value) is not None
    if isinstance(node, ast.Name):
        return _FUNCTIONS_OF_SHAPES.fullmatch(node.id) is not None
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def _is_part_of_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or bool(_is_plain(node.value))
    if isinstance(node, ast.Name):
        return _NAMES_IN_GUARDS.fullmatch(node.id) is not None
    if isinstance(node, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else None
        allowed = _ATTRIBUTES_IN_GUARDS.get(owner)
        return allowed is not None and allowed.fullmatch(node.attr) is not None
    return isinstance(node, ast.Subscript) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    )


_RULES: dict[str, Callable[[str], object]] = {
    "expr_str": _is_formula,
    "guards_code": _is_guard,
    "name": _is_name,
    "as_name": _is_name,
    "forward_arg_names": _is_name,
    "target": _is_target,
    "as_operator": _is_operator,
    "in_spec": _is_tree,
    "out_spec": _is_tree,
}
