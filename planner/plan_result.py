"""Builds the plan that planning answers with: the schedule, the simulator's figures, proof and fingerprint, or why
nothing fits.

Nothing here imports the solver, so that plans can be read and checked without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from tightfit.planner.instructions import Instruction
from tightfit.planner.schedule.multi_layer_recompute import rerun_layers
from tightfit.planner.schema import Peak, Phase, Plan
from tightfit.planner.search_options import LONGEST_LIMIT, TIME_LIMIT, SearchProgress
from tightfit.profiles.schema import Profile

if TYPE_CHECKING:
    from tightfit.planner.simulation.simulate import Simulation

EXACT = 1e-6
"""gap up to which a bare graph's plan counts as proven optimal; integer programs prove no smaller one"""
ROUNDING = 2e-5
"""gap up to which a model's plan counts as proven optimal; floating-point programs have bounds that may be off by
`tightfit.planner.solvers.highs.MARGIN`
"""
EndedBy = Literal["proof", "gap", "stalled", "time limit", "interrupt"]


def drafted_phase(listed: list[Instruction]) -> Phase:
    """A phase of these instructions, its figures not yet filled in."""
    return Phase(instructions=listed, seconds=0.0, peak_bytes=0, peak=Peak(instruction=0, text="", tensors={}))


def drafted(
    profile: Profile,
    part: Profile,
    *,
    policy: str,
    budget_bytes: int,
    decisions: dict[str, str],
    resident: dict[str, int],
    train: list[Phase],
    evaluate: Phase | None = None,
    update: Phase | None = None,
    arena_bytes: int = 0,
) -> Plan:
    """A plan with the training schedules `train`, before figures, proof and fingerprint are filled in.
    `part`: the profile of the part of the step that they run, which for a partial step differs from `profile`.
    """
    return Plan(
        fingerprint="",
        profile_fingerprint=profile.fingerprint,
        policy=policy,
        status="feasible",
        budget_bytes=budget_bytes,
        floor_bytes=part.device.floor.held_bytes,
        peak_bytes=0,
        step_seconds=0.0,
        bound_seconds=0.0,
        any_schedule_bound_seconds=0.0,
        gap=0.0,
        any_schedule_gap=0.0,
        solve_seconds=0.0,
        model=profile.model,
        batch=profile.batch,
        seq=profile.seq,
        compute_dtype=profile.compute_dtype,
        optimizer=part.optimizer,
        device=part.device,
        tensors=profile.tensors,
        programs=part.programs,
        layers=part.layers,
        loss=profile.loss,
        token_losses=profile.token_losses,
        decisions=decisions,
        resident=resident,
        arena_bytes=arena_bytes,
        workspace_bytes=0,
        train=train[0],
        cycle=train[1:],
        evaluate=evaluate,
        update=update,
    )


def proof_tolerance(kind: str) -> float:
    """The gap, as a share of the step, up to which a plan for a model of this kind counts as proven optimal in its
    class.
    """
    return EXACT if kind == "graph" else ROUNDING


def status_of(plan_: Plan, bound_seconds: float, step_seconds: float | None = None) -> Literal["optimal", "feasible"]:
    """Whether a valid lower bound proves a plan optimal, to rounding. `step_seconds`: instead of the plan's own."""
    step = plan_.step_seconds if step_seconds is None else step_seconds
    return "optimal" if gap_to(step, bound_seconds) <= proof_tolerance(plan_.model.kind) else "feasible"


def ended_by(
    kind: str, gap: float, *, asked: float, deterministic: bool, stalled: bool = False, interrupted: bool = False
) -> EndedBy:
    """Why a search for a model of this `kind` ended at `gap`.

    `asked`: the gap at which it could stop; `deterministic`: no time limit cut it or any search that it depends on;
    `stalled`: it gave up because it had stopped gaining.
    """
    if gap <= proof_tolerance(kind):
        return "proof"
    if gap <= asked:
        return "gap"
    if interrupted:
        return "interrupt"
    return "stalled" if deterministic or stalled else "time limit"


def answered(
    raw: Plan,
    simulation: Simulation,
    *,
    bound_seconds: float,
    any_bound: float,
    solve_seconds: float,
    deterministic: bool,
    asked: float = 0.0,
    stalled: bool = False,
    interrupted: bool = False,
) -> Plan:
    """`raw` with the simulator's figures, its bounds in seconds (`bound_seconds` for its class, `any_bound` for any
    schedule), its status and its fingerprint.

    `asked`, `stalled` and `interrupted` as of `ended_by`.
    """
    step = simulation.step_seconds
    bound, any_schedule = min(step, bound_seconds), min(step, any_bound)
    # A fixed rule's plan is never called optimal, however near its bound it is.
    searched = raw.policy == "solver"
    status = status_of(raw, bound, step) if searched else raw.status
    ended = ended_by(
        raw.model.kind,
        gap_to(step, bound),
        asked=asked,
        deterministic=deterministic,
        stalled=stalled,
        interrupted=interrupted,
    )
    return sealed(
        raw.model_copy(
            update={
                "status": status,
                "ended_by": ended if searched else None,
                "peak_bytes": simulation.peak_bytes,
                "step_seconds": step,
                "bound_seconds": bound,
                "any_schedule_bound_seconds": any_schedule,
                "gap": gap_to(step, bound),
                "any_schedule_gap": gap_to(step, any_schedule),
                "solve_seconds": solve_seconds,
                "deterministic": deterministic,
                "workspace_bytes": simulation.workspace_bytes,
                "train": simulation.train,
                "cycle": simulation.cycle,
                "evaluate": simulation.evaluate,
                "update": simulation.update,
                "timeline": simulation.timeline,
            }
        )
    )


def too_small(
    smallest: Plan,
    budget_bytes: int,
    *,
    minimum_bytes: int,
    bound_bytes: int,
    reason: str,
    any_bound: float,
    solve_seconds: float,
    deterministic: bool,
) -> Plan:
    """The answer where nothing was found that fits the budget: infeasible where that is proven. `smallest`: the plan of
    `minimum_bytes`, the smallest budget found; `bound_bytes`: no plan of the class has a smaller one; `reason`: what
    sets the smallest, in words.
    """
    return sealed(
        smallest.model_copy(
            update={
                "status": "infeasible" if bound_bytes > budget_bytes else "unknown",
                "budget_bytes": budget_bytes,
                "bound_seconds": any_bound,
                "any_schedule_bound_seconds": any_bound,
                "solve_seconds": solve_seconds,
                "deterministic": deterministic,
                "ended_by": None if deterministic else "time limit",
                "minimum_budget_bytes": minimum_bytes,
                "minimum_bound_bytes": min(bound_bytes, minimum_bytes),
                "minimum_budget_reason": reason,
                "decisions": {},
                "resident": {},
                "peak_bytes": 0,
                "step_seconds": 0.0,
                "gap": 0.0,
                "any_schedule_gap": 0.0,
                "arena_bytes": 0,
                "workspace_bytes": 0,
                "train": None,
                "cycle": [],
                "evaluate": None,
                "update": None,
                "timeline": [],
            }
        )
    )


def until_known(search: Callable[[float], Plan], progress: SearchProgress | None = None) -> Plan:
    """What `search` finds in the usual seconds; where it has neither a plan nor a proof that there is none, in twice as
    many, and so on, which `progress` is told.
    """
    limit = TIME_LIMIT
    made = search(limit)
    while made.status == "unknown" and made.ended_by == "time limit" and limit < LONGEST_LIMIT:
        if progress is not None:
            stage = f"neither a plan nor a proof that none fits after {limit:g} s, going on"
            progress({"stage": stage, "incumbent": float("inf"), "bound": 0.0, "gap": 1.0, "seconds": limit})
        limit = min(2 * limit, LONGEST_LIMIT)
        made = search(limit)
    return made


def gap_to(step: float, bound: float) -> float:
    """The gap, (step - bound) / step: the share of the step's time that the bound leaves open."""
    return (step - bound) / step if step > 0 else 0.0


def fingerprint(plan_: Plan) -> str:
    """sha256 of a plan's content, without its own fingerprint and the seconds that it took to make."""
    content = plan_.model_dump(mode="json", exclude={"fingerprint", "solve_seconds"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(plan_: Plan) -> Plan:
    """The plan with its fingerprint."""
    return plan_.model_copy(update={"fingerprint": fingerprint(plan_)})


def rebudgeted(
    plan_: Plan, *, budget_bytes: int | None = None, bound_seconds: float | None = None, any_bound: float | None = None
) -> Plan:
    """The same schedule as a plan at a larger budget, or with other proven bounds, for its class and for any schedule.

    Bounds have to be valid at the budget; where one is not given, the plan's own is assumed to be.
    """
    step = plan_.step_seconds
    any_schedule = min(step, plan_.any_schedule_bound_seconds if any_bound is None else any_bound)
    bound = min(step, max(any_schedule, plan_.bound_seconds if bound_seconds is None else bound_seconds))
    if rerun_layers(plan_):
        # A plan with segments is outside the class: only the bound for any schedule applies to it.
        bound = any_schedule
    solved = plan_.policy == "solver" and plan_.fits
    status = status_of(plan_, bound) if solved else plan_.status
    ended = plan_.ended_by
    if solved and ended is not None and (status == "optimal") != (ended == "proof"):
        ended = "proof" if status == "optimal" else "stalled"
    return sealed(
        plan_.model_copy(
            update={
                "status": status,
                "ended_by": ended,
                "budget_bytes": plan_.budget_bytes if budget_bytes is None else budget_bytes,
                "bound_seconds": bound,
                "gap": gap_to(step, bound),
                "any_schedule_bound_seconds": any_schedule,
                "any_schedule_gap": gap_to(step, any_schedule),
            }
        )
    )
