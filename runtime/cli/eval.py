"""The command ``tightfit eval``: the loss of a plan's model on held-out data, under the plan's cap, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tightfit.runtime.cli.options import Debug, Json, named_columns


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
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut samples longer than the planned sequence instead of refusing them.")
    ] = False,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=COLUMN,...",
            help="What the data call the parts of a sample, for example prompt=question,completion=answer.",
        ),
    ] = None,
    cgroup: Annotated[
        bool,
        typer.Option("--cgroup/--no-cgroup", help="Let the kernel enforce the cap where a memory cgroup can be made."),
    ] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a plan's model under its cap: loss, perplexity, and accuracy where the data have choices."""
    from tightfit.planner.io import load_plan
    from tightfit.runtime.common.files import check_place
    from tightfit.runtime.engine.device.resident import memory
    from tightfit.runtime.results.evaluation import prepared
    from tightfit.runtime.supervision.cgroup import MemoryCgroup
    from tightfit.runtime.supervision.progress import TrainingProgress
    from tightfit.runtime.supervision.supervisor import Show, hand_over

    if output is not None:
        check_place(output)
    replace = bool(context.obj)
    loaded = load_plan(plan)
    tokens = loaded.batch * loaded.seq if loaded.seq else None
    with (
        TrainingProgress(steps=0, tokens_per_step=tokens, budget=loaded.budget_bytes) as progress,
        prepared(
            loaded,
            data,
            adapter=adapter,
            truncate=truncate,
            columns=named_columns(columns),
            cgroup=cgroup,
            stages=progress.stage,
            counted=replace,
        ) as order,
    ):
        group = MemoryCgroup.create(loaded.budget_bytes) if cgroup else None
        show = Show(
            tokens_per_step=tokens,
            as_json=as_json,
            debug=debug,
            preparation_bytes=memory().peak,
            group=(str(group.path), group.version) if group else None,
            home=MemoryCgroup.home() if group else None,
            output=str(output.absolute()) if output else None,
        )
        raise typer.Exit(hand_over(order, show, group, replace=replace))
