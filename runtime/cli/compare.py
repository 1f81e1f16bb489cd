"""The command ``tightfit compare``: compares policies over budgets and devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.option_fields import PRIMARY
from tightfit.runtime.cli import answers
from tightfit.runtime.cli.options import (
    Certificate,
    Debug,
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
from tightfit.runtime.common.units import parse_size


@with_options(PlanOptions, after="picture")
def compare(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.json, or a bare graph of operators.")],
    memory: Annotated[str, typer.Option(metavar="SIZE,...", help="Budgets, for example 400MiB,600MiB,1GiB.")],
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help=(
                "solver and fixed rules to compare; default: the solver and every exact rule that applies to the"
                " profile."
            ),
        ),
        PRIMARY,
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help=(
                "own: the profile's own device. Names of devices (see `tightfit devices`) or JSON files that describe"
                " them: times estimated from the profile's FLOPs and bytes."
            ),
        ),
        PRIMARY,
    ] = "own",
    html: Html = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the curve as .png or .svg."), PRIMARY
    ] = None,
    server: Server = None,
    certificate: Certificate = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Compare policies over budgets and devices: seconds per step, or the smallest budget that would be enough."""
    budgets = [parse_size(part) for part in memory.split(",")]
    policies = None if policy is None else [part.strip() for part in policy.split(",")]
    asked = read(PlanOptions, options)
    plan_options = asked.model_dump(exclude={"policy", "progress"}) | {"time_limit": asked.seconds}
    enough_for_a_solver()
    from tightfit.planner.compare import compare as compare_plans
    from tightfit.profiles.devices.data_sheets import find_device
    from tightfit.profiles.io import load_profile
    from tightfit.runtime.cli.terminal import ComparisonDisplay, messages
    from tightfit.runtime.common.files import check_writable, write_whole

    if html is not None:
        check_writable(html)
    if picture is not None:
        from tightfit.planner.report.figures import picture_kind

        picture_kind(picture)
        check_writable(picture)

    console = messages()
    names = [part.strip() for part in device.split(",")]
    loaded_profile = load_profile(profile)
    with Interrupts() as interrupts, ComparisonDisplay(console, interrupts) as comparing:
        if server is not None:
            with service(server, certificate) as client:
                plans = client.compare(
                    loaded_profile,
                    budgets,
                    policies,
                    devices=names,
                    **plan_options,
                    progress=comparing.elsewhere,
                ).plans
        else:
            plans = compare_plans(
                loaded_profile,
                budgets,
                policies,
                devices=[None if name == "own" else find_device(name) for name in names],
                **plan_options,
                progress=comparing,
                solving=comparing.solving,
            ).plans
    if interrupts.seen:
        console.print(f"interrupted: these are the {len(plans)} plans made so far, the last one with what it had found")
    summary: dict[str, Any] = {
        "interrupted": interrupts.seen,
        "plans": [answers.facts(plan) for plan in plans],
    }
    with answering(summary, answers.comparison_text(plans), as_json):
        if as_json:
            summary["changes"] = answers.changes(plans)
        if html is not None:
            from tightfit.planner.report.html import comparison_page

            summary["html"] = str(write_whole(html, comparison_page(plans)))
        if picture is not None:
            from tightfit.planner.report.figures import draw_curve

            summary["picture"] = str(draw_curve(plans, picture))
    for kind in ("html", "picture"):
        if kind in summary:
            console.print(f"{kind} written to {summary[kind]}")
