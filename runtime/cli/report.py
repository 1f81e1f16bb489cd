"""The command ``tightfit report``: hands the metrics of a run to TensorBoard or Weights & Biases, or makes a page of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tightfit.runtime.cli.options import Debug, Json
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import JsonError, read_json
from tightfit.runtime.supervision.printing import answer


def report(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The output folder of `tightfit run`.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="tensorboard|wandb", help="Who takes the metrics; tensorboard: a file in OUT/tensorboard."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on while the run goes on, until it ends or Ctrl-C.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write one self-contained HTML page: predicted beside measured, loss and memory over the steps, the plan's step.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN", help="With --html: the plan that was run, where OUT has none."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hand the metrics of a run, of one that is under way or of one that is done, to a tool that draws curves; or make a page of one that
    is done.

    A process of its own, whose memory is no part of the run's budget.
    """
    if (to is None) == (html is None):
        raise InputError(
            "name either who takes the metrics, --to tensorboard or --to wandb, or the page to write, --html FILE"
        )
    if plan is not None and html is None:
        raise InputError(f"--plan {plan}: the plan is for the page; name the page to write as well, --html FILE")
    if html is not None:
        _write_page(output, html, plan, as_json=as_json)
        return
    assert to is not None
    from tightfit.runtime.cli.terminal import messages
    from tightfit.runtime.session.trackers import track

    console = messages()
    last_step = -1

    def print_step(step: int) -> None:
        nonlocal last_step
        if follow and step > last_step:
            console.print(f"{to} has step {step}")
            last_step = step

    counts = track(output, to, follow=follow, tell=print_step)
    text = f"{to} has {counts['steps']} steps and {counts['evaluations']} evaluations of {output}"
    answer(counts, text, as_json=as_json)


def _read_report(output: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = read_json(output / "report.json")
    except (OSError, JsonError) as error:
        raise InputError(
            f"{output / 'report.json'}: {error}; name the output folder of a run that has ended"
        ) from error
    return report


def _write_page(output: Path, html: Path, plan_file: Path | None, *, as_json: bool) -> None:
    from tightfit.planner.io import load_plan
    from tightfit.planner.report.run_html import run_page
    from tightfit.runtime.common.files import check_writable, write_whole
    from tightfit.runtime.supervision.report import read_metrics

    check_writable(html)
    report = _read_report(output)
    beside = output / "plan.json"
    plan = load_plan(plan_file or beside) if plan_file is not None or beside.exists() else None
    if plan is not None and plan.fingerprint != report["plan_fingerprint"]:
        raise InputError(
            f"{plan_file or beside} is not the plan that {output} ran, {report['plan_fingerprint'][:12]}; give that one, --plan PLAN"
        )
    metrics = output / "metrics.jsonl"
    page = run_page(output.resolve().name, report, read_metrics(str(metrics)) if metrics.exists() else [], plan)
    answer({"html": str(write_whole(html, page))}, f"html written to {html}", as_json=as_json)
