"""Options that stand once: fields of a pydantic model, each with its type, its limits and what is said of it.

A record of options is a subclass of `Options` whose fields are made by `option`. What offers the options to people is made from
there: the command line, the requests of the HTTP service with the forms on its page, and, by `keywords_of`, functions of the
library that take them as keywords. Whatever the door, pydantic checks a value once, when the record is made.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    overload,
)

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

First = TypeVar("First")
Second = TypeVar("Second")
Third = TypeVar("Third")
Result = TypeVar("Result")
Record = TypeVar("Record", bound="Options")
Keywords = ParamSpec("Keywords")

METAVAR, WORD, OVER_HTTP, PRIMARY = "metavar", "word", "over_http", "primary"
"""what is kept of an option beside what pydantic has: see `option`; `PRIMARY` also stands beside parameters of commands that are
no fields"""


class Options(BaseModel):
    """A record of options. Numbers of numpy and torch become Python's own.

    Raises InputError, which names the option, its value and what it may be, for a value that is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    def __init__(self, **values: Any) -> None:
        given = {name: _plain(value) for name, value in values.items()}
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise InputError(_refusal(type(self), given, error)) from None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The record with those of the given values that it has."""
        return cls(**{name: given[name] for name in cls.model_fields if name in given})

    def but(self, **changes: Any) -> Self:
        """The same with other values, which are known to be allowed."""
        return self.model_copy(update=changes)


def option(
    default: Any,
    help_: str,
    *,
    over_http: str | None = None,
    label: str | None = None,
    metavar: str | None = None,
    word: str | None = None,
    primary: bool = False,
    **limits: Any,
) -> Any:
    """A field of a record that commands and requests have as an option.

    `help_` is a sentence or two for a list of options; `over_http` the same for the service and its page, where values have another form
    or others are meant. `label`: what a form calls the option; `metavar`: what stands for its value in the command line's help,
    and `word` what it is called there, where that is another name.
    `primary`: most people need it, so that short lists of options have it. `limits` are those of pydantic's `Field`.
    """
    beside: dict[str, Any] = {METAVAR: metavar, WORD: word, OVER_HTTP: over_http or help_, PRIMARY: primary}
    return Field(default, description=help_, title=label, json_schema_extra=beside, **limits)


def options_of(record: type[Options]) -> Mapping[str, FieldInfo]:
    """The options of a record by name, those first that most people need."""
    found = {name: field for name, field in record.model_fields.items() if field.description is not None}
    return dict(sorted(found.items(), key=lambda item: not beside(item[1])[PRIMARY]))


def beside(field: FieldInfo) -> Mapping[str, Any]:
    """What is kept of an option beside what pydantic has, by `METAVAR`, `WORD`, `OVER_HTTP` and `PRIMARY`."""
    return cast("Mapping[str, Any]", field.json_schema_extra)


def word_of(name: str, field: FieldInfo) -> str:
    """What the command line calls an option: ``--lora-rank``."""
    return str(beside(field)[WORD] or f"--{name.replace('_', '-')}")


def types_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a value, without None and without what annotates them."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,) if annotation is not NoneType else ()
    return tuple(kind for one in get_args(annotation) for kind in types_of(one))


def _refusal(record: type[Options], given: Mapping[str, Any], error: ValidationError) -> str:
    """What is wrong with the first value that pydantic refuses, in its words."""
    errors = error.errors()
    of_value = [one for one in errors if one["loc"][0] == errors[0]["loc"][0]]
    # Of a value that may be of several types, the words about the type that it has.
    chosen = next((one for one in of_value if not one["type"].endswith("_type")), of_value[0])
    name, *inside = map(str, chosen["loc"])
    words = chosen["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    field = record.model_fields.get(name)
    if field is not None and chosen["type"] == "string_pattern_mismatch":
        words = f"it should be written otherwise: {field.description}"
    if chosen["type"] in ("missing", "extra_forbidden"):
        return f"{spelled(name)}: {words}"
    key = f" {inside[0]}" if inside and isinstance(given[name], Mapping) else ""
    return f"{spelled(name)}{key} {chosen['input']!r}: {words}"


def _plain(value: Any) -> Any:
    """A number of numpy or torch as one of Python, and what names a path as one."""
    if isinstance(value, os.PathLike):
        return Path(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


class keywords_of(Generic[Keywords, Record]):  # noqa: N801  a decorator
    """Decorates a function whose last parameter is a record of options: its callers give the record's fields as keywords.

    Signature and types of the function are those of its other parameters, which have to be required, and of the fields.
    """

    def __init__(self, record: Callable[Keywords, Record]) -> None:
        self._record = record

    @overload
    def __call__(
        self, function: Callable[[First, Record], Result], /
    ) -> Callable[Concatenate[First, Keywords], Result]: ...

    @overload
    def __call__(
        self, function: Callable[[First, Second, Record], Result], /
    ) -> Callable[Concatenate[First, Second, Keywords], Result]: ...

    @overload
    def __call__(
        self, function: Callable[[First, Second, Third, Record], Result], /
    ) -> Callable[Concatenate[First, Second, Third, Keywords], Result]: ...

    def __call__(self, function: Callable[..., Result], /) -> Callable[..., Result]:
        record = cast("Any", self._record)
        of_record = {
            name: inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.default,
                annotation=field.annotation,
            )
            for name, field in record.model_fields.items()
        }
        *own, last = inspect.signature(function).parameters.values()

        @wraps(function)
        def called(*values: Any, **given: Any) -> Result:
            options = {name: given.pop(name) for name in of_record if name in given}
            return function(*values, **given, **{last.name: record(**options)})

        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*own, *of_record.values()], return_annotation=inspect.signature(function).return_annotation
        )
        return called
