"""The commands ``tightfit fleet ...``: several devices, each within its own budget, make one training step together."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tightfit.planner.fleet.options import FleetOptions
from tightfit.profiles.option_fields import PRIMARY
from tightfit.runtime.cli.command import Command
from tightfit.runtime.cli.fleet_federate import federate
from tightfit.runtime.cli.fleet_run import member_commands, run, status
from tightfit.runtime.cli.fleet_side import plan_with_server
from tightfit.runtime.cli.options import (
    Debug,
    FleetDescription,
    FleetFolder,
    Html,
    Json,
    Server,
    answering,
    read,
    service,
    with_options,
)
from tightfit.runtime.common.interrupts import Interrupts
from tightfit.runtime.common.limits import enough_for_a_solver

DESCRIPTION = """FLEET.toml describes the fleet, paths relative to it:

\b
micro_batches = 16
[[member]]
name = "laptop"
profile = "laptop.json"
memory = "320MiB"
link = "100Mbit/s"  # both ways, or: up = "40Mbit/s", down = "250Mbit/s"
latency = "2ms"     # one way, 0 if left out
"""

MOBILLM = "mobillm"
"""the kind of fleet whose result is a side network"""

fleet = typer.Typer(
    help="Plan training steps that several devices make together, each within its own memory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@fleet.command(cls=Command, epilog=DESCRIPTION)
@with_options(FleetOptions, "kind", "bits", after="bits")
def plan(
    description: FleetDescription,
    output: FleetFolder,
    micro_batches: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Micro-batches of a step, instead of those that the description names."),
        PRIMARY,
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="data: every device has the whole model and some of the micro-batches. pipeline: some of the layers and all"
            " micro-batches. auto: data, unless no device can hold a micro-batch or a pipeline is shorter. mobillm: a device and"
            " a server after it, which trains a side network from what the device's forward sends.",
        ),
        PRIMARY,
    ] = "auto",
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            help="Of a number in messages: in a pipeline 8, or 0 for numbers as they are (default); for mobillm 8 (default), 4 or 0.",
        ),
    ] = None,
    html: Html = None,
    server: Server = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Share the micro-batches of a step, or the layers of the model, among devices, and plan each one's part, so that a step
    is as short as can be.
    """
    asked = read(FleetOptions, options, **({} if kind == MOBILLM else {"kind": kind, "bits": bits or 0}))
    enough_for_a_solver()
    if kind == MOBILLM:
        plan_with_server(
            description,
            output,
            micro_batches=micro_batches,
            bits=bits,
            options=asked,
            elsewhere=server is not None,
            html=html is not None,
            as_json=as_json,
        )
        return
    from tightfit.planner.fleet.description import read_description
    from tightfit.planner.fleet.io import FILE, save_fleet
    from tightfit.planner.fleet.kinds import plan_kind
    from tightfit.planner.report.fleet_text import fleet_text
    from tightfit.planner.report.summary import fleet_summary
    from tightfit.runtime.cli.terminal import Solving, messages
    from tightfit.runtime.common.files import check_place, write_whole

    check_place(output / FILE)
    if html is not None:
        check_place(html)
    console = messages()
    members, wanted = read_description(description, micro_batches)
    with Interrupts() as interrupts, Solving(console, asked.time_limit) as solving:
        if server is not None:
            with service(server) as elsewhere:
                planned, plans, why = elsewhere.fleet(members, wanted, **dict(asked.but(progress=solving)))
        else:
            planned, plans, why = plan_kind(members, wanted, **dict(asked.but(progress=solving)))
    if why is not None:
        console.print(why)
    if interrupts.seen:
        console.print(
            f"interrupted: this is the best plan found so far, at most {planned.gap:.2%} from the best of its kind"
        )
    summary = fleet_summary(planned) | {"interrupted": interrupts.seen}
    with answering(summary, fleet_text(planned), as_json):
        summary["fleet"] = str(save_fleet(planned, plans, output))
        if html is not None:
            from tightfit.planner.report.fleet_html import fleet_page

            summary["html"] = str(write_whole(html, fleet_page(planned)))
    console.print(f"plan written to {summary['fleet']}")
    if commands := member_commands(planned, output):
        console.print(commands)
    if html is not None:
        console.print(f"html written to {summary['html']}")


for command in (run, status):
    fleet.command(cls=Command)(command)
fleet.add_typer(federate, name="federate")
