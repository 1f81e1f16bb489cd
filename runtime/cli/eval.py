"""The command ``tightfit eval``: the loss of a plan's model on held-out data, under the plan's cap, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tightfit.runtime.cli.options import Cgroup, Columns, Debug, Json, Packing, Truncate, named_columns
from tightfit.runtime.cli.run import hand_on


def evaluate(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|FILE|random", help="Held-out data, in the files that `run` takes; random: made-up tokens."
        ),
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the adapter, or of the run that left it; default: none, the model as training would begin.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the result as JSON as well.")
    ] = None,
    truncate: Truncate = False,
    columns: Columns = None,
    packing: Packing = False,
    cgroup: Cgroup = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a plan's model under its cap: loss, perplexity, and accuracy where the data have choices."""
    from tightfit.planner.io import load_plan
    from tightfit.runtime.common.files import check_place
    from tightfit.runtime.results.evaluation import prepared
    from tightfit.runtime.supervision.progress import TrainingProgress

    if output is not None:
        check_place(output)
    replace = bool(context.obj)
    loaded = load_plan(plan)
    with (
        TrainingProgress(steps=0, tokens_per_step=loaded.places_per_step, budget=loaded.budget_bytes) as progress,
        prepared(
            loaded,
            data,
            adapter=adapter,
            truncate=truncate,
            columns=named_columns(columns),
            packing=packing,
            cgroup=cgroup,
            stages=progress.stage,
            counted=replace,
        ) as order,
    ):
        hand_on(order, loaded, cgroup=cgroup, as_json=as_json, debug=debug, replace=replace, output=output)
