"""Fills in the templates of the self-contained pages (``*.html.jinja``); all of them build on ``base.html.jinja``."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tightfit.planner.report.chart_data import shared_files


def filled(template: str, **facts: Any) -> str:
    """The HTML of a page. `facts` are what its template names; what they hold is escaped."""
    environment = Environment(
        loader=PackageLoader("tightfit.planner.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(files=shared_files(), **facts)
