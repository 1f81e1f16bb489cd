"""What planning answers: a plan drafted from a schedule, then the simulator's figures, the proof and the fingerprint, or why nothing fits.

Nothing here imports the solver: plans are read and checked without it.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Literal

from tightfit.planner.instructions import Instruction
from tightfit.planner.schedule.multi_layer_recompute import rerun_layers
from tightfit.planner.schema import Peak, Phase, Plan
from tightfit.profiles.schema import Profile

if TYPE_CHECKING:
    from tightfit.planner.simulation.simulate import Simulation

EXACT = 1e-6
"""share of the step: a bare graph's plan this near its bound is the best; programs in whole numbers prove no less"""
ROUNDING = 2e-5
"""the same of a model's plan: what is proven of programs in floating point is off by up to `tightfit.planner.milp.highs.MARGIN` for their tolerances"""
EndedBy = Literal["proof", "gap", "stalled", "time limit", "interrupt"]


def drafted_phase(listed: list[Instruction]) -> Phase:
    """A step of these instructions."""
    return Phase(instructions=listed, seconds=0.0, peak_bytes=0, peak=Peak(instruction=0, text="", tensors={}))


def drafted(
    profile: Profile,
    ran: Profile,
    *,
    policy: str,
    budget_bytes: int,
    decisions: dict[str, str],
    resident: dict[str, int],
    train: list[Phase],
    evaluate: Phase | None = None,
    arena_bytes: int = 0,
) -> Plan:
    """A plan with the steps `train`. `ran`: what of the profile they run."""
    return Plan(
        fingerprint="",
        profile_fingerprint=profile.fingerprint,
        policy=policy,
        status="feasible",
        budget_bytes=budget_bytes,
        floor_bytes=ran.device.floor.held_bytes,
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
        optimizer=ran.optimizer,
        device=ran.device,
        tensors=profile.tensors,
        programs=ran.programs,
        layers=ran.layers,
        loss=profile.loss,
        token_losses=profile.token_losses,
        decisions=decisions,
        resident=resident,
        arena_bytes=arena_bytes,
        workspace_bytes=0,
        train=train[0],
        cycle=train[1:],
        evaluate=evaluate,
    )


def proof_tolerance(kind: str) -> float:
    """The gap, as a share of the step, up to which a plan for a model of this kind is proven the best of its class, to rounding."""
    return EXACT if kind == "graph" else ROUNDING


def status_of(plan_: Plan, bound_seconds: float, step_seconds: float | None = None) -> Literal["optimal", "feasible"]:
    """What a bound that holds for a plan says of it."""
    step = plan_.step_seconds if step_seconds is None else step_seconds
    return "optimal" if gap_to(step, bound_seconds) <= proof_tolerance(plan_.model.kind) else "feasible"


def ended_by(
    kind: str, gap: float, *, asked: float, timely: bool, stalled: bool = False, interrupted: bool = False
) -> EndedBy:
    """Why a search for a model of this `kind` went no further than `gap`.

    `asked`: the gap that was enough; `timely`: whether no time limit ended it, or any search that it depends on; `stalled`: whether it gave
    up before its limit because it had stopped gaining.
    """
    if gap <= proof_tolerance(kind):
        return "proof"
    if gap <= asked:
        return "gap"
    if interrupted:
        return "interrupt"
    return "stalled" if timely or stalled else "time limit"


def answered(
    raw: Plan,
    simulation: Simulation,
    *,
    bound_seconds: float,
    any_bound: float,
    started: float,
    deterministic: bool,
    asked: float = 0.0,
    stalled: bool = False,
    interrupted: bool = False,
    fallback: bool = False,
) -> Plan:
    """`raw` with the simulator's figures, beside what no plan of its class and no schedule at all undercuts.

    `started`: on the monotonic clock; `fallback`: whether it stands in for a plan that the search had no time to find; `asked`, `stalled` and
    `interrupted` as of `ended_by`.
    """
    step = simulation.step_seconds
    bound, any_ = min(step, bound_seconds), min(step, any_bound)
    # A rule claims no optimum, however near its bound it comes.
    searched = raw.policy == "solver"
    status = status_of(raw, bound, step) if searched else raw.status
    ended = ended_by(
        raw.model.kind,
        gap_to(step, bound),
        asked=asked,
        timely=deterministic,
        stalled=stalled,
        interrupted=interrupted,
    )
    return sealed(
        raw.model_copy(
            update={
                "status": "fallback" if fallback else status,
                "ended_by": ended if searched else None,
                "peak_bytes": simulation.peak_bytes,
                "step_seconds": step,
                "bound_seconds": bound,
                "any_schedule_bound_seconds": any_,
                "gap": gap_to(step, bound),
                "any_schedule_gap": gap_to(step, any_),
                "solve_seconds": time.monotonic() - started,
                "deterministic": deterministic,
                "workspace_bytes": simulation.workspace_bytes,
                "train": simulation.train,
                "cycle": simulation.cycle,
                "evaluate": simulation.evaluate,
                "timeline": simulation.timeline,
            }
        )
    )


def too_small(
    smallest: Plan,
    budget_bytes: int,
    *,
    minimum_bytes: int,
    reason: str,
    any_bound: float,
    started: float,
    deterministic: bool,
) -> Plan:
    """The answer where nothing fits the budget; `smallest`: what fits `minimum_bytes`, as drafted. `reason` says what sets these."""
    return sealed(
        smallest.model_copy(
            update={
                "status": "infeasible",
                "budget_bytes": budget_bytes,
                "bound_seconds": any_bound,
                "any_schedule_bound_seconds": any_bound,
                "solve_seconds": time.monotonic() - started,
                "deterministic": deterministic,
                "ended_by": None if deterministic else "time limit",
                "minimum_budget_bytes": minimum_bytes,
                "minimum_budget_reason": reason,
                "decisions": {},
                "resident": {},
                "arena_bytes": 0,
                "train": None,
                "cycle": [],
                "evaluate": None,
            }
        )
    )


def gap_to(step: float, bound: float) -> float:
    """How much of the step's time a bound leaves open."""
    return (step - bound) / step if step > 0 else 0.0


def fingerprint(plan_: Plan) -> str:
    """sha256 of everything a plan says but its own fingerprint and how long it took to make."""
    content = plan_.model_dump(mode="json", exclude={"fingerprint", "solve_seconds"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(plan_: Plan) -> Plan:
    """The plan with its fingerprint."""
    return plan_.model_copy(update={"fingerprint": fingerprint(plan_)})


def rebudgeted(
    plan_: Plan, *, budget_bytes: int | None = None, bound_seconds: float | None = None, any_bound: float | None = None
) -> Plan:
    """The same schedule told at a larger budget, or against other proven bounds: of its class, and of any schedule.

    Both have to hold at the budget; without them, the plan's own are taken to.
    """
    step = plan_.step_seconds
    any_ = min(step, plan_.any_schedule_bound_seconds if any_bound is None else any_bound)
    bound = min(step, max(any_, plan_.bound_seconds if bound_seconds is None else bound_seconds))
    if rerun_layers(plan_):
        # No bound of the class holds for a plan that goes forward twice.
        bound = any_
    solved = plan_.policy == "solver" and plan_.status in {"optimal", "feasible"}
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
                "any_schedule_bound_seconds": any_,
                "any_schedule_gap": gap_to(step, any_),
            }
        )
    )
