"""The command ``tightfit run``: trains as a plan says, under its cap."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tightfit.runtime.cli.options import Debug, Json, Packing, training_options
from tightfit.runtime.session.options import RunOptions
from tightfit.runtime.supervision.printing import answer
from tightfit.runtime.supervision.report_text import report_text

if TYPE_CHECKING:
    from tightfit.planner.schema import Plan
    from tightfit.runtime.session.fleet import Membership

FLEET = b'"kind": "data parallel"'
"""stands near the start of a fleet's plan"""


def run(
    context: typer.Context,
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A plan.json; under torchrun, the folder of a fleet's plan.")
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|FILE.jsonl|random",
            help="Training data, as JSON lines; random: made-up tokens, for sizing, or a module's sample batch.",
        ),
    ],
    steps: Annotated[
        int, typer.Option(help="Steps in all, each of one batch; of a fleet, micro-batches of all members together.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for adapter, report, metrics and checkpoints.")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left in the folder.")
    ] = False,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW, or of a mezo plan's SGD.")] = 2e-4,
    seed: Annotated[int, typer.Option(help="Seed of the adapter's start and the order of the data.")] = 0,
    schedule: Annotated[
        str, typer.Option(help="Course of the learning rate: constant, linear or cosine.")
    ] = "constant",
    warmup_steps: Annotated[int, typer.Option(help="Steps over which the learning rate rises from zero.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: only at the end.")] = 50,
    evaluate: Annotated[
        str | None, typer.Option("--eval", metavar="FILE.jsonl", help="Held-out data, evaluated before and after.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut samples longer than the planned sequence instead of refusing them.")
    ] = False,
    packing: Packing = True,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Start from the adapter in this folder, as a run leaves it, instead of a new one."
        ),
    ] = None,
    cgroup: Annotated[
        bool,
        typer.Option("--cgroup/--no-cgroup", help="Let the kernel enforce the cap where a memory cgroup can be made."),
    ] = True,
    profile_step: Annotated[
        bool,
        typer.Option(
            "--profile-step",
            help="Report where the seconds of the third step went (where several make an update, of the next that ends one), or of the last of fewer.",
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train under the cap as planned; leaves an adapter that PEFT loads and a report of predicted beside measured."""
    options = training_options(
        steps=steps,
        lr=lr,
        seed=seed,
        schedule=schedule,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
        packing=packing,
    )
    from tightfit.planner.io import load_plan

    member = None
    if of_fleet(plan):
        from tightfit.planner.fleet.io import load_any, load_member_plan
        from tightfit.runtime.cli.fleet_run import evaluates
        from tightfit.runtime.session.fleet import from_torchrun

        fleet = load_any(plan)
        member = from_torchrun(fleet)
        loaded, output = load_member_plan(plan, fleet, member.name), output / member.name
        evaluate = evaluate if evaluates(fleet, member.name) else None
    else:
        loaded = load_plan(plan)
    carry_out(
        loaded,
        data,
        options,
        member=member,
        output=output,
        resume=resume,
        overwrite=overwrite,
        evaluate=evaluate,
        truncate=truncate,
        cgroup=cgroup,
        profile_step=profile_step,
        as_json=as_json,
        debug=debug,
        replace=bool(context.obj),
        adapter=adapter,
    )


def of_fleet(plan: Path) -> bool:
    """Whether a path leads to the plan of a fleet: its folder, or the file in it."""
    if plan.is_dir():
        return True
    try:
        with plan.open("rb") as file:
            return FLEET in file.read(1 << 10)
    except OSError:
        return False


def carry_out(
    loaded: Plan,
    data: str,
    options: RunOptions,
    *,
    member: Membership | None,
    output: Path,
    resume: bool,
    overwrite: bool,
    evaluate: str | None,
    truncate: bool,
    cgroup: bool,
    profile_step: bool,
    as_json: bool,
    debug: bool,
    replace: bool,
    adapter: Path | None = None,
) -> None:
    """Run a plan, or the plan of one `member` of a fleet, and print its report; raises typer.Exit with the run's code.

    With `replace` this process may become the run's supervisor.
    """
    from tightfit.runtime.engine.device.resident import memory
    from tightfit.runtime.session.launch import prepared
    from tightfit.runtime.supervision.cgroup import MemoryCgroup
    from tightfit.runtime.supervision.progress import TrainingProgress
    from tightfit.runtime.supervision.supervisor import Show, hand_over
    from tightfit.runtime.supervision.training_process import RunOrder

    steps = options.steps or 0
    tokens = loaded.batch * loaded.seq if loaded.seq else None
    with (
        TrainingProgress(steps=steps, tokens_per_step=tokens, budget=loaded.budget_bytes) as training,
        prepared(
            loaded,
            data,
            options,
            out=output,
            resume=resume,
            overwrite=overwrite,
            eval_data=evaluate,
            truncate=truncate,
            cgroup=cgroup,
            profile_step=profile_step,
            stages=training.stage,
            counted=replace,
            member=member,
            adapter=adapter,
        ) as ready,
    ):
        if isinstance(ready, RunOrder):
            group = MemoryCgroup.create(loaded.budget_bytes) if cgroup else None
            show = Show(
                steps=steps,
                tokens_per_step=tokens,
                as_json=as_json,
                debug=debug,
                preparation_bytes=memory().peak,
                group=(str(group.path), group.version) if group else None,
                home=MemoryCgroup.home() if group else None,
            )
            raise typer.Exit(hand_over(ready, show, group, replace=replace))
    sys.stderr.write(f"already done: {output} has all {steps} steps; give more --steps to go on\n")
    answer(ready, report_text(ready), as_json=as_json)
