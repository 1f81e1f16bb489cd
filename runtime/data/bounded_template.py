"""Jinja for strangers' templates: within Jinja's sandbox, and with bounds on the time and the memory that a template
takes.

A template is a program. Its work is counted in steps before it is done: iterations of loops, calls, and the sizes of
what is printed, joined and compared. The language is that of published chat templates, without filters, methods and
functions whose work cannot be predicted from their arguments. A count rather than a clock ends a template, so that the
same template and messages always have the same result.
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
"""steps that any template may take: about a second"""
STEPS_PER_CHARACTER = 8
"""further steps for each character of what it renders"""
PER_STEP = 16
"""characters that are copied or compared in the time of a step"""
LONGEST = 1 << 20
"""characters of a template"""
BITS, EXPONENT, DECIMALS, INDENT, LEVELS = 256, 64, 20, 16, 100
"""limits: bits of a whole number, exponent of a power, decimals of a rounded number, indentation of a text, depth of
JSON
"""
FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float forceescape indent int items join last length"
    " list lower map max min reject rejectattr replace reverse round safe select selectattr sort string title tojson"
    " trim unique upper wordcount"
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
"""tests that read what is in lists and objects"""
METHODS: dict[type, frozenset[str]] = {
    kind: frozenset(names.split(" "))
    for kind, names in {
        str: (
            "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit islower"
            " isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace"
            " rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
        ),
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
            name: self._counting(name, function) for name, function in self.filters.items() if name in FILTERS.split()
        }
        self.filters |= {_WEIGHED: pass_context(lambda _, value: self._spend_deep(value))}
        self.filters |= {_COUNTED: pass_context(lambda _, value: self._counted_items(value))}
        self.filters |= {_SLICED: pass_context(lambda _, value: self._spend_shallow(value))}
        self.tests |= {
            name: self._counting(name, cast("Callable[..., Any]", self.tests[name]), deep=True) for name in COMPARING
        }

    def replace_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Make `function` the filter `name`."""
        self.filters[name] = self._counting(name, function)

    def allow(self, characters: int) -> None:
        """Begin to count the steps of a rendering of so many characters."""
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

    # --- counting steps ---

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise jinja2.TemplateError("it takes more time or memory than a template may")

    def _spend_characters(self, characters: int) -> None:
        self._spend(1 + characters // PER_STEP)

    def _spend_deep(self, value: Any) -> Any:
        """`value`; counts steps for it and for everything in it."""
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                self._spend_characters(len(item))
            elif isinstance(item, dict | list | tuple | set | frozenset):
                self._spend(1 + len(item))
                pending += [*item, *item.values()] if isinstance(item, dict) else item
            elif isinstance(item, Namespace):
                pending.append(item._Namespace__attrs)
            else:
                self._spend(1 + (len(item) if isinstance(item, range) else 0))
        return value

    def _spend_shallow(self, value: Any) -> Any:
        """`value`; counts steps for it without what is in it."""
        if isinstance(value, str | dict | list | tuple | range):
            self._spend(len(value) // PER_STEP if isinstance(value, str) else len(value))
        self._spend(1)
        return value

    def _weight(self, value: Any) -> int:
        before = self._left
        self._spend_deep(value)
        return before - self._left

    def _counted_items(self, value: Iterable[Any]) -> Iterator[Any]:
        for item in value:
            self._spend(1)
            yield item

    # --- operators, calls and filters ---

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = [operand for operand in (left, right) if isinstance(operand, str | list | tuple)]
        if operator == "%" and isinstance(left, str):
            if PADDED.search(left):
                raise SecurityError("fields of a format may have no width")
            self._spend((1 + left.count("%")) * self._weight(right) + len(left))
        elif operator == "**" and not (abs(left) < 1 << BITS and abs(right) <= EXPONENT):
            raise SecurityError(f"powers go to {EXPONENT}")
        elif operator == "*" and sized:
            self._spend(max(1, *(side for side in (left, right) if isinstance(side, int)), 1) * (1 + len(sized[0])))
        else:
            self._spend(
                1 + sum(map(len, sized)) // PER_STEP + sum(len(side) for side in sized if not isinstance(side, str))
            )
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > BITS:
            raise SecurityError(f"whole numbers have up to {BITS} bits")
        return result

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        kind = next((kind for kind in METHODS if isinstance(owner, kind)), None)
        if kind is not None and name not in METHODS[kind]:
            raise SecurityError(f"there is no method {name!r}")
        if isinstance(owner, str):
            if name == "join" and args:
                args = (list(self._counted_items(args[0])), *args[1:])
            self._spend_method(owner, name, args, kwargs)
        elif isinstance(owner, dict | list | tuple):
            self._spend(len(owner))
            self._spend_deep(args)
        elif isinstance(called, Macro | LoopContext | BlockReference | Joiner | Undefined):
            for argument in (*args, *kwargs.values()):
                self._spend_shallow(argument)
        elif (
            any(called is argument for argument in self._functions)
            or isinstance(owner, Cycler | LoopContext)
            or hasattr(called, "counts_itself")
        ):
            self._spend_deep(args)
        else:
            raise SecurityError(f"{called!r} cannot be called")
        return super().call(context, called, *args, **kwargs)

    def _spend_method(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count steps for a call of a method of `text`, or of the filter of that name, by the size of what it may
        make.
        """
        self._spend(1 + (len(text) // 4 if "split" in name else len(text) // PER_STEP))
        if name in ("center", "ljust", "rjust", "zfill"):
            self._spend_characters(max((argument for argument in args if isinstance(argument, int)), default=0))
        elif name == "join" and args:
            self._spend_deep(args[0])
            self._spend(len(args[0]) * (1 + len(text) // PER_STEP))
        elif name == "replace":
            old, new = (*map(str, args), *map(str, kwargs.values()), "", "")[:2]
            self._spend((1 + len(text) // max(1, len(old))) * (1 + len(new) // PER_STEP))
        else:
            self._spend_deep(args)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__
        if value.__name__ != "format" or any(spec for _, _, spec, _ in string.Formatter().parse(text)):
            raise SecurityError("fields of a format may have no width")

        def formatted(*args: Any, **kwargs: Any) -> str:
            self._spend((1 + text.count("{")) * self._weight((args, kwargs)) + len(text))
            return wrapped(*args, **kwargs)

        formatted.counts_itself = True  # type: ignore[attr-defined]
        return formatted

    def _counting(self, name: str, function: Callable[..., Any], *, deep: bool = False) -> Callable[..., Any]:
        """A filter or test that counts what it is given before its work."""
        leading = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            value, *rest = args[leading:] or (None,)
            if deep or name in DEEP:
                weight = self._weight((value, rest, kwargs))
                numbers = [argument for argument in (*rest, *kwargs.values()) if isinstance(argument, int)]
                if name in ("indent", "tojson") and max(numbers, default=0) > INDENT:
                    raise SecurityError(f"texts are indented by up to {INDENT}")
                if name == "tojson" and _is_deep(value):
                    raise SecurityError(f"JSON is written up to {LEVELS} deep")
                if name == "join":
                    items = list(self._counted_items(value))
                    self._spend_deep(items)
                    self._spend(len(items) * self._weight((rest, kwargs)))
                    args = (*args[:leading], items, *rest)
                elif name == "replace":
                    self._spend_method(str(value), name, tuple(rest), kwargs)
                elif name == "indent":
                    self._spend(weight * self._weight((rest, kwargs)) * 2)
                elif name == "tojson":
                    self._spend(weight * (1 + max(numbers, default=0)))
            else:
                for argument in (value, *rest, *kwargs.values()):
                    self._spend_shallow(argument)
            if name == "round" and any(
                abs(argument) > DECIMALS for argument in (*rest, *kwargs.values()) if isinstance(argument, int)
            ):
                raise SecurityError(f"numbers are rounded to up to {DECIMALS} decimals")
            return function(*args, **kwargs)

        return counting


_WEIGHED, _COUNTED, _SLICED = " weighed", " counted", " sliced"
"""filters that no template can name"""


def _measure(node: nodes.Node) -> None:
    """Wrap the operands of a template's node, so that the work that Python does with them is counted before."""

    def through(name: str, inner: Any) -> nodes.Filter:
        return nodes.Filter(inner, name, [], [], None, None, lineno=inner.lineno)

    if isinstance(node, nodes.For):
        node.iter = through(_COUNTED, node.iter)
    elif isinstance(node, nodes.Concat):
        node.nodes = [through(_WEIGHED, part) for part in node.nodes]
    elif isinstance(node, nodes.Compare):
        node.expr = through(_WEIGHED, node.expr)
        for operand in node.ops:
            operand.expr = through(_WEIGHED, operand.expr)
    elif isinstance(node, nodes.Output):
        texts = [
            nodes.Const(part.data, lineno=part.lineno) if isinstance(part, nodes.TemplateData) else part
            for part in node.nodes
        ]
        node.nodes = [through(_WEIGHED, part) for part in texts]
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
            item
            for container in level
            if isinstance(container, dict | list | tuple)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return False
    return True
