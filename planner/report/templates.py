"""Fills in the templates of the self-contained pages (``*.html.jinja``)."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
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
    files = shared_files()
    styles = "\n".join(text for name, text in files.items() if name.endswith(".css"))
    return environment.get_template(template).render(styles=styles, modules=_modules(files), **facts)


def _modules(files: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """An import map of the scripts, each within the page: ``import … from "tightfit/charts.js"``."""
    imports = {}
    for name, text in files.items():
        if name.endswith(".js"):
            script = re.sub(r'from "\./(\w+\.js)"', r'from "tightfit/\1"', text)
            imports[f"tightfit/{name}"] = f"data:text/javascript;base64,{base64.b64encode(script.encode()).decode()}"
    return {"imports": imports}
