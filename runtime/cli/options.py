"""What several commands share: options and their checks, access to a service elsewhere, printing of results."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_origin

import typer
import typer.core

from tightfit.profiles.options import ProfileOptions
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.options import Said, default_of, said, types_of
from tightfit.runtime.session.options import LARGEST_SEED, RunOptions
from tightfit.runtime.supervision.failure import failure_of
from tightfit.runtime.supervision.printing import answer

if TYPE_CHECKING:
    from tightfit.planner.service.client import Client

# Help is plain text (`rich_markup_mode=None`). Where typer finds rich, versions before 0.21, which Flower asks for, escape it for
# rich all the same: `\[default: 1]`.
typer.core.HAS_RICH = False


PRIMARY = "primary"
"""beside an option in the annotation of a command's parameter: most people need it (as `Said.primary`)"""


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an unexpected error (also: TIGHTFIT_DEBUG=1).")
]


Force = Annotated[bool, typer.Option("--force", help=said(ProfileOptions)["force"].help)]


Server = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Let a `tightfit serve` elsewhere solve; its token in TIGHTFIT_TOKEN."),
]


Truncate = Annotated[
    bool,
    typer.Option(
        "--truncate/--no-truncate", help="Cut samples longer than the planned sequence instead of refusing them."
    ),
    PRIMARY,
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=COLUMN,...",
        help="What the data call the parts of a sample, for example prompt=question,completion=answer.",
    ),
    PRIMARY,
]
Packing = Annotated[bool, typer.Option("--packing/--no-packing", help=said(RunOptions)["packing"].help)]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one self-contained HTML page."), PRIMARY]
FleetDescription = Annotated[Path, typer.Argument(metavar="FLEET.toml", help="The devices, their budgets and links.")]
FleetFolder = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="FOLDER", help="Folder for the fleet's plan and its members' plans."),
]
PlanningTime = Annotated[
    float, typer.Option("--time-limit", metavar="SECONDS", help="Seconds that all of the planning may take.")
]
Prices = Annotated[
    bool,
    typer.Option(
        "--prices/--no-prices", help="Also say what more memory or a faster link of each device would be worth."
    ),
]
Cgroup = Annotated[
    bool,
    typer.Option("--cgroup/--no-cgroup", help="Let the kernel enforce the cap where a memory cgroup can be made."),
]


def at_least(least: float, **options: float) -> None:
    """Raise InputError for options below `least`; keywords are the options' Python names."""
    for name, value in options.items():
        if not value >= least:
            raise InputError(f"{spelled(name)} {value}: give a number of at least {least}")


def at_most(most: int, **options: int) -> None:
    """Raise InputError for options above `most`; keywords are the options' Python names."""
    for name, value in options.items():
        if value > most:
            raise InputError(f"{spelled(name)} {value}: give a number of at most {most}")


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


def named_columns(text: str | None) -> dict[str, str] | None:
    """What the data call the parts of a sample, from `prompt=question,completion=answer`. Raises InputError for other words."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and column.strip() for name, _, column in pairs):
        raise InputError(
            f"{spelled('columns')} {text}: give NAME=COLUMN,..., for example prompt=question,completion=answer"
        )
    return {name.strip(): column.strip() for name, _, column in pairs}


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
            words += [f"{parameter.opts[-1]}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


Command = TypeVar("Command", bound=Callable[..., Any])


def with_options(
    record: type, *leaving_out: str, after: str | None = None, **defaults: Any
) -> Callable[[Command], Command]:
    """Gives a command, whose last parameter takes any keywords, the options of a record (`tightfit.runtime.common.options`) for
    it, behind the parameter `after`, or else behind those that it must be given; without those of the names given here.
    Parameters of its own go before those, and `defaults` before the record's.
    """

    def decorate(command: Command) -> Command:
        declared = list(inspect.signature(command, eval_str=True).parameters.values())
        mine = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in declared if one.kind is not one.VAR_KEYWORD]
        names = [one.name for one in mine]
        taken = [
            _parameter(record, name, one, defaults.get(name, default_of(record, name)))
            for name, one in said(record).items()
            if name not in {*names, *leaving_out}
        ]
        needed = sum(one.default is one.empty for one in mine)
        place = needed if after is None else names.index(after) + 1
        command.__signature__ = inspect.Signature([*mine[:place], *taken, *mine[place:]])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(record: type, name: str, told: Said, default: Any) -> inspect.Parameter:
    """An option of a record, as a parameter of a command: one that is given several times for a map, names with commas
    between them for a list (`values_of` reads both).
    """
    types, annotated = types_of(record, name), cast("Any", Annotated)
    kind: Any = next((one for one in (Path, str) if one in types), types[0])
    if get_origin(kind):
        kind = list[str] if get_origin(kind) is Mapping else str
    words = [f"--{name.replace('_', '-')}"]
    if kind is bool:
        words = [f"{words[0]}/--no-{words[0][2:]}"]
    info = typer.Option(*words, help=told.help, metavar=told.metavar)
    kind, mark = (kind | None if default is None else kind), ([PRIMARY] if told.primary else [])
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotated[(kind, info, *mark)]
    )


def values_of(record: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record, of all that a command was given. Raises InputError for a whole number below its least, and
    for words that are no entry of a map.
    """
    values: dict[str, Any] = {}
    for name, told in said(record).items():
        if name not in given:
            continue
        value, kind = given[name], types_of(record, name)[0]
        if get_origin(kind) is Mapping:
            value = _entries(spelled(name), value, get_args(kind)[1])
        elif get_origin(kind):
            value = tuple(one.strip() for one in (value or "").split(",") if one.strip())
        elif kind is int and told.least is not None and value is not None:
            at_least(told.least, **{name: value})
        values[name] = value
    return values


def _entries(option: str, words: Sequence[str] | None, number: Callable[[str], Any]) -> dict[str, Any]:
    """What ``PATTERN=NUMBER`` says, once or often. Raises InputError for anything else."""
    found: dict[str, Any] = {}
    for word in words or ():
        pattern, equals, value = word.rpartition("=")
        try:
            found[pattern] = number(value)
        except ValueError:
            equals = ""
        if not equals or not pattern:
            raise InputError(f"{option} {word!r}: give a pattern of names and a number, such as q_proj=16")
    return found


def training_options(given: Mapping[str, Any]) -> RunOptions:
    """The options with which a command trains, of all that it was given. Raises InputError, which names the option, where
    one cannot be used.
    """
    options = {name: given[name] for name in said(RunOptions) if name in given}
    if options.get("steps") is None and options.get("epochs") is None:
        raise InputError(f"{spelled('steps')} is missing: give the number of steps, or {spelled('epochs')}")
    for name in ("steps", "checkpoint_every", "lr", "seed", "warmup_steps", "weight_decay"):
        if options.get(name) is not None:
            at_least(said(RunOptions)[name].least or 0, **{name: options[name]})
    if options.get("seed") is not None:
        at_most(LARGEST_SEED, seed=options["seed"])
    if given["resume"] and given["overwrite"]:
        raise InputError(
            f"{spelled('resume')} goes on from what lies in the folder, {spelled('overwrite')} replaces it: give one of them"
        )
    return RunOptions(**options)
