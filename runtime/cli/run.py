"""The command ``tightfit run``: trains as a plan says, under its cap."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tightfit.profiles.option_fields import PRIMARY
from tightfit.profiles.worker_process import held_bytes, predicted_bytes
from tightfit.runtime.cli.options import Cgroup, Debug, Json, read, with_options
from tightfit.runtime.cli.phase_memory import PREPARING, expect_phase
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.session.options import RunOptions
from tightfit.runtime.supervision.printing import answer, with_stages
from tightfit.runtime.supervision.report_text import report_text

if TYPE_CHECKING:
    from tightfit.planner.schema import Plan
    from tightfit.runtime.supervision.training_process import RunOrder

PREPARED_RUN = "preparing the run"


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What a longer command has done before a run, as `SupervisorSettings` has it."""

    stages: str | None = None
    stage_bytes: dict[str, list[int | None]] | None = None


NOTHING = Earlier()


@with_options(RunOptions)
def run(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|FILE|random",
            help=(
                "Training data: JSON lines, CSV, Parquet or a folder of the library datasets; random: made-up tokens,"
                " for sizing, or a module's sample batch."
            ),
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for adapter, report, metrics and checkpoints.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder."), PRIMARY
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left in the folder."), PRIMARY
    ] = False,
    cgroup: Cgroup = True,
    stages: Annotated[
        str | None,
        typer.Option("--stages", hidden=True, help="JSON of what `tightfit train` did before, for its answer."),
    ] = None,
    held: Annotated[
        str | None,
        typer.Option(
            "--held",
            hidden=True,
            help="JSON of what the stages of `tightfit train` were predicted to hold, and have held, in bytes.",
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option("--tokens", hidden=True, help="Folder in which `tightfit train` has kept the data as tokens."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train under the cap as planned; leaves an adapter that PEFT loads and a report of predicted beside measured."""
    training = read(RunOptions, options, out=output, resume=resume, overwrite=overwrite, cgroup=cgroup, tokens=tokens)
    training.check_end()
    from tightfit.planner.io import load_plan

    if plan.is_dir():
        raise InputError(
            f"{plan} is a folder, not a plan.json; where it is the plan of a fleet, `tightfit fleet run {plan} ...`"
            " runs it"
        )
    if context.obj:
        expect_phase(PREPARED_RUN, PREPARING, [plan])
    loaded = load_plan(plan)
    earlier = Earlier(
        stages=stages,
        stage_bytes=None if held is None else json.loads(held),  # noqa: TID251  written by `tightfit train`
    )
    carry_out(loaded, data, training, as_json=as_json, debug=debug, replace=bool(context.obj), earlier=earlier)


def carry_out(
    loaded: Plan,
    data: str,
    options: RunOptions,
    *,
    as_json: bool,
    debug: bool,
    replace: bool,
    earlier: Earlier = NOTHING,
) -> None:
    """Run a plan, or the plan of one member of a fleet, and print its report; raises typer.Exit with the run's code.

    With `replace` this process may become the run's supervisor. With `as_json` the report is printed beside what was
    done `earlier`.
    """
    from tightfit.runtime.session.launch import prepared
    from tightfit.runtime.supervision.progress import TrainingProgress
    from tightfit.runtime.supervision.report import already_done
    from tightfit.runtime.supervision.training_process import RunOrder

    with (
        TrainingProgress(steps=0, tokens_per_step=loaded.places_per_step, budget=loaded.budget_bytes) as training,
        prepared(loaded, data, options.but(stages=training.stage), counted=replace) as ready,
    ):
        if isinstance(ready, RunOrder):
            hand_on(
                ready,
                loaded,
                cgroup=options.cgroup,
                as_json=as_json,
                debug=debug,
                replace=replace,
                earlier=earlier,
            )
    sys.stderr.write(already_done(ready, str(options.out), len(ready["loss"])))
    answer(with_stages(earlier.stages, ready), report_text(ready), as_json=as_json)


def hand_on(
    order: RunOrder,
    loaded: Plan,
    *,
    cgroup: bool,
    as_json: bool,
    debug: bool,
    replace: bool,
    output: Path | None = None,
    earlier: Earlier = NOTHING,
    then: list[str] | None = None,
) -> NoReturn:
    """Start the supervisor of an order that is prepared, in the place of this process with `replace`; raises typer.Exit
    with its code. `output` is where the result of an evaluation goes besides, `earlier` as in `carry_out`, `then` as in
    `SupervisorSettings`.
    """
    from tightfit.runtime.engine.device.resident import memory
    from tightfit.runtime.supervision.cgroup import MemoryCgroup
    from tightfit.runtime.supervision.supervisor import SupervisorSettings, hand_over

    prepared_bytes = {PREPARED_RUN: [predicted_bytes() or None, memory().peak + held_bytes()]}
    group = MemoryCgroup.create(loaded.budget_bytes) if cgroup else None
    show = SupervisorSettings(
        tokens_per_step=order.planned["places_per_step"],
        as_json=as_json,
        debug=debug,
        preparation_bytes=memory().peak + held_bytes(),
        group=(str(group.path), group.version) if group else None,
        home=MemoryCgroup.home() if group else None,
        output=str(output.absolute()) if output else None,
        stages=earlier.stages,
        stage_bytes=(earlier.stage_bytes or {}) | prepared_bytes,
        then=then,
    )
    raise typer.Exit(hand_over(order, show, group, replace=replace))
