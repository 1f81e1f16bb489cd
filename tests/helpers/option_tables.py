"""The tables of docs/options.md, made from the commands themselves: option, what it says, default and limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from tightfit.planner.fleet.options import FleetOptions
from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.option_fields import options_of, types_of, word_of
from tightfit.profiles.options import ProfileOptions
from tightfit.runtime.cli.main import app
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.results.answer_options import AnswerOptions
from tightfit.runtime.session.options import EvaluationOptions, RehearsalOptions, RunOptions

RECORDS = (
    ProfileOptions, PlanOptions, RehearsalOptions, RunOptions, EvaluationOptions, AnswerOptions, FleetOptions, RoundOptions,
)  # fmt: skip
EVERYWHERE = {"--json", "--debug"}
"""options of nearly every command, which the page says once"""
MOST = 1 << 20
"""largest upper limit that is worth a word"""
BESIDE = {
    "train": ("profile", "plan", "run"),
    "prepare": ("profile",),
    "compare": ("plan",),
    "eval": ("run",),
    "chat": ("generate",),
    "fleet plan": ("plan",),
    "fleet run": ("run",),
    "fleet federate run": ("run",),
    "fleet federate join": ("run",),
}
"""command -> commands whose options it has too: its table leaves out those that say the same"""


@cache
def commands() -> dict[str, Any]:
    """Command -> what typer makes of it."""
    return dict(_commands(typer.main.get_command(app), ""))


def _commands(group: Any, before: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield before + name, command


@cache
def fields() -> dict[tuple[str, str], FieldInfo]:
    """(option, its help) -> the field of which the command line makes it."""
    return {(word_of(name, f), str(f.description)): f for record in RECORDS for name, f in options_of(record).items()}


def cells(parameter: Any) -> tuple[str, ...]:
    """Option, what it says, default and limits of a parameter of a command."""
    words = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]
    help_, default = str(parameter.help).rstrip("."), parameter.default
    is_switch = parameter.type.name == "boolean"
    said = re.fullmatch(r"(.*); default: ([^;]*)", help_, re.DOTALL)
    if parameter.required:
        text = "needed"
    elif said:
        help_, text = said[1], said[2]
    elif is_switch:
        text = "on" if default else "off"
    else:
        text = "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
    value = "" if is_switch or parameter.param_type_name == "argument" else parameter.metavar or ""
    names = ", ".join(f"`{word}`" for word in (*words, *(parameter.secondary_opts if default is True else ())))
    option = names + (f" {value}" if value else "")
    return tuple(cell.replace("|", "\\|") for cell in (option, help_, text, limits(parameter)))


def limits(parameter: Any) -> str:
    """What a value may be, in words; empty where its type or what is said of it says it all."""
    field = fields().get((max(parameter.opts, key=len), str(parameter.help)))
    if field is None:
        kind = parameter.type
        return _range({"ge": getattr(kind, "min", None), "le": getattr(kind, "max", None)})
    for kind in types_of(field.annotation):
        if get_origin(kind) is Literal and isinstance(get_args(kind)[0], str):
            choices, said = get_args(kind), f"{parameter.help} {parameter.metavar}"
            return "" if all(choice in said for choice in choices) else ", ".join(choices)
    marks = [
        mark for part in (field.annotation, *get_args(field.annotation)) for mark in get_args(part)[1:]
    ] + field.metadata
    marks += [each for mark in marks for each in getattr(mark, "metadata", ())]
    names = ("ge", "gt", "le", "lt")
    return _range({name: getattr(mark, name) for mark in marks for name in names if hasattr(mark, name)})


def _range(bounds: dict[str, Any]) -> str:
    """A range in words, without an upper end that nobody comes near."""
    words = [
        f"{word}{bounds[name]:g}" for name, word in (("ge", "from "), ("gt", "above ")) if bounds.get(name) is not None
    ]
    for name, word in (("le", "to "), ("lt", "to below ")):
        if bounds.get(name) is not None and bounds[name] <= MOST:
            words.append(f"{word}{bounds[name]:,.7g}")
    return " ".join(words)


def shown(command: str) -> list[Any]:
    """The parameters of a command that people give."""
    return [p for p in commands()[command].params if not (getattr(p, "hidden", False) or EVERYWHERE & set(p.opts))]


def same(parameter: Any) -> tuple[Any, ...]:
    return tuple(parameter.opts), parameter.help, parameter.default


def table(command: str) -> list[str]:
    """Which options of other commands a command has, and the table of its own."""
    own, lines = shown(command), []
    words, said = {p.opts[-1] for p in own}, {same(p) for p in own}
    for other in BESIDE.get(command, ()):
        theirs = [p for p in shown(other) if p.param_type_name == "option"]
        both = [f"`{p.opts[-1]}`" for p in theirs if same(p) in said]
        missing = [f"`{p.opts[-1]}`" for p in theirs if p.opts[-1] not in words]
        but = f" but {', '.join(missing)}" if missing else ""
        some = f"of the options of `tightfit {other}` {', '.join(both)}"
        if both:
            lines.append(f"- all options of `tightfit {other}`{but}" if len(missing) < len(both) else f"- {some}")
        own = [p for p in own if same(p) not in {same(q) for q in theirs}]
    rows = [cells(parameter) for parameter in own]
    headings = ["| option | | default | limits |", "|---|---|---|---|"]
    return [*lines, *([""] if lines else []), *headings, *(f"| {' | '.join(row)} |" for row in rows)]


TABLES = {
    ("options.md", f"tightfit {command}"): partial(table, command) for command in commands() if len(shown(command)) > 1
}
