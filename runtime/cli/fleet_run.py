"""The command ``tightfit fleet run``: trains as one member of a fleet, or as all of them on this machine."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tightfit.profiles.option_fields import PRIMARY
from tightfit.runtime.cli.options import Debug, Json, command_words, read, with_options
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.children import start
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.interrupts import relayed_signals
from tightfit.runtime.session.options import RunOptions
from tightfit.runtime.supervision.failure import last_message
from tightfit.runtime.supervision.printing import answer

if TYPE_CHECKING:
    from tightfit.planner.fleet.schema import FleetPlan

FOR_THIS_PROCESS = ("member", "at", "as_json", "help")
"""parameters that a member does not get from the command that starts all of them"""
MODULE, MOBILLM = "tightfit.runtime.cli.main", "mobillm"
POLL_SECONDS = 0.5
UPDATES, REPORT, LOG = "fleet.jsonl", "report.json", "log"
"""files of a member: in its folder one with a line for each update, and its report; beside the folder, with this
ending, its output
"""


@with_options(RunOptions, "eval_every", "keep_best", "early_stopping", "adapter")
def run(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where `tightfit fleet plan` put the fleet's plan.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder in which every member gets one of its own name.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE.jsonl|random",
            help="Training data, the same for every member; the server of a mobillm fleet needs none.",
        ),
        PRIMARY,
    ] = None,
    member: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Be this member. Without it, all members run on this machine, to try it out."
        ),
        PRIMARY,
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the members meet: an address of the first of them, of mobillm's server. With --member.",
        ),
        PRIMARY,
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long to wait for other members; at least ten minutes if left out."),
        PRIMARY,
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the newest checkpoint that any member has, or in a pipeline all have."
        ),
        PRIMARY,
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left."), PRIMARY] = False,
    cgroup: Annotated[
        bool, typer.Option("--cgroup/--no-cgroup", help="Let the kernel enforce each member's cap where it can.")
    ] = True,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train as a fleet's plan says: the result is that of one process, to the bit, whoever computes what (unless a
    pipeline's messages are rounded).
    """
    run_options = read(RunOptions, options, out=output, resume=resume, overwrite=overwrite, cgroup=cgroup)
    run_options.check_end()
    if timeout is not None and not timeout > 0:
        raise InputError(f"--timeout {timeout}: give a number of seconds above 0")
    if (member is None) != (at is None):
        raise InputError(
            "--member and --at belong together: which member this is, and where all of them meet; without both, all"
            " members run on this machine"
        )
    from tightfit.planner.fleet.io import key_path, load_fleet, load_member_plan

    fleet = load_fleet(plan, in_rounds=False)
    _check_length(fleet, run_options)
    if data is None and not (fleet.one_way and member == fleet.names[-1]):
        raise InputError("--data is missing; give the training data, the same for every member")
    if member is None:
        # Each member gets this command's words, without those that are for this process alone.
        shared = {name: value for name, value in context.params.items() if name not in FOR_THIS_PROCESS}
        _all_members(fleet, output, ["fleet", "run", *command_words(context.command.params, shared)], as_json=as_json)
        return
    from tightfit.runtime.cli.run import carry_out
    from tightfit.runtime.session.fleet import address_of, check_listens, member_options, membership

    assert at is not None
    address = address_of("--at", at)
    check_listens(fleet, member, *address)
    seat = membership(fleet, member, *address, key_path(plan), timeout)
    carry_out(
        load_member_plan(plan, fleet, member),
        data or "",
        member_options(run_options, fleet, seat),
        as_json=as_json,
        debug=debug,
        replace=bool(context.obj),
    )


def member_commands(fleet: FleetPlan, folder: Path) -> str:
    """The commands that run each member on a device of its own, with the address at which they meet; "" for a single
    member.
    """
    from tightfit.planner.fleet.parts import listener, member_commands

    commands = member_commands(fleet, str(folder))
    if not commands:
        return ""
    listening = fleet.names[listener(fleet)]
    meeting = (
        f"on each device, with all of {folder}; they meet at {listening!r}: HOST is an address of that one, which the"
        " others reach"
    )
    return "\n".join([meeting, *(f"  {command}" for command in commands.values())])


def _check_length(fleet: FleetPlan, options: RunOptions) -> None:
    """Raise InputError where the fleet cannot train as long as it is asked to."""
    if options.steps is not None and options.steps % fleet.micro_batches:
        raise InputError(
            f"--steps {options.steps}: a step of this fleet has {fleet.micro_batches} micro-batches, give a multiple of"
            " that"
        )
    if options.epochs is not None and fleet.one_way:
        raise InputError(
            f"--epochs {options.epochs:g}: the server of a mobillm fleet has no data, and does not know how long an"
            " epoch is; give --steps"
        )


# --- all members on this machine --------------------------------------------------------------------------------------


def _all_members(fleet: FleetPlan, output: Path, words: list[str], *, as_json: bool) -> None:
    """Start every member as a process of its own, show their progress, and print their reports."""
    from tightfit.runtime.cli.terminal import messages
    from tightfit.runtime.session.fleet import free_port

    names = fleet.names
    output.mkdir(parents=True, exist_ok=True)
    at = f"127.0.0.1:{free_port(count=len(names))}"
    console = messages()
    with ExitStack() as stack:
        running: dict[str, subprocess.Popen[bytes]] = {}
        signals = stack.enter_context(relayed_signals())
        for name in names:
            log = stack.enter_context((output / f"{name}.{LOG}").open("wb"))
            command = interpreter.command(MODULE, *words, "--member", name, "--at", at, "--json")
            running[name] = start(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            signals.to(running[name])
        updates_shown = 0
        while any(child.poll() is None for child in running.values()):
            time.sleep(POLL_SECONDS)
            updates_shown = _tell_updates(console, output / names[0] / UPDATES, updates_shown, fleet)
        codes = {name: child.wait() for name, child in running.items()}
    failed = {name: code for name, code in codes.items() if code}
    if failed:
        raise RunError(
            "; ".join(
                f"member {name!r} ended with code {code}: {last_message(output / f'{name}.{LOG}')}"
                for name, code in failed.items()
            )
        )
    reports = {name: json.loads((output / name / REPORT).read_text()) for name in codes}  # noqa: TID251  written by the members
    saves = names[-1 if fleet.one_way else 0]
    summary = {"members": reports, "adapter": reports[saves]["adapter"]}
    answer(summary, _report_table(fleet, reports), as_json=as_json)


def _tell_updates(console: Any, path: Path, shown: int, fleet: FleetPlan) -> int:
    """Print a line about each update after the first `shown`; returns how many there are now."""
    lines = _updates(path)
    for line in lines[shown:]:
        losses = line["losses"]
        console.print(
            f"step {line['step'] // fleet.micro_batches}: loss {sum(losses) / len(losses):.4f}, {line['seconds']:.2f} s"
            f" (planned {fleet.makespan_seconds:.2f})"
        )
    return len(lines)


def _updates(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]  # noqa: TID251  written by the members
    except FileNotFoundError:
        return []


def _report_table(fleet: FleetPlan, reports: Mapping[str, dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    from tightfit.planner.report.fleet_text import part_words
    from tightfit.runtime.common.units import format_size

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    share = "computes" if fleet.one_way else "layers" if fleet.cut else "micro-batches"
    for heading in ("member", share, "peak: predicted", "measured", "step: predicted", "measured"):
        table.add_column(heading, justify="left" if heading == "member" else "right")
    for name in fleet.names:
        report = reports[name]
        peak, step = report["peak_bytes"], report.get("fleet", {}).get("seconds", report["step_seconds"])
        table.add_row(
            name,
            part_words(fleet, name),
            format_size(peak["predicted"]),
            format_size(peak["measured"]),
            f"{step['predicted']:.2f} s",
            f"{step['measured']:.2f} s" if step["measured"] else "–",
        )
    return table
