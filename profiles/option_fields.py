"""Options, each defined once: as a field of a pydantic model with its type, limits and help.

A record of options is a subclass of `Options` whose fields are made by `option`. The command line, the requests of the
HTTP service, the forms on its page and, by `keywords_of`, functions of the library that take options as keywords are
made from these fields. Wherever a value comes from, pydantic checks it once, when the record is made.
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
OptionsRecord = TypeVar("OptionsRecord", bound="Options")
Keywords = ParamSpec("Keywords")

METAVAR, WORD, OVER_HTTP, PRIMARY = "metavar", "word", "over_http", "primary"
"""Keys of `extras`: what `option` notes about an option that pydantic has no place for. Parameters of commands that are
no fields have `PRIMARY` too.
"""


class Options(BaseModel):
    """A record of options. Numbers of numpy and torch become Python's own.

    Raises InputError, which names the option, its value and what it may be, for a value that is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    def __init__(self, **values: Any) -> None:
        plain = {name: _plain(value) for name, value in values.items()}
        try:
            super().__init__(**plain)
        except ValidationError as error:
            raise InputError(_refusal(type(self), plain, error)) from None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The record made of those of the `values` that are fields of it."""
        return cls(**{name: values[name] for name in cls.model_fields if name in values})

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
    """A field of a record that becomes an option of commands and requests.

    `help_` is its help, a sentence or two; `over_http` is that of the service and its page, where it has to differ.
    `label` is its name in forms. In the command line's help `metavar` stands for its value, and `word` is its name if
    the field's own will not do. `primary`: most people need it, so that short lists of options have it. `limits` are
    those of pydantic's `Field`.
    """
    extras: dict[str, Any] = {METAVAR: metavar, WORD: word, OVER_HTTP: over_http or help_, PRIMARY: primary}
    return Field(default, description=help_, title=label, json_schema_extra=extras, **limits)


def options_of(record: type[Options]) -> Mapping[str, FieldInfo]:
    """The options of a record by name, those first that most people need."""
    fields = {name: field for name, field in record.model_fields.items() if field.description is not None}
    return dict(sorted(fields.items(), key=lambda item: not extras(item[1])[PRIMARY]))


def extras(field: FieldInfo) -> Mapping[str, Any]:
    """What `option` noted about a field, by `METAVAR`, `WORD`, `OVER_HTTP` and `PRIMARY`."""
    return cast("Mapping[str, Any]", field.json_schema_extra)


def word_of(name: str, field: FieldInfo) -> str:
    """What the command line calls an option: ``--lora-rank``."""
    return str(extras(field)[WORD] or f"--{name.replace('_', '-')}")


def types_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a value, without None and without what annotates them."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,) if annotation is not NoneType else ()
    return tuple(kind for member in get_args(annotation) for kind in types_of(member))


def _refusal(record: type[Options], values: Mapping[str, Any], error: ValidationError) -> str:
    """The message for the first value that pydantic refuses: option, value and pydantic's reason."""
    errors = error.errors()
    value_errors = [detail for detail in errors if detail["loc"][0] == errors[0]["loc"][0]]
    # Of a value that may be of several types, the words about the type that it has.
    refusal = next((detail for detail in value_errors if not detail["type"].endswith("_type")), value_errors[0])
    name, *inside = map(str, refusal["loc"])
    reason = refusal["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    field = record.model_fields.get(name)
    if field is not None and refusal["type"] == "string_pattern_mismatch":
        reason = f"it should be written otherwise: {field.description}"
    if refusal["type"] in ("missing", "extra_forbidden"):
        return f"{spelled(name)}: {reason}"
    key = f" {inside[0]}" if inside and isinstance(values[name], Mapping) else ""
    return f"{spelled(name)}{key} {refusal['input']!r}: {reason}"


def _plain(value: Any) -> Any:
    """The value, but numbers of numpy and torch as Python's and anything path-like as a `Path`."""
    if isinstance(value, os.PathLike):
        return Path(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


class keywords_of(Generic[Keywords, OptionsRecord]):  # noqa: N801  a decorator
    """Decorates a function whose last parameter is a record of options: its callers give the record's fields as
    keywords.

    Signature and types of the function are those of its other parameters, which have to be required, and of the fields.
    """

    def __init__(self, record: Callable[Keywords, OptionsRecord]) -> None:
        self._record = record

    @overload
    def __call__(
        self, function: Callable[[First, OptionsRecord], Result], /
    ) -> Callable[Concatenate[First, Keywords], Result]: ...

    @overload
    def __call__(
        self, function: Callable[[First, Second, OptionsRecord], Result], /
    ) -> Callable[Concatenate[First, Second, Keywords], Result]: ...

    @overload
    def __call__(
        self, function: Callable[[First, Second, Third, OptionsRecord], Result], /
    ) -> Callable[Concatenate[First, Second, Third, Keywords], Result]: ...

    def __call__(self, function: Callable[..., Result], /) -> Callable[..., Result]:
        record = cast("Any", self._record)
        parameters = {
            name: inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.default,
                annotation=field.annotation,
            )
            for name, field in record.model_fields.items()
        }
        *own_parameters, options_parameter = inspect.signature(function).parameters.values()

        @wraps(function)
        def called(*values: Any, **keywords: Any) -> Result:
            options = {name: keywords.pop(name) for name in parameters if name in keywords}
            return function(*values, **keywords, **{options_parameter.name: record(**options)})

        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*own_parameters, *parameters.values()], return_annotation=inspect.signature(function).return_annotation
        )
        return called
