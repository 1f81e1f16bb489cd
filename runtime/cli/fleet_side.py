"""``tightfit fleet plan --kind mobillm``: the plan of a device and a server that train a side network."""

from __future__ import annotations

from pathlib import Path

from tightfit.planner.fleet.options import FleetOptions
from tightfit.runtime.cli.fleet_run import member_commands
from tightfit.runtime.cli.options import answering
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.interrupts import Interrupts


def plan_with_server(
    description: Path,
    output: Path,
    *,
    micro_batches: int | None,
    bits: int | None,
    options: FleetOptions,
    elsewhere: bool,
    html: bool,
    as_json: bool,
) -> None:
    """Plan both members and write the folder that they are run from. `elsewhere`, `html`: whether a planning service or a
    page was asked for, which there is not.

    Raises InputError for these, and as `tightfit.planner.fleet.side_plan.plan_side`.
    """
    from tightfit.planner.fleet.description import read_description
    from tightfit.planner.fleet.io import FILE, save_fleet
    from tightfit.planner.fleet.side_plan import plan_side
    from tightfit.planner.problem.device_forward import DEFAULT_BITS
    from tightfit.planner.report.side_text import side_text
    from tightfit.runtime.cli.terminal import Solving, messages
    from tightfit.runtime.common.files import check_place

    for asked, option in ((elsewhere, "--server"), (html, "--html")):
        if asked:
            raise InputError(f"{option} is for fleets of another kind; plan mobillm without it")
    check_place(output / FILE)
    console = messages()
    members, wanted = read_description(description, micro_batches)
    limits = {"time_limit": options.time_limit} | ({} if options.gap is None else {"gap": options.gap})
    with Interrupts() as interrupts, Solving(console, options.time_limit) as solving:
        planned, plans = plan_side(
            members, wanted, bits=DEFAULT_BITS if bits is None else bits, progress=solving, **limits
        )
    summary = planned.model_dump(mode="json", exclude={"timeline"}) | {"interrupted": interrupts.seen}
    with answering(summary, side_text(planned), as_json):
        summary["fleet"] = str(save_fleet(planned, plans, output))
    console.print(f"plan written to {summary['fleet']}")
    if commands := member_commands(planned, output):
        console.print(commands)
