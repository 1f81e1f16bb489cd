"""Plan a profile at a budget: solve, carry out, place, simulate; the answer is a `Plan` whatever happens.

`Planner` holds what budgets share (layers, blocks, columns), so that a curve costs little more than a point. Every plan
is replayed by `simulate` before it is returned; its figures are the simulator's.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.bounds import any_schedule_bound
from planner.carry_out import Part, Schedule, carry_out_cycle, smallest_cycle
from planner.emit import Entry, instructions, kinds
from planner.gradients import without_resting_states
from planner.layers import Layered
from planner.master import Progress
from planner.policies import POLICIES, policy_parts
from planner.schema import Peak, Phase, Plan
from planner.simulate import Simulation, simulate
from planner.solver import Outcome, Solver, Status
from planner.split import layered
from profiles.errors import InputError
from profiles.schema import Profile

if TYPE_CHECKING:
    from planner.graphs.planner import GraphPlanner

ANY_SHARE = 0.1
"""of the time limit, for the bound that holds for any schedule"""
LEAST_SHARE = 0.7
"""of the time limit, for the smallest budget where the one asked for may be below it: what fits comes before what is fast"""
FINISH_SECONDS = 1.5e-4
"""to write a plan down and replay it, per operator of the step: left out of what the search may take"""


def plan(
    profile: Profile,
    budget_bytes: int,
    *,
    policy: str | None = None,
    time_limit: float = 30.0,
    progress: Progress | None = None,
) -> Plan:
    """The fastest step found whose peak stays within `budget_bytes` (whole process), with its proof.

    `policy` names a fixed rule instead of the solver. A budget that cannot hold gives a plan with status infeasible, the
    smallest budget that can and what sets it. `progress` is called with stage, incumbent, bound, gap and seconds.
    Raises InputError for a profile or policy that cannot be used.
    """
    return planner_of(profile).plan(budget_bytes, policy=policy, time_limit=time_limit, progress=progress)


def minimum_budget(profile: Profile, *, policy: str | None = None, time_limit: float = 30.0) -> int:
    """The smallest budget in bytes for which `plan` has a plan."""
    return planner_of(profile).minimum_bytes(policy=policy, time_limit=time_limit)


def planner_of(profile: Profile) -> Planner | GraphPlanner:
    """The planner for this kind of profile; its `plan` may be called for any number of budgets."""
    if profile.model.kind == "graph":
        from planner.graphs.planner import GraphPlanner

        return GraphPlanner(profile)
    return Planner(profile)


class Planner:
    """One profile, any number of budgets."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.problem: Layered = layered(profile)
        self.solver = Solver(self.problem)
        self._minimum: dict[str, Schedule] = {}
        self._parts: dict[str, tuple[Part, ...]] = {}
        self._relaxed: dict[str, tuple[Layered, ...]] = {}
        """of policies with steps of their own: what no schedule of these steps can do without"""

    def plan(
        self,
        budget_bytes: int,
        *,
        policy: str | None = None,
        time_limit: float = 30.0,
        progress: Progress | None = None,
    ) -> Plan:
        """`plan` of this module, reusing what earlier budgets found."""
        if budget_bytes <= 0:
            raise InputError(f"a budget of {budget_bytes} bytes is no budget; name a positive size such as 600MiB")
        if time_limit <= 0:
            raise InputError(f"a time limit of {time_limit} s is none; name a positive number of seconds")
        started = time.monotonic()
        deadline = started + time_limit - FINISH_SECONDS * len(self.problem.graph.steps)
        name = policy or "solver"
        any_bound = self._any_bound(budget_bytes, name, ANY_SHARE * time_limit)
        outcome = Outcome(schedule=None, bound_seconds=any_bound, status="infeasible")
        below = budget_bytes < self.profile.device.floor.import_peak_bytes
        if not below and name != "solver":
            outcome = self._follow(budget_bytes, name, any_bound)
        elif not below and (not self.solver.tight(budget_bytes) or self._holds(budget_bytes, deadline)):
            outcome = self.solver.solve(budget_bytes, deadline, progress, bound=any_bound)
        if outcome.schedule is None:
            least, timely = self._least(name, deadline)
            if least.peak_bytes > budget_bytes:
                return self._infeasible(budget_bytes, name, least, any_bound, started, timely=timely)
            timely = timely and outcome.deterministic
            outcome = Outcome(
                schedule=least, bound_seconds=outcome.bound_seconds, status="feasible", deterministic=timely
            )
        return self._finish(budget_bytes, name, outcome, any_bound, started)

    def _holds(self, budget_bytes: int, deadline: float) -> bool:
        """Whether the budget is at least the minimum, as far as most of the time tells."""
        now = time.monotonic()
        least, timely = self.solver.least(now + LEAST_SHARE * (deadline - now))
        return not timely or least.peak_bytes <= budget_bytes

    def _follow(self, budget_bytes: int, policy: str, bound: float) -> Outcome:
        parts = self._policy(policy)
        workspace = max(part.problem.workspace_bytes for part in parts)
        schedule, _ = carry_out_cycle(parts, self.solver.room(budget_bytes) + self.problem.workspace_bytes - workspace)
        return Outcome(schedule=schedule, bound_seconds=bound, status="feasible")

    def _policy(self, policy: str) -> tuple[Part, ...]:
        if policy not in self._parts:
            self._parts[policy] = policy_parts(self.problem, policy)
        return self._parts[policy]

    def _any_bound(self, budget_bytes: int, policy: str, time_limit: float) -> float:
        """Seconds that no schedule of the step undercuts; of a policy with steps of its own, of those."""
        if policy == "solver" or policy in POLICIES:
            return any_schedule_bound(self.problem, budget_bytes, seconds=time_limit)
        parts = self._policy(policy)
        if policy not in self._relaxed:
            self._relaxed[policy] = tuple(
                replace(
                    layered(without_resting_states(part.problem.profile)), workspace_bytes=part.problem.workspace_bytes
                )
                for part in parts
            )
        each = time_limit / len(parts)
        bounds = [any_schedule_bound(step, budget_bytes, seconds=each) for step in self._relaxed[policy]]
        seconds = sum(bounds) / len(parts)
        return 2 * seconds if parts[0].perturbed else seconds

    # --- beside the budget -----------------------------------------------------------------------------------------

    def bound(self, budget_bytes: int, *, time_limit: float = 30.0) -> float | None:
        """Seconds per step that no plan of the class undercuts at a budget; None where the model finds none that fits.

        Raises TimeoutError where the time limit strikes first.
        """
        return self.solver.bound(budget_bytes, time.monotonic() + time_limit)

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = 30.0) -> Plan:
        """The plan of the smallest budget, in full."""
        started = time.monotonic()
        least = self.minimum(policy=policy, time_limit=time_limit)
        any_bound = self._any_bound(least.peak_bytes, policy or "solver", ANY_SHARE * time_limit)
        outcome = Outcome(schedule=least, bound_seconds=any_bound, status="feasible")
        return self._finish(least.peak_bytes, policy or "solver", outcome, any_bound, started)

    # --- the smallest budget ---------------------------------------------------------------------------------------

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = 30.0) -> int:
        """The smallest budget in bytes for which `plan` has a plan."""
        return self.minimum(policy=policy, time_limit=time_limit).peak_bytes

    @staticmethod
    def policies() -> tuple[str, ...]:
        """The fixed rules that follow the exact gradient."""
        return tuple(POLICIES)

    def minimum(self, *, policy: str | None = None, time_limit: float = 30.0) -> Schedule:
        """The schedule with the lowest peak that `plan` can find; one byte less has no plan."""
        return self._least(policy or "solver", time.monotonic() + time_limit)[0]

    def _least(self, policy: str, deadline: float) -> tuple[Schedule, bool]:
        if policy == "solver":
            return self.solver.least(deadline)
        if policy not in self._minimum:
            self._minimum[policy] = smallest_cycle(self._policy(policy))
        return self._minimum[policy], True

    def _infeasible(
        self, budget: int, policy: str, least: Schedule, any_bound: float, started: float, *, timely: bool
    ) -> Plan:
        floor = self.profile.device.floor
        told = self._assemble(least.peak_bytes, policy, least, "feasible")
        simulation = simulate(told)
        phases = (simulation.train, *simulation.cycle, simulation.evaluate or simulation.train)
        worst = max(phases, key=lambda phase: phase.peak_bytes)
        largest = ", ".join(list(worst.peak.tensors)[:3])
        if budget < floor.import_peak_bytes:
            reason = (
                f"importing Python and PyTorch alone reaches {floor.import_peak_bytes} bytes; the smallest plan needs"
                f" {least.peak_bytes}"
            )
        else:
            reason = (
                f"the smallest plan peaks at {worst.peak.text} with {largest} resident: {floor.resident_bytes} bytes of"
                f" Python and PyTorch, {simulation.arena_bytes} of tensors, {simulation.workspace_bytes} of workspace"
                f" and {least.peak_bytes - floor.resident_bytes - simulation.arena_bytes - simulation.workspace_bytes}"
                " of schedule; a shorter sequence, a smaller batch or smaller head chunks lower it"
            )
        empty = told.model_copy(
            update={
                "status": "infeasible",
                "budget_bytes": budget,
                "peak_bytes": 0,
                "step_seconds": 0.0,
                "bound_seconds": any_bound,
                "any_schedule_bound_seconds": any_bound,
                "gap": 0.0,
                "any_schedule_gap": 0.0,
                "solve_seconds": time.monotonic() - started,
                "deterministic": timely,
                "minimum_budget_bytes": least.peak_bytes,
                "minimum_budget_reason": reason,
                "decisions": {},
                "resident": {},
                "arena_bytes": 0,
                "workspace_bytes": 0,
                "train": None,
                "cycle": [],
                "evaluate": None,
                "timeline": [],
            }
        )
        return sealed(empty)

    # --- the answer ------------------------------------------------------------------------------------------------

    def _finish(self, budget: int, policy: str, outcome: Outcome, any_bound: float, started: float) -> Plan:
        assert outcome.schedule is not None
        raw = self._assemble(budget, policy, outcome.schedule, outcome.status)
        simulation: Simulation = simulate(raw)
        step = simulation.step_seconds
        bound = min(step, max(outcome.bound_seconds, any_bound))
        return sealed(
            raw.model_copy(
                update={
                    "peak_bytes": simulation.peak_bytes,
                    "step_seconds": step,
                    "bound_seconds": bound,
                    "any_schedule_bound_seconds": min(step, any_bound),
                    "gap": gap_to(step, bound),
                    "any_schedule_gap": gap_to(step, min(step, any_bound)),
                    "solve_seconds": time.monotonic() - started,
                    "deterministic": outcome.deterministic,
                    "workspace_bytes": simulation.workspace_bytes,
                    "train": simulation.train,
                    "cycle": simulation.cycle,
                    "evaluate": simulation.evaluate,
                    "timeline": simulation.timeline,
                }
            )
        )

    def _assemble(self, budget: int, policy: str, schedule: Schedule, status: Status) -> Plan:
        """The plan with its schedules, before the simulator has put its figures in."""
        profile, arena = self.profile, schedule.arena
        steps = (schedule, *schedule.following)
        train = [
            _phase(one, one.train, one.arena.train).model_copy(update={"skipped": list(one.skipped)}) for one in steps
        ]
        decisions: dict[str, str] = {}
        for one in reversed(steps):
            decisions |= kinds(one.problem, one.draft, one.columns)
        resident = {name: arena.resident.get(name, 0) for name in schedule.draft.resident}
        return Plan(
            fingerprint="",
            profile_fingerprint=profile.fingerprint,
            policy=policy,
            status=status,
            budget_bytes=budget,
            floor_bytes=profile.device.floor.resident_bytes,
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
            optimizer=schedule.problem.profile.optimizer,
            device=profile.device,
            tensors=profile.tensors,
            programs=profile.programs,
            layers=profile.layers,
            loss=profile.loss,
            token_losses=profile.token_losses,
            decisions=dict(sorted(decisions.items())),
            resident=resident,
            arena_bytes=arena.bytes,
            workspace_bytes=0,
            train=train[0],
            cycle=train[1:],
            evaluate=_phase(schedule, schedule.draft.evaluate, arena.evaluate),
        )


def _phase(schedule: Schedule, entries: tuple[Entry, ...], offsets: dict[tuple[int, str], int]) -> Phase:
    """The instructions, before the simulator has put its figures in."""
    return Phase(
        instructions=instructions(schedule.problem, entries, schedule.arena.resident, offsets),
        seconds=0.0,
        peak_bytes=0,
        peak=Peak(instruction=0, text="", tensors={}),
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
    """The same schedule told at a larger budget, or against another proven bound."""
    bound = min(plan_.step_seconds, plan_.bound_seconds if bound_seconds is None else bound_seconds)
    any_ = min(bound, plan_.any_schedule_bound_seconds if any_bound is None else any_bound)
    return sealed(
        plan_.model_copy(
            update={
                "budget_bytes": plan_.budget_bytes if budget_bytes is None else budget_bytes,
                "bound_seconds": bound,
                "gap": gap_to(plan_.step_seconds, bound),
                "any_schedule_bound_seconds": any_,
                "any_schedule_gap": gap_to(plan_.step_seconds, any_),
            }
        )
    )
