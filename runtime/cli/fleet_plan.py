"""The command ``tightfit fleet plan``: which devices of a description do what, for a fleet of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tightfit.planner.fleet.options import FEDERATED, FleetOptions, RoundsPlanOptions
from tightfit.profiles.option_fields import PRIMARY
from tightfit.runtime.cli.fleet_run import member_commands
from tightfit.runtime.cli.options import (
    Debug,
    FleetDescription,
    FleetFolder,
    Json,
    answering,
    read,
    with_options,
)
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.interrupts import Interrupts
from tightfit.runtime.common.limits import enough_for_a_solver

if TYPE_CHECKING:
    from tightfit.planner.fleet.description import DescribedFleet
    from tightfit.planner.fleet.schema import FleetPlan
    from tightfit.planner.schema import Plan

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
MOBILLM = "mobillm"
OTHERS = (MOBILLM, FEDERATED)
KINDS = ("auto", "data", "pipeline", *OTHERS)


@with_options(RoundsPlanOptions, after="gap")
@with_options(FleetOptions, "kind", "bits", after="bits")
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
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help=(
                "data: every device has the whole model and some of the micro-batches. pipeline: some of the layers and"
                " all micro-batches. mobillm: a device and a server after it, which trains a side network from what the"
                " device's forward sends. federated: rounds of devices that come and go, each with data of its own."
                " auto: federated for a description of rounds; else data, unless no device can hold a micro-batch or a"
                " pipeline is shorter."
            ),
        ),
        PRIMARY,
    ] = "auto",
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            help=(
                "Of a number in messages: in a pipeline 8, or 0 for numbers as they are (default); for mobillm 8"
                " (default), 4 or 0."
            ),
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Share the micro-batches of a step, the layers of the model, or the steps of a round, among devices, and plan each
    one's part, so that a step or a round is as short as can be.
    """
    if kind not in KINDS:
        raise InputError(f"--kind {kind!r}: it should be {', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}")
    of_rounds = read(RoundsPlanOptions, options)
    asked = read(FleetOptions, options, **({} if kind in OTHERS else {"kind": kind, "bits": bits or 0}))
    enough_for_a_solver()
    from tightfit.planner.fleet.description import read_description
    from tightfit.planner.fleet.fleet_planner import plan_kind, plan_side
    from tightfit.planner.fleet.io import FILE, save_fleet
    from tightfit.planner.problem.device_forward import DEFAULT_BITS
    from tightfit.planner.report.fleet_text import fleet_text
    from tightfit.runtime.cli.terminal import SolvingDisplay, messages
    from tightfit.runtime.common.files import check_writable

    described = read_description(description, kind, micro_batches=micro_batches, steps=steps)
    kind = FEDERATED if described.of_rounds else kind
    for_rounds: dict[str, Any] = {
        "--steps": steps,
        "--start": of_rounds.start,
        "--server-start": of_rounds.server_start,
    }
    for_steps: dict[str, Any] = {"--micro-batches": micro_batches, "--bits": bits}
    foreign = for_steps if kind == FEDERATED else for_rounds
    for option, value in foreign.items():
        if value is not None:
            raise InputError(f"{option} is for fleets of another kind; plan {kind} without it")
    check_writable(output / FILE)
    console = messages()
    planned: FleetPlan
    why: str | None = None
    gap: dict[str, Any] = {} if asked.gap is None else {"gap": asked.gap}
    members, count = described.members, described.count
    with Interrupts() as interrupts, SolvingDisplay(console, asked.time_limit) as solving:
        if kind == FEDERATED:
            asked_of_rounds = of_rounds.but(progress=solving)
            planned, plans = _rounds(described, asked_of_rounds, **gap)
        elif kind == MOBILLM:
            wanted = DEFAULT_BITS if bits is None else bits
            planned, plans = plan_side(
                members, count, bits=wanted, time_limit=asked.time_limit, progress=solving, **gap
            )
        else:
            planned, plans, why = plan_kind(members, count, **dict(asked.but(progress=solving)))
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


def _rounds(described: DescribedFleet, options: RoundsPlanOptions, **more: float) -> tuple[FleetPlan, dict[str, Plan]]:
    """The plan of rounds, those of the devices, and the server's for each, if there is one."""
    from tightfit.planner.fleet.rounds import plan_federated, plan_split

    common: dict[str, Any] = {"time_limit": options.time_limit, "progress": options.progress, **more}
    if options.start is not None:
        common["start_seconds"] = options.start
    if described.server is None:
        return plan_federated(described.members, described.count, **common)
    if options.server_start is not None:
        common["server_start_seconds"] = options.server_start
    weights = described.weights
    return plan_split(described.server, described.members, described.count, weights=weights, **common)
