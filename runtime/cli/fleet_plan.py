"""The command ``tightfit fleet plan``: which devices of a description do what, for a fleet of any kind."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from tightfit.planner.fleet.options import FleetOptions
from tightfit.profiles.option_fields import PRIMARY
from tightfit.runtime.cli.fleet_run import member_commands
from tightfit.runtime.cli.options import (
    Debug,
    FleetDescription,
    FleetFolder,
    Json,
    answering,
    left_of,
    read,
    with_options,
)
from tightfit.runtime.common.interrupts import Interrupts
from tightfit.runtime.common.limits import enough_for_a_solver

DESCRIPTION = """FLEET.toml describes the fleet, paths relative to it. For federated rounds it names `steps = 64`, the
local steps of a round of all devices together, instead of micro_batches, and memory is for Flower's part too; with a
table [server] (profile, memory, link) the server computes the upper layers, so that devices hold the lower ones alone,
and devices may have a weight.

\b
micro_batches = 16
[[member]]
name = "laptop"
profile = "laptop.json"
memory = "320MiB"
link = "100Mbit/s"  # both ways, or: up = "40Mbit/s", down = "250Mbit/s"
latency = "2ms"     # one way, 0 if left out
"""


@with_options(FleetOptions, after="steps")
def plan(
    description: FleetDescription,
    output: FleetFolder,
    micro_batches: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Micro-batches of a step, instead of those that the description names."),
        PRIMARY,
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Local steps of a federated round, instead of those of the description."),
        PRIMARY,
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Share the micro-batches of a step, the layers of the model, or the steps of a round, among devices, and plan each
    one's part, so that a step or a round is as short as can be.
    """
    started = time.monotonic()
    asked = read(FleetOptions, options)
    enough_for_a_solver()
    from tightfit.planner.fleet.description import read_description
    from tightfit.planner.fleet.fleet_planner import plan_fleet
    from tightfit.planner.fleet.io import FILE, save_fleet
    from tightfit.planner.report.fleet_text import fleet_text
    from tightfit.runtime.cli.terminal import SolvingDisplay, messages
    from tightfit.runtime.common.files import check_writable

    described = read_description(description, asked.kind, micro_batches=micro_batches, steps=steps)
    check_writable(output / FILE)
    console = messages()
    with Interrupts() as interrupts, SolvingDisplay(console, asked.time_limit) as solving:
        left = left_of(asked.time_limit, started)
        planned, plans, why = plan_fleet(described, **dict(asked.but(progress=solving, time_limit=left)))
    if why is not None:
        console.print(why)
    if interrupts.seen:
        console.print(
            f"interrupted: this is the best plan found so far, at most {planned.gap:.2%} from the best of its kind"
        )
    summary = planned.model_dump(mode="json") | {"interrupted": interrupts.seen}
    with answering(summary, fleet_text(planned), as_json):
        summary["fleet"] = str(save_fleet(planned, plans, output))
    console.print(f"plan written to {summary['fleet']}")
    if not planned.in_rounds and (commands := member_commands(planned, output)):
        console.print(commands)
