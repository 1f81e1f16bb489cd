"""The command ``tightfit plan``: finds the fastest training step within a budget."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.option_fields import PRIMARY
from tightfit.profiles.worker_process import expect
from tightfit.runtime.cli import answers
from tightfit.runtime.cli.options import (
    Certificate,
    Debug,
    Json,
    Server,
    answering,
    left_of,
    next_command,
    read,
    service,
    with_options,
)
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.interrupts import Interrupts
from tightfit.runtime.common.limits import enough_for_a_solver
from tightfit.runtime.common.units import format_size, parse_size
from tightfit.runtime.engine.start.page_cache import forget_libraries
from tightfit.runtime.session.options import RehearsalOptions
from tightfit.runtime.supervision.printing import answer

MOST_SMALLER = 32
"""plans for smaller budgets that are made at once"""

if TYPE_CHECKING:
    from rich.console import Console

    from tightfit.planner.report.explanation import Explanation
    from tightfit.planner.schema import Plan
    from tightfit.profiles.schema import Profile
    from tightfit.runtime.cli.terminal import SolvingDisplay


@with_options(RehearsalOptions)
@with_options(PlanOptions)
def plan(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.json, or a bare graph of operators.")],
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Budget of the whole run, its supervisor included: 600MiB, 600MB or plain bytes."
        ),
    ],
    what_if: Annotated[
        bool,
        typer.Option(
            "--what-if/--no-what-if",
            help=(
                "Also plan 50 MiB less and 50 MiB more, of a small bare graph a tenth of the budget, to see what memory"
                " is worth."
            ),
        ),
    ] = False,
    smaller: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_SMALLER,
            metavar="NUMBER",
            help=(
                "Also make so many plans for smaller budgets, down to the smallest: where less memory is free later,"
                " `tightfit train --resume --memory auto` takes one of them."
            ),
        ),
    ] = 0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the plan is written."), PRIMARY] = Path(
        "plan.json"
    ),
    server: Server = None,
    certificate: Certificate = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Find the fastest training step whose peak never exceeds the budget, and prove how near it is to the best."""
    budget = parse_size(memory)
    settings, rehearsing = read(PlanOptions, options), read(RehearsalOptions, options)
    enough_for_a_solver()
    from tightfit.planner.io import save_plan
    from tightfit.planner.report.explain import explain
    from tightfit.profiles.io import load_profile
    from tightfit.runtime.cli.terminal import SolvingDisplay, StagesDisplay, messages
    from tightfit.runtime.common.files import check_writable
    from tightfit.runtime.session.rehearsal import rehearsed

    check_writable(output)
    console = messages()
    loaded_profile = load_profile(profile)
    if server is not None and what_if:
        raise InputError("--what-if plans on this machine: leave out either it or --server")
    explanations: list[Explanation] = []
    interrupted = False

    def make(profile: Profile) -> Plan:
        nonlocal interrupted
        with Interrupts() as interrupts, SolvingDisplay(console, settings.seconds) as solving:
            if server is None:
                result, explanation = _plan_here(profile, budget, settings, solving, interrupts, what_if=what_if)
            else:
                with service(server, certificate) as client:
                    result = client.plan(profile, budget, **dict(settings.but(progress=solving)))
                    explanation = client.explanation(result)
        interrupted = interrupts.seen
        explanations.append(explanation)
        return result

    planned, stopped = rehearsed(
        loaded_profile,
        lambda profile: step_to_plan(profile, settings, server),
        make,
        go_on=lambda: rehearsing.rehearse and not interrupted,
        tell=console.print,
        showing=partial(StagesDisplay, console),
        wait=rehearsing.wait,
    )
    explanation, interrupted = explanations[-1], interrupted or stopped
    if explanation.shortfall is not None and explanation.shortfall.minimum_budget_bytes != planned.minimum_budget_bytes:
        # After its first answer the search went on and found that a smaller budget is enough: take that figure.
        smallest = explanation.shortfall.minimum_budget_bytes
        planned = planned.model_copy(update={"minimum_budget_bytes": smallest, "minimum_budget_reason": None})
    summary = answers.facts(planned) | {"interrupted": interrupted, "explanation": explanation.model_dump(mode="json")}
    if not planned.fits:
        answer(summary, None, as_json=as_json)
        console.print(f"tightfit: {'; '.join(explain(planned, explanation))}")
        raise typer.Exit(3)
    if interrupted:
        console.print(
            f"interrupted: this is the best plan found so far, at most {planned.gap:.2%} from the best of its kind"
        )
    with answering(summary, answers.plan_text(planned, explanation), as_json):
        summary["plan"] = str(save_plan(planned, output))
    console.print(f"plan written to {output}{_run_next(planned, output)}")
    if smaller:
        plan_smaller(loaded_profile, planned, smaller, settings, output, server, certificate, console)


def plan_smaller(
    profile: Profile,
    planned: Plan,
    number: int,
    options: PlanOptions,
    output: Path,
    server: str | None,
    certificate: Path | None,
    console: Console,
) -> None:
    """Make plans for `number` smaller budgets, down to the smallest, in the folder `smaller_folder` of the plan in
    `output`.

    They are made one after the other and share what is known of the step; corrections that rehearsals have taught
    count.
    """
    from tightfit.planner.io import save_plan
    from tightfit.profiles.learned import corrected, figures_id, load_learned
    from tightfit.runtime.cli.terminal import StagesDisplay

    step = corrected(step_to_plan(profile, options, server), load_learned(figures_id(profile)))
    folder = smaller_folder(output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stages = stack.enter_context(StagesDisplay(console))
        if server is None:
            check_planning(step, 0, options)
            from tightfit.planner.plan import planner_of

            planner = planner_of(step)

            def make(budget: int) -> Plan:
                return planner.plan(budget, policy=options.policy, time_limit=options.seconds, gap=options.gap)

        else:
            client = stack.enter_context(service(server, certificate))

            def make(budget: int) -> Plan:
                return client.plan(step, budget, **dict(options))

        smallest = make(1).minimum_budget_bytes or planned.budget_bytes
        ratio = planned.budget_bytes / smallest
        budgets = sorted(
            {int(smallest * ratio ** (index / number)) for index in range(number)} - {planned.budget_bytes}
        )
        for done, budget in enumerate(budgets, 1):
            stages("planning smaller budgets", done, len(budgets))
            plan = make(budget)
            if plan.train is not None:
                save_plan(plan, folder / f"{budget}.json")
    console.print(
        f"{len(list(folder.iterdir()))} plans for smaller budgets, down to {format_size(smallest)}, in {folder}"
    )


def smaller_folder(plan: Path) -> Path:
    """Where plans for smaller budgets lie, beside a plan."""
    return plan.with_suffix(".smaller")


def step_to_plan(profile: Profile, options: PlanOptions, server: str | None) -> Profile:
    """The step that is planned. A service chooses its optimizer itself."""
    from tightfit.planner.problem.optimizers import chosen
    from tightfit.profiles.learned import LearnedFigures

    return chosen(profile, options.optimizer, options.max_grad_norm, LearnedFigures()) if server is None else profile


def check_planning(profile: Profile, budget: int, options: PlanOptions) -> None:
    """Raise InputError, before a solver is loaded, where planning a model has no place in the memory that is free; then
    see to it that loading one takes no more than was said.
    """
    if profile.model.is_bare_graph:
        return
    from tightfit.planner.solve.planning_memory import planning_bytes

    expect(
        "planning",
        planning_bytes(profile, budget, options),
        "let a service plan (--server URL), or plan on a machine with more memory, or with more",
    )
    solvers = find_spec("ortools")
    for folder in solvers.submodule_search_locations or () if solvers else ():
        forget_libraries(Path(folder))


def _run_next(plan: Plan, path: Path) -> str:
    """The end of a line, which says how to run the plan; empty if this runtime cannot (bare graphs, cards, estimated
    times).
    """
    if plan.model.is_bare_graph or plan.device.kind != "cpu" or not plan.device.measured:
        return ""
    data = "random" if plan.model.kind == "module" else "FILE.jsonl"
    return next_command(f"tightfit run {shlex.quote(str(path))} --data {data} --steps N -o out")


def _plan_here(
    profile: Profile,
    budget: int,
    options: PlanOptions,
    solving: SolvingDisplay,
    interrupts: Interrupts,
    *,
    what_if: bool,
) -> tuple[Plan, Explanation]:
    """Make the plan and its explanation; with `what_if`, the latter says what more or less memory is worth."""
    started = time.monotonic()
    check_planning(profile, budget, options)
    from tightfit.planner.plan import planner_of
    from tightfit.planner.report.explanation import account
    from tightfit.planner.report.marginal_value import explained
    from tightfit.planner.report.marginal_value import what_if as check

    planner, time_limit, gap = planner_of(profile), options.seconds, options.gap
    limit = None if options.time_limit is None else left_of(time_limit, started)
    planned = planner.plan(budget, policy=options.policy, time_limit=limit, gap=gap, progress=solving)
    # The plan is there already: a Ctrl-C from here on only leaves out what would be added to its explanation.
    with contextlib.suppress(KeyboardInterrupt):
        if what_if and planned.fits and planned.policy == "solver" and not interrupts.seen:
            planned, neighbours = check(planner, planned, time_limit=time_limit, gap=gap, progress=solving)
            return planned, account(planned).model_copy(update={"neighbours": neighbours})
        seconds_left = 0.0 if interrupts.seen else time_limit - (time.monotonic() - started)
        return planned, explained(planner, planned, left=seconds_left)
    return planned, account(planned)
