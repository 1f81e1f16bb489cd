"""The command ``tightfit eval``: the loss of a plan's model on held-out data, under the plan's cap, without
training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tightfit.runtime.cli.options import Cgroup, Debug, Json, read, with_options
from tightfit.runtime.cli.phase_memory import PREPARING, expect_phase
from tightfit.runtime.cli.run import PREPARED_RUN, hand_on
from tightfit.runtime.session.options import EvaluationOptions


@with_options(EvaluationOptions)
def evaluate(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|FILE|random", help="Held-out data, in the files that `run` takes; random: made-up tokens."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the result as JSON as well.")
    ] = None,
    cgroup: Cgroup = True,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Evaluate a plan's model under its cap: loss, perplexity, and accuracy where the data have choices."""
    from tightfit.planner.io import load_plan
    from tightfit.runtime.common.files import check_writable
    from tightfit.runtime.results.evaluation import prepared
    from tightfit.runtime.supervision.progress import TrainingProgress

    if output is not None:
        check_writable(output)
    replace = bool(context.obj)
    if replace:
        expect_phase(PREPARED_RUN, PREPARING, [plan])
    loaded = load_plan(plan)
    with (
        TrainingProgress(steps=0, tokens_per_step=loaded.places_per_step, budget=loaded.budget_bytes) as progress,
        prepared(
            loaded,
            data,
            read(EvaluationOptions, options, cgroup=cgroup, stages=progress.stage),
            counted=replace,
        ) as order,
    ):
        hand_on(order, loaded, cgroup=cgroup, as_json=as_json, debug=debug, replace=replace, output=output)
