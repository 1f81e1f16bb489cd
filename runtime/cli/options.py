"""What several commands share: options and their checks, access to a service elsewhere, printing of results."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
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

# Help is plain text (`rich_markup_mode=None`). Where typer finds rich, versions before 0.21, which Flower asks for, escape it for
# rich all the same: `\[default: 1]`.
typer.core.HAS_RICH = False


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an unexpected error (also: TIGHTFIT_DEBUG=1).")
]


Server = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Let a `tightfit serve` elsewhere solve; its token in TIGHTFIT_TOKEN."),
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
        with contextlib.redirect_stdout(io.StringIO()) as said:
            yield said
    finally:
        _following.reset(token)


@contextlib.contextmanager
def service(url: str) -> Iterator[Client]:
    """A client of the service at `url`. A Ctrl-C becomes a RunError whose message says what goes on there."""
    with served():
        from tightfit.planner.service.client import connect
    with connect(url) as service:
        try:
            yield service
        except KeyboardInterrupt as stop:
            raise RunError("; ".join(["interrupted", *map(str, stop.args)])) from stop


@contextlib.contextmanager
def served() -> Iterator[None]:
    """While entered, a missing package of the extra `serve` becomes an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "tightfit":
            raise
        raise InputError(
            f"{error.name} is not installed; a service and its clients need it: pip install 'tightfit[serve]'"
        ) from error


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
        result["error"] = failed = failure(error if isinstance(error, Exception) else typer.Abort())
        answer(result, human, as_json=as_json)
        sys.stderr.write(f"tightfit: {failed['message']}\n")
        raise typer.Exit(failed["exit_code"]) from error
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


def words_of(parameters: Iterable[Any], values: Mapping[str, Any]) -> list[str]:
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
            words += [f"{parameter.opts[-1]}={one}" for one in (value if isinstance(value, list | tuple) else [value])]
    return words


Command = TypeVar("Command", bound=Callable[..., Any])
Record = TypeVar("Record", bound=Options)


def with_options(
    record: type[Options], *leaving_out: str, after: str | None = None, **defaults: Any
) -> Callable[[Command], Command]:
    """Gives a command, whose last parameter takes any keywords, the options of a record (`tightfit.profiles.option_fields`) for
    it, behind the parameter `after`, or else behind those that it must be given; without those of the names given here.
    Parameters of its own go before those, and `defaults` before the record's.
    """

    def decorate(command: Command) -> Command:
        declared = list(inspect.signature(command, eval_str=True).parameters.values())
        mine = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in declared if one.kind is not one.VAR_KEYWORD]
        names = [one.name for one in mine]
        taken = [
            _parameter(name, field, defaults.get(name, field.default))
            for name, field in options_of(record).items()
            if name not in {*names, *leaving_out}
        ]
        needed = sum(one.default is one.empty for one in mine)
        place = needed if after is None else names.index(after) + 1
        command.__signature__ = inspect.Signature([*mine[:place], *taken, *mine[place:]])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(name: str, field: FieldInfo, default: Any) -> inspect.Parameter:
    """An option of a record, as a parameter of a command: one that is given several times for a map, names with commas
    between them for a list (`read` reads both).
    """
    kinds, told, annotated = types_of(field.annotation), extras(field), cast("Any", Annotated)
    kind: Any = next((one for one in (str, Path) if one in kinds), kinds[0])
    if origin := get_origin(kind):
        kind = type(get_args(kind)[0]) if origin is Literal else list[str] if origin is abc.Mapping else str
    word = word_of(name, field)
    info = typer.Option(
        f"{word}/--no-{word[2:]}" if kind is bool else word, help=field.description, metavar=told[METAVAR]
    )
    kind, mark = (kind | None if default is None else kind), ([PRIMARY] if told[PRIMARY] else [])
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotated[(kind, info, *mark)]
    )


def read(record: type[Record], given: Mapping[str, Any], **others: Any) -> Record:
    """A record with its options, of all that a command was given, and `others`. Raises InputError for one that cannot be used."""
    values: dict[str, Any] = {}
    for name, field in options_of(record).items():
        if name not in given:
            continue
        value, kind = given[name], types_of(field.annotation)[0]
        if get_origin(kind) is abc.Mapping and value is not None:
            value = _entries(spelled(name), value, types_of(get_args(kind)[1])[0]) or None
        elif get_origin(kind) is abc.Sequence and value is not None:
            value = tuple(one.strip() for one in value.split(",") if one.strip())
        values[name] = value
    return record(**values | others)


def _entries(option: str, words: Sequence[str], kind: Callable[[str], Any]) -> dict[str, Any]:
    """What ``PATTERN=NUMBER`` says, once or often, or ``NAME=TEXT,NAME=TEXT``. Raises InputError for anything else."""
    entries: dict[str, Any] = {}
    for word in (one for given in words for one in (given.split(",") if kind is str else [given])):
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
