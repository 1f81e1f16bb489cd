"""What several commands share: options and their checks, access to a service elsewhere, printing of results."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import time
from collections import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import typer
import typer.core
from pydantic.fields import FieldInfo

from tightfit.profiles.option_fields import METAVAR, PRIMARY, Options, extras, options_of, types_of, word_of
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.supervision.failure import failure_of
from tightfit.runtime.supervision.printing import answer

if TYPE_CHECKING:
    from tightfit.planner.service.client import Client

# Help is plain text (`rich_markup_mode=None`). Where typer finds rich, versions before 0.21, which Flower asks for,
# escape it for rich all the same: `\[default: 1]`.
typer.core.HAS_RICH = False


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an unexpected error (also: TIGHTFIT_DEBUG=1).")
]


Server = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Let a `tightfit serve` elsewhere solve; its token in TIGHTFIT_TOKEN."),
]


Certificate = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The certificate that an https server shows, or of who signed it; also: TIGHTFIT_CERTIFICATE.",
    ),
]


Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one self-contained HTML page."), PRIMARY]
FleetDescription = Annotated[Path, typer.Argument(metavar="FLEET.toml", help="The devices, their budgets and links.")]
FleetFolder = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="FOLDER", help="Folder for the fleet's plan and its members' plans."),
]
Cgroup = Annotated[
    bool,
    typer.Option("--cgroup/--no-cgroup", help="Let the kernel enforce the cap where a memory cgroup can be made."),
]


LEAST_LIMIT = 0.01
"""seconds of a search, at least: what is known at once is found in any"""


def left_of(time_limit: float, started: float) -> float:
    """Seconds that loading has left of a time limit, since `started` on the monotonic clock."""
    return max(LEAST_LIMIT, time_limit - (time.monotonic() - started))


_following: ContextVar[bool] = ContextVar("following", default=True)


def next_command(words: str) -> str:
    """The end of a message that names the command with which to go on; empty for a stage of a longer command."""
    return f"; next: {words}" if _following.get() else ""


@contextlib.contextmanager
def stage() -> Iterator[io.StringIO]:
    """While entered, commands are stages of a longer one: their answers go into the text that is yielded instead of
    stdout, and they name no command with which to go on.
    """
    token = _following.set(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as answers:
            yield answers
    finally:
        _following.reset(token)


@contextlib.contextmanager
def service(url: str, certificate: Path | None = None) -> Iterator[Client]:
    """A client of the service at `url`. A Ctrl-C becomes a RunError whose message says what goes on there."""
    from tightfit.planner.service.client import connect
    from tightfit.runtime.cli.terminal import messages

    with connect(url, certificate=certificate, tell=messages().print) as service:
        try:
            yield service
        except KeyboardInterrupt as stop:
            raise RunError("; ".join(["interrupted", *map(str, stop.args)])) from stop


@contextlib.contextmanager
def answering(result: dict[str, Any], human: Any, as_json: bool) -> Iterator[None]:
    """Print a command's result even if writing its files, which the block does, fails.

    Text for people is printed before the block, JSON after it, together with the error if there was one.
    """
    if not as_json:
        answer(result, human, as_json=as_json)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not as_json:
            raise
        result["error"] = failed_with = failure(error if isinstance(error, Exception) else typer.Abort())
        answer(result, human, as_json=as_json)
        sys.stderr.write(f"tightfit: {failed_with['message']}\n")
        raise typer.Exit(failed_with["exit_code"]) from error
    if as_json:
        answer(result, human, as_json=as_json)


def failure(error: Exception) -> dict[str, Any]:
    """The error in the form of --json."""
    if usage(error):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "tightfit"
        message = f"{error.format_message().rstrip('.')}; try '{command} --help'"  # type: ignore[attr-defined]
        return {"kind": type(error).__name__, "message": message, "exit_code": 2}
    return failure_of(KeyboardInterrupt() if isinstance(error, typer.Abort) else error)


def usage(error: BaseException) -> bool:
    """Whether the error is one of the command line itself.

    Depending on its version, Typer brings a Click of its own or uses the installed one.
    """
    return hasattr(error, "format_message")


def key_of(parameter: Any) -> str:
    """The key of an option or argument in a file."""
    long = [name for name in parameter.opts if name.startswith("--")]
    return (long[0].removeprefix("--") if long else str(parameter.name)).replace("-", "_")


def command_words(parameters: Iterable[Any], values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give a command's `parameters` these `values`, by the parameters' names.

    A parameter without a value, or with None, has no words.
    """
    words: list[str] = []
    for parameter in parameters:
        value = values.get(str(parameter.name))
        if value is None:
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words += [*(parameter.opts if value else parameter.secondary_opts)[:1]]
        else:
            items = value if isinstance(value, list | tuple) else [value]
            words += [f"{parameter.opts[-1]}={item}" for item in items]
    return words


CommandFunction = TypeVar("CommandFunction", bound=Callable[..., Any])
OptionsRecord = TypeVar("OptionsRecord", bound=Options)


def with_options(
    record: type[Options], *leaving_out: str, after: str | None = None, **defaults: Any
) -> Callable[[CommandFunction], CommandFunction]:
    """Replaces the ``**options`` of a command by the options of a record (`tightfit.profiles.option_fields`), but for
    the names in `leaving_out`. They come after the parameter `after`, or else after the required ones. Where the
    command has a parameter of the same name, that one stays; `defaults` replace the record's.
    """

    def decorate(command: CommandFunction) -> CommandFunction:
        declared = list(inspect.signature(command, eval_str=True).parameters.values())
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in declared if p.kind is not p.VAR_KEYWORD]
        names = [parameter.name for parameter in own]
        from_record = [
            _parameter(name, field, defaults.get(name, field.default))
            for name, field in options_of(record).items()
            if name not in {*names, *leaving_out}
        ]
        required = sum(parameter.default is parameter.empty for parameter in own)
        position = required if after is None else names.index(after) + 1
        command.__signature__ = inspect.Signature([*own[:position], *from_record, *own[position:]])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(name: str, field: FieldInfo, default: Any) -> inspect.Parameter:
    """An option of a record as a parameter of a command. A map becomes an option that is given several times, a list
    one whose value has commas (`read` reads both).
    """
    kinds, extra, annotated = types_of(field.annotation), extras(field), cast("Any", Annotated)
    kind: Any = next((plain for plain in (str, Path) if plain in kinds), kinds[0])
    if origin := get_origin(kind):
        kind = type(get_args(kind)[0]) if origin is Literal else list[str] if origin is abc.Mapping else str
    word = word_of(name, field)
    info = typer.Option(
        f"{word}/--no-{word[2:]}" if kind is bool else word, help=field.description, metavar=extra[METAVAR]
    )
    kind, marks = (kind | None if default is None else kind), ([PRIMARY] if extra[PRIMARY] else [])
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotated[(kind, info, *marks)]
    )


def read(record: type[OptionsRecord], parameters: Mapping[str, Any], **others: Any) -> OptionsRecord:
    """A record made of the `parameters` of a command and of `others`. Raises InputError for a value that cannot be
    used.
    """
    values: dict[str, Any] = {}
    for name, field in options_of(record).items():
        if name not in parameters:
            continue
        value, kind = parameters[name], types_of(field.annotation)[0]
        if get_origin(kind) is abc.Mapping and value is not None:
            value = _map_entries(spelled(name), value, types_of(get_args(kind)[1])[0]) or None
        elif get_origin(kind) is abc.Sequence and value is not None:
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        values[name] = value
    return record(**values | others)


def _map_entries(option: str, words: Sequence[str], kind: Callable[[str], Any]) -> dict[str, Any]:
    """A map from words such as ``PATTERN=NUMBER``, once or often, or ``NAME=TEXT,NAME=TEXT``. Raises InputError for
    others.
    """
    entries: dict[str, Any] = {}
    for word in (part for text in words for part in (text.split(",") if kind is str else [text])):
        name, equals, value = word.rpartition("=")
        try:
            entries[name.strip()] = kind(value.strip())
        except ValueError:
            equals = ""
        if not equals or not name.strip() or not value.strip():
            form = (
                "NAME=COLUMN,..., for example prompt=question,completion=answer"
                if kind is str
                else "a pattern of names and a number, such as q_proj=16"
            )
            raise InputError(f"{option} {word!r}: give {form}")
    return entries
