"""A fleet's plan as one self-contained HTML page: a step drawn as lanes of devices and links, with its table beside it."""

from __future__ import annotations

from tightfit.planner.fleet.schema import PipelinePlan
from tightfit.planner.report.chart_data import lanes_of
from tightfit.planner.report.fleet_text import (
    AnyPlan,
    activity_sheet,
    chain_sheet,
    fleet_sentences,
    fleet_title,
)
from tightfit.planner.report.templates import filled
from tightfit.runtime.common.units import format_size


def fleet_page(fleet: AnyPlan) -> str:
    """HTML of a fleet's plan; its markup and script are ``fleet.html.jinja`` beside this file."""
    rows = (
        f"{fleet.micro_batches} micro-batches of {fleet.batch} rows"
        if fleet.batch > 1
        else f"{fleet.micro_batches} rows"
    )
    pipeline = isinstance(fleet, PipelinePlan)
    trained = "" if isinstance(fleet, PipelinePlan) else f"; {format_size(fleet.trained_bytes)} are trained"
    return filled(
        "fleet.html.jinja",
        title=fleet_title(fleet),
        subtitle=f"a step of {rows}{trained}",
        pipeline=pipeline,
        drawn=lanes_of(fleet),
        activity=activity_sheet(fleet),
        sentences=fleet_sentences(fleet),
        chain=chain_sheet(fleet),
    )
