"""Jinja for strangers' templates: within Jinja's sandbox, and with bounds on the time and the memory that a template takes.

A template is a program. Every step of it is counted before it is taken, and what a step makes by its size: turns of a loop, calls, what
is printed, joined, compared. The language is that of published chat templates; filters, methods and functions whose work cannot be
foretold from what they are given are left out. Counting rather than a clock says when it is enough, so that the same template and
messages always have the same result.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace

STEPS = 2_000_000
"""that a template may take whatever it renders: about a second"""
STEPS_PER_CHARACTER = 8
"""that it may take beside, for each character of what it renders"""
PER_STEP = 16
"""characters that are copied or compared in the time of a step"""
LONGEST = 1 << 20
"""characters of a template"""
BITS, EXPONENT, DECIMALS, INDENT, LEVELS = 256, 64, 20, 16, 100
"""of whole numbers, of powers, of a rounded number, of JSON"""
FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float forceescape indent int items join last length list lower map max"
    " min reject rejectattr replace reverse round safe select selectattr sort string title tojson trim unique upper wordcount"
)
DEEP = (
    "dictsort",
    "join",
    "max",
    "min",
    "replace",
    "sort",
    "string",
    "tojson",
    "unique",
    "e",
    "escape",
    "forceescape",
    "indent",
)
"""filters that read what is in lists and objects"""
COMPARING = (
    "eq",
    "equalto",
    "==",
    "ne",
    "!=",
    "lt",
    "lessthan",
    "<",
    "gt",
    "greaterthan",
    ">",
    "ge",
    ">=",
    "le",
    "<=",
    "in",
)
"""tests that do"""
METHODS: dict[type, frozenset[str]] = {
    kind: frozenset(names.split(" "))
    for kind, names in {
        str: "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace"
        " istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit"
        " rstrip split splitlines startswith strip swapcase title upper zfill",
        dict: "copy get items keys values",
        list: "copy count index",
        tuple: "count index",
    }.items()
}
PADDED = re.compile(r"%[^%a-zA-Z]*[\d*]")
"""a field of a format with a width"""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An environment whose templates are rendered within `allowing`.

    A template that takes too much, or asks for what is left out, raises a TemplateError.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, extensions: list[str | type[Extension]], functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self._left = 0
        self.globals = {"range": safe_range, "dict": dict, "cycler": Cycler, "joiner": Joiner, "namespace": Namespace}
        self.globals |= functions
        self._functions = tuple(self.globals.values())
        self.filters = {
            name: self._counting(name, one) for name, one in self.filters.items() if name in FILTERS.split()
        }
        self.filters |= {_WEIGHED: pass_context(lambda _, value: self._weighed(value))}
        self.filters |= {_COUNTED: pass_context(lambda _, value: self._turns(value))}
        self.filters |= {_SLICED: pass_context(lambda _, value: self._shallow(value))}
        self.tests |= {
            name: self._counting(name, cast("Callable[..., Any]", self.tests[name]), deep=True) for name in COMPARING
        }

    def replaced(self, name: str, function: Callable[..., Any]) -> None:
        """Have the filter `name` be `function`."""
        self.filters[name] = self._counting(name, function)

    def allow(self, characters: int) -> None:
        """Begin a rendering of so many characters."""
        self._left = STEPS + STEPS_PER_CHARACTER * characters

    def compiled(self, source: str) -> jinja2.Template:
        """The template `source`. Raises TemplateError and whatever Python's compiler does."""
        if len(source) > LONGEST:
            raise jinja2.TemplateError(f"{len(source)} characters, and {LONGEST} are the most")
        self.allow(len(source))
        tree = self.parse(source)
        for node in list(tree.find_all(nodes.Node)):
            _measure(node)
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree, filename="<template>"), self.make_globals(None))

    # --- what is counted ---

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise jinja2.TemplateError("it takes more time or memory than a template may")

    def _copied(self, characters: int) -> None:
        self._spend(1 + characters // PER_STEP)

    def _weighed(self, value: Any) -> Any:
        """`value`, counted with all that is in it, as often as it is in it."""
        rest = [value]
        while rest:
            one = rest.pop()
            if isinstance(one, str):
                self._copied(len(one))
            elif isinstance(one, dict | list | tuple | set | frozenset):
                self._spend(1 + len(one))
                rest += [*one, *one.values()] if isinstance(one, dict) else one
            elif isinstance(one, Namespace):
                rest.append(one._Namespace__attrs)
            else:
                self._spend(1 + (len(one) if isinstance(one, range) else 0))
        return value

    def _shallow(self, value: Any) -> Any:
        """`value`, counted without what is in it."""
        if isinstance(value, str | dict | list | tuple | range):
            self._spend(len(value) // PER_STEP if isinstance(value, str) else len(value))
        self._spend(1)
        return value

    def _weight(self, value: Any) -> int:
        before = self._left
        self._weighed(value)
        return before - self._left

    def _turns(self, value: Iterable[Any]) -> Iterator[Any]:
        for one in value:
            self._spend(1)
            yield one

    # --- what is done ---

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = [one for one in (left, right) if isinstance(one, str | list | tuple)]
        if operator == "%" and isinstance(left, str):
            if PADDED.search(left):
                raise SecurityError("fields of a format may have no width")
            self._spend((1 + left.count("%")) * self._weight(right) + len(left))
        elif operator == "**" and not (abs(left) < 1 << BITS and abs(right) <= EXPONENT):
            raise SecurityError(f"powers go to {EXPONENT}")
        elif operator == "*" and sized:
            self._spend(max(1, *(one for one in (left, right) if isinstance(one, int)), 1) * (1 + len(sized[0])))
        else:
            self._spend(
                1 + sum(map(len, sized)) // PER_STEP + sum(len(one) for one in sized if not isinstance(one, str))
            )
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, int) and made.bit_length() > BITS:
            raise SecurityError(f"whole numbers have up to {BITS} bits")
        return made

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        kind = next((kind for kind in METHODS if isinstance(owner, kind)), None)
        if kind is not None and name not in METHODS[kind]:
            raise SecurityError(f"there is no method {name!r}")
        if isinstance(owner, str):
            if name == "join" and args:
                args = (list(self._turns(args[0])), *args[1:])
            self._priced(owner, name, args, kwargs)
        elif isinstance(owner, dict | list | tuple):
            self._spend(len(owner))
            self._weighed(args)
        elif isinstance(called, Macro | LoopContext | BlockReference | Joiner | Undefined):
            for one in (*args, *kwargs.values()):
                self._shallow(one)
        elif (
            any(called is one for one in self._functions)
            or isinstance(owner, Cycler | LoopContext)
            or hasattr(called, "counts_itself")
        ):
            self._weighed(args)
        else:
            raise SecurityError(f"{called!r} cannot be called")
        return super().call(context, called, *args, **kwargs)

    def _priced(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a call of a method of `text`, or of the filter of that name, by what it may make."""
        self._spend(1 + (len(text) // 4 if "split" in name else len(text) // PER_STEP))
        if name in ("center", "ljust", "rjust", "zfill"):
            self._copied(max((one for one in args if isinstance(one, int)), default=0))
        elif name == "join" and args:
            self._weighed(args[0])
            self._spend(len(args[0]) * (1 + len(text) // PER_STEP))
        elif name == "replace":
            old, new = (*map(str, args), *map(str, kwargs.values()), "", "")[:2]
            self._spend((1 + len(text) // max(1, len(old))) * (1 + len(new) // PER_STEP))
        else:
            self._weighed(args)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        made = super().wrap_str_format(value)
        if made is None:
            return None
        text = value.__self__
        if value.__name__ != "format" or any(spec for _, _, spec, _ in string.Formatter().parse(text)):
            raise SecurityError("fields of a format may have no width")

        def formatted(*args: Any, **kwargs: Any) -> str:
            self._spend((1 + text.count("{")) * self._weight((args, kwargs)) + len(text))
            return made(*args, **kwargs)

        formatted.counts_itself = True  # type: ignore[attr-defined]
        return formatted

    def _counting(self, name: str, function: Callable[..., Any], *, deep: bool = False) -> Callable[..., Any]:
        """A filter or test that counts what it is given before its work."""
        own = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            value, *rest = args[own:] or (None,)
            if deep or name in DEEP:
                weight = self._weight((value, rest, kwargs))
                numbers = [one for one in (*rest, *kwargs.values()) if isinstance(one, int)]
                if name in ("indent", "tojson") and max(numbers, default=0) > INDENT:
                    raise SecurityError(f"texts are indented by up to {INDENT}")
                if name == "tojson" and _is_deep(value):
                    raise SecurityError(f"JSON is written up to {LEVELS} deep")
                if name == "join":
                    items = list(self._turns(value))
                    self._weighed(items)
                    self._spend(len(items) * self._weight((rest, kwargs)))
                    args = (*args[:own], items, *rest)
                elif name == "replace":
                    self._priced(str(value), name, tuple(rest), kwargs)
                elif name == "indent":
                    self._spend(weight * self._weight((rest, kwargs)) * 2)
                elif name == "tojson":
                    self._spend(weight * (1 + max(numbers, default=0)))
            else:
                for one in (value, *rest, *kwargs.values()):
                    self._shallow(one)
            if name == "round" and any(
                abs(one) > DECIMALS for one in (*rest, *kwargs.values()) if isinstance(one, int)
            ):
                raise SecurityError(f"numbers are rounded to up to {DECIMALS} decimals")
            return function(*args, **kwargs)

        return counting


_WEIGHED, _COUNTED, _SLICED = " weighed", " counted", " sliced"
"""filters that no template can name"""


def _measure(node: nodes.Node) -> None:
    """Have what Python does by itself in a node of a template counted before."""

    def through(name: str, inner: Any) -> nodes.Filter:
        return nodes.Filter(inner, name, [], [], None, None, lineno=inner.lineno)

    if isinstance(node, nodes.For):
        node.iter = through(_COUNTED, node.iter)
    elif isinstance(node, nodes.Concat):
        node.nodes = [through(_WEIGHED, one) for one in node.nodes]
    elif isinstance(node, nodes.Compare):
        node.expr = through(_WEIGHED, node.expr)
        for operand in node.ops:
            operand.expr = through(_WEIGHED, operand.expr)
    elif isinstance(node, nodes.Output):
        texts = [
            nodes.Const(one.data, lineno=one.lineno) if isinstance(one, nodes.TemplateData) else one
            for one in node.nodes
        ]
        node.nodes = [through(_WEIGHED, one) for one in texts]
    elif isinstance(node, nodes.Dict):
        for pair in node.items:
            pair.key = through(_WEIGHED, pair.key)
    elif isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            node.node = through(_SLICED, node.node)
        elif not isinstance(node.arg, nodes.Const):
            node.arg = through(_WEIGHED, node.arg)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(LEVELS):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list | tuple)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True
