"""Options that stand once: fields of a dataclass, each with what is said of it and the values that it takes.

A record of options is a frozen dataclass whose fields are made by `option`. What offers the options to people reads them from
there: the command line, the requests of the HTTP service with the forms on its page, and, by `keywords_of`, functions of the
library that take them as keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache, wraps
from types import NoneType, UnionType
from typing import (
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

First = TypeVar("First")
Second = TypeVar("Second")
Third = TypeVar("Third")
Result = TypeVar("Result")
Options = TypeVar("Options")
Keywords = ParamSpec("Keywords")


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the command line, the HTTP service and its page say of an option, and the values that it takes."""

    help: str
    """a sentence or two for a list of options"""
    over_http: str | None = None
    """the same for the service and its page, where values have another form there or others are meant; None: as `help`"""
    label: str | None = None
    """what a form calls it; None: its name"""
    metavar: str | None = None
    """what stands for the value in the command line's help; None: its type"""
    least: float | None = None
    """the smallest value, or of a map its values' smallest"""
    most: float | None = None
    """the largest value; infinite: there is none for the service either"""
    above: float | None = None
    """a number below all values"""
    below: float | None = None
    """a number above all values"""
    choices: tuple[str, ...] = ()
    """the only values, if there are any here"""
    pattern: str | None = None
    """a regular expression for the whole of a text"""
    shortest: int | None = None
    """letters of the shortest text, or of a list its texts' shortest"""
    longest: int | None = None
    """letters of the longest"""
    entries: int | None = None
    """most entries of a map or list"""
    primary: bool = False
    """whether most people need it, so that short lists of options have it"""


def option(default: Any, help_: str, **said: Any) -> Any:
    """A field of a record that commands and requests have as an option; keywords are fields of `Said`."""
    return field(default=default, metadata={"said": Said(help=help_, **said)})


@lru_cache
def said(record: type) -> Mapping[str, Said]:
    """What is said of every option of a record, by its name."""
    return {one.name: one.metadata["said"] for one in fields(record) if "said" in one.metadata}


def default_of(record: type, name: str) -> Any:
    """The value of an option that is not given."""
    return next(one.default for one in fields(record) if one.name == name)


def types_of(record: type, name: str) -> tuple[Any, ...]:
    """The types of an option's values, without None: classes, or a map or sequence with the types of what is in it."""
    kind = _hints(record)[name]
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(one for one in kinds if one is not NoneType)


@lru_cache
def _hints(record: type) -> Mapping[str, Any]:
    return get_type_hints(record)


class keywords_of(Generic[Keywords, Options]):  # noqa: N801  a decorator
    """Decorates a function whose last parameter is a record of options: its callers give the record's fields as keywords.

    Signature and types of the function are those of its other parameters, which have to be required, and of the fields.
    """

    def __init__(self, record: Callable[Keywords, Options]) -> None:
        self._record = record

    @overload
    def __call__(
        self, function: Callable[[First, Options], Result], /
    ) -> Callable[Concatenate[First, Keywords], Result]: ...

    @overload
    def __call__(
        self, function: Callable[[First, Second, Options], Result], /
    ) -> Callable[Concatenate[First, Second, Keywords], Result]: ...

    @overload
    def __call__(
        self, function: Callable[[First, Second, Third, Options], Result], /
    ) -> Callable[Concatenate[First, Second, Third, Keywords], Result]: ...

    def __call__(self, function: Callable[..., Result], /) -> Callable[..., Result]:
        record = cast("Any", self._record)
        of_record = inspect.signature(record).parameters
        *own, last = inspect.signature(function).parameters.values()

        @wraps(function)
        def called(*values: Any, **given: Any) -> Result:
            options = {name: given.pop(name) for name in of_record if name in given}
            return function(*values, **given, **{last.name: record(**options)})

        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*own, *of_record.values()], return_annotation=inspect.signature(function).return_annotation
        )
        return called
