"""Plan a profile at a budget: solve, carry out, place, simulate; the answer is a `Plan` whatever happens.

`Planner` holds what budgets share (layers, blocks, columns), so that a curve costs little more than a point. Every plan
is replayed by `simulate` before it is returned; its figures are the simulator's.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from planner.arena import Arena, place
from planner.bounds import any_schedule_bound
from planner.emit import Draft, Entry, draft, instructions, kinds, live_profile
from planner.greedy import greedy
from planner.layers import Layered, layered
from planner.master import JOINT_BINARIES, Answer, Progress, Search, charged_bytes
from planner.overlap import clock, overlap
from planner.policies import POLICIES, policy_columns, rule_columns, smallest
from planner.pricing import Pool
from planner.schema import Peak, Phase, Plan
from planner.simulate import Simulation, simulate
from planner.windows import Column
from profiles.errors import InputError
from profiles.schema import Profile

if TYPE_CHECKING:
    from planner.graphs.planner import GraphPlanner

TOLERANCE = 1e-3
"""a plan this near its bound is called optimal"""
MINIMUM_ROUNDS = 20
MOST_BYTES = 1 << 50
"""no process holds more; HiGHS gives up on right-hand sides that doubles cannot count exactly"""
GOOD = 3e-3
"""a plan of whole columns this near its bound is not worth another choice"""
RESERVE = 0.01
"""share of the limit left to gaps of the arena and to transfers, at first"""
CHOICES = 5
"""such shares tried"""
PLACE_ROUNDS = 3
"""limits that moved transfers are held to, one after the other, until everything finds its place in the arena"""
Status = Literal["optimal", "feasible", "fallback", "infeasible"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Columns carried out, with every tensor in its place."""

    columns: tuple[Column, ...]
    draft: Draft
    train: tuple[Entry, ...]
    arena: Arena
    seconds: float
    stalls: float
    """seconds of them spent waiting for the disk"""
    peak_bytes: int
    """of the whole process"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    schedule: Schedule | None
    bound_seconds: float
    status: Status


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
        self.inputs = {(step.layer, step.operator): step.inputs for step in self.problem.graph.steps}
        self._pool: Pool | None = None
        self._minimum: dict[str, Schedule] = {}

    @property
    def pool(self) -> Pool:
        """Columns found so far, opened with those of the fixed rules."""
        if self._pool is None:
            self._pool = Pool(problem=self.problem)
            for rule in (*POLICIES.values(), smallest):
                for kind, column in zip(self.problem.layer_type, rule_columns(self.problem, rule)):
                    self._pool.add(kind, column.decision)
        return self._pool

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
        name = policy or "solver"
        any_bound = any_schedule_bound(self.problem, budget_bytes)
        if budget_bytes < self.profile.device.floor.import_peak_bytes:
            outcome = Outcome(schedule=None, bound_seconds=any_bound, status="infeasible")
        elif name == "solver":
            outcome = self._solve(budget_bytes, started + time_limit, progress)
        else:
            outcome = self._follow(budget_bytes, name, any_bound)
        if outcome.schedule is None:
            least = self.minimum(policy=policy, time_limit=time_limit)
            if least.peak_bytes > budget_bytes:
                return self._infeasible(budget_bytes, name, least, any_bound, time.monotonic() - started)
            outcome = Outcome(schedule=least, bound_seconds=outcome.bound_seconds, status="feasible")
        return self._finish(budget_bytes, name, outcome, any_bound, started)

    # --- the search ------------------------------------------------------------------------------------------------

    def _room(self, budget_bytes: int) -> int:
        """Bytes for the arena and the instructions."""
        return min(budget_bytes, MOST_BYTES) - self.profile.device.floor.resident_bytes - self.problem.workspace_bytes

    def _solve(self, budget_bytes: int, deadline: float, progress: Progress | None) -> Outcome:
        """Search at the budget; schedule None where nothing was found to fit."""
        limit = self._room(budget_bytes)
        best: Schedule | None = None
        bound = 0.0
        timely = True
        carried_out: list[Schedule] = []
        self.carried_out = carried_out
        try:
            if self.pool.binaries <= JOINT_BINARIES:
                best, bound, timely = self._solve_jointly(limit, deadline, progress)
            else:
                relaxed = Search(pool=self.pool, limit_bytes=limit, deadline=deadline, progress=progress)
                lower, _, kept = relaxed.columns()
                bound = relaxed.bound(lower)
                if kept:
                    careful = Search(
                        pool=self.pool, limit_bytes=limit, deadline=deadline, careful=True, progress=progress
                    )
                    # Where memory is too tight to look ahead, the relaxed choice is what there is.
                    best = self._round(careful if careful.columns()[2] else relaxed, limit, bound)
        except TimeoutError:
            timely = False
        except KeyboardInterrupt:
            if not carried_out:
                raise
            return Outcome(schedule=carried_out[-1], bound_seconds=bound, status="feasible")
        if best is None and not timely:
            best = self._greedy(limit)
            return Outcome(schedule=best, bound_seconds=bound, status="fallback")
        optimal = best is not None and best.seconds - bound <= TOLERANCE * best.seconds
        return Outcome(schedule=best, bound_seconds=bound, status="optimal" if optimal else "feasible")

    def _solve_jointly(
        self, limit: int, deadline: float, progress: Progress | None
    ) -> tuple[Schedule | None, float, bool]:
        best: Schedule | None = None
        bound = 0.0
        timely = True
        allowed = limit
        for careful in (False, True):
            for _ in range(4):
                search = Search(
                    pool=self.pool, limit_bytes=allowed, deadline=deadline, careful=careful, progress=progress
                )
                answer: Answer | None = search.joint()
                if answer is None:
                    break
                if allowed == limit and not careful:
                    bound = answer.bound_seconds
                timely = timely and answer.proven
                schedule, excess = self.carry_out(answer.columns, limit)
                if schedule is not None:
                    best = schedule if best is None else self._better(best, schedule)
                    self.carried_out.append(best)
                    search.report("carried out", best.seconds, bound)
                    break
                allowed -= excess
            if best is not None and self._near(best, bound):
                break
            allowed = limit
        return best, bound, timely

    def _round(self, search: Search, limit: int, bound: float) -> Schedule | None:
        """Choose whole columns and carry them out, leaving more of the limit free until they find their places.

        Once they do, one more choice leaves more free where the plan waits for the disk, and less where it does not.
        """
        best: Schedule | None = None
        most = reserve = int(RESERVE * max(0, limit))
        for _ in range(CHOICES):
            if search.left() <= 0:
                break
            chosen = search.choose(limit - reserve)
            schedule, excess = (None, 0) if chosen is None else self.carry_out(chosen, limit, search.deadline)
            if chosen is None:
                if best is not None or not reserve:
                    break
                reserve = 0
            elif schedule is None:
                reserve += max(3 * excess // 2, int(RESERVE / 2 * max(0, limit)))
                if best is not None and reserve >= most:
                    break
            else:
                self.carried_out.append(schedule)
                search.report("carried out", schedule.seconds, bound)
                if best is not None or schedule.seconds - bound <= GOOD * schedule.seconds:
                    best = schedule if best is None else self._better(best, schedule)
                    break
                best, most = schedule, reserve
                waits = schedule.stalls > (schedule.seconds - bound) / 2
                reserve = 3 * reserve if waits else reserve // 4
        return best

    @staticmethod
    def _near(schedule: Schedule, bound: float) -> bool:
        return schedule.seconds - bound <= TOLERANCE * schedule.seconds

    @staticmethod
    def _better(old: Schedule, new: Schedule) -> Schedule:
        return new if new.seconds < old.seconds * (1 - 1e-9) else old

    def _greedy(self, limit: int) -> Schedule | None:
        allowed = limit
        for _ in range(6):
            columns = greedy(self.problem, self.pool, allowed)
            if columns is None:
                return None
            schedule, excess = self.carry_out(columns, limit)
            if schedule is not None:
                return schedule
            allowed -= excess
        return None

    def _follow(self, budget_bytes: int, policy: str, bound: float) -> Outcome:
        schedule, _ = self.carry_out(policy_columns(self.problem, policy), self._room(budget_bytes))
        return Outcome(schedule=schedule, bound_seconds=bound, status="feasible")

    def carry_out(
        self, columns: tuple[Column, ...], limit: int | None, deadline: float = float("inf")
    ) -> tuple[Schedule | None, int]:
        """Schedule of the columns within `limit` bytes of arena and instructions, or the bytes by which it fails.

        Without a limit: the lowest arena found. Past the deadline transfers stay where they are needed.
        """
        joined = draft(self.problem, columns)
        count = len(joined.train) + len(joined.evaluate)
        charged = self.profile.device.floor.instruction_bytes * count
        evaluate_live = max(live_profile(joined.evaluate, joined.resident, joined.sizes), default=0)
        live = max([evaluate_live, *live_profile(joined.train, joined.resident, joined.sizes)])
        room = live if limit is None else limit - charged
        if live > room:
            return None, live - room
        excess = 0
        floor = self.profile.device.floor
        lowest: Schedule | None = None
        allowed = room
        for attempt in range(PLACE_ROUNDS):
            train = overlap(joined.train, self.inputs, joined.resident, joined.sizes, allowed)
            arena = place(train, joined.evaluate, joined.resident, joined.sizes, room)
            before, excess = excess, arena.bytes - room
            if excess > 0 and limit is not None:
                # The arena has gaps: what is moved must leave room for them, if it is what makes them.
                allowed -= excess
                few = room // 200
                if time.monotonic() > deadline or excess < few or (attempt and excess > before / 2):
                    break
                continue
            if lowest is None or arena.bytes < lowest.arena.bytes:
                timing = clock(train, self.inputs)
                peak = floor.resident_bytes + charged + arena.bytes + self.problem.workspace_bytes
                lowest = Schedule(
                    columns=columns,
                    draft=joined,
                    train=train,
                    arena=arena,
                    seconds=timing.seconds,
                    stalls=timing.stalls,
                    peak_bytes=max(peak, floor.import_peak_bytes),
                )
            if excess <= 0:
                break
        return lowest, excess

    # --- beside the budget -----------------------------------------------------------------------------------------

    def bound(self, budget_bytes: int, *, time_limit: float = 30.0) -> float | None:
        """Seconds per step that no plan of the class undercuts at a budget; None where the model finds none that fits.

        Raises TimeoutError where the time limit strikes first.
        """
        limit, deadline = self._room(budget_bytes), time.monotonic() + time_limit
        search = Search(pool=self.pool, limit_bytes=limit, deadline=deadline)
        if self.pool.binaries <= JOINT_BINARIES:
            answer = search.joint()
            return None if answer is None else answer.bound_seconds
        lower, _, kept = search.columns()
        return search.bound(lower) if kept else None

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = 30.0) -> Plan:
        """The plan of the smallest budget, in full."""
        started = time.monotonic()
        least = self.minimum(policy=policy, time_limit=time_limit)
        any_bound = any_schedule_bound(self.problem, least.peak_bytes)
        outcome = Outcome(schedule=least, bound_seconds=any_bound, status="feasible")
        return self._finish(least.peak_bytes, policy or "solver", outcome, any_bound, started)

    # --- the smallest budget ---------------------------------------------------------------------------------------

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = 30.0) -> int:
        """The smallest budget in bytes for which `plan` has a plan."""
        return self.minimum(policy=policy, time_limit=time_limit).peak_bytes

    @staticmethod
    def policies() -> tuple[str, ...]:
        """The fixed rules that mean something for this profile."""
        return tuple(POLICIES)

    def minimum(self, *, policy: str | None = None, time_limit: float = 30.0) -> Schedule:
        """The schedule with the lowest peak that `plan` can find; one byte less has no plan."""
        name = policy or "solver"
        if name not in self._minimum:
            self._minimum[name] = self._find_minimum(name, time.monotonic() + time_limit)
        return self._minimum[name]

    def _find_minimum(self, policy: str, deadline: float) -> Schedule:
        if policy != "solver":
            schedule, _ = self.carry_out(policy_columns(self.problem, policy), None)
            assert schedule is not None
            return schedule
        candidates = [rule_columns(self.problem, smallest)]
        try:
            search = Search(pool=self.pool, limit_bytes=None, deadline=deadline)
            if self.pool.binaries <= JOINT_BINARIES:
                answer = search.joint()
                candidates.extend([answer.columns] if answer is not None else [])
            else:
                search.columns()
                chosen = search.choose(None)
                candidates.extend([chosen] if chosen is not None else [])
        except TimeoutError:
            pass
        candidates.sort(key=lambda columns: charged_bytes(self.problem, columns))
        schedules = [self.carry_out(columns, None)[0] for columns in candidates[:2]]
        best = min((s for s in schedules if s is not None), key=lambda s: s.peak_bytes)
        for _ in range(MINIMUM_ROUNDS):
            if best.peak_bytes <= self.profile.device.floor.import_peak_bytes:
                break
            # What `plan` would answer one byte below: as long as it finds something, that is the minimum.
            lower = self._solve(best.peak_bytes - 1, deadline, None)
            if lower.schedule is None or lower.status == "fallback":
                break
            best = lower.schedule
        return best

    def _infeasible(self, budget: int, policy: str, least: Schedule, any_bound: float, seconds: float) -> Plan:
        floor = self.profile.device.floor
        told = self._assemble(least.peak_bytes, policy, least, "feasible")
        simulation = simulate(told)
        phases = (simulation.train, simulation.evaluate or simulation.train)
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
                "solve_seconds": seconds,
                "minimum_budget_bytes": least.peak_bytes,
                "minimum_budget_reason": reason,
                "decisions": {},
                "resident": {},
                "arena_bytes": 0,
                "workspace_bytes": 0,
                "train": None,
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
        step = simulation.train.seconds
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
                    "workspace_bytes": simulation.workspace_bytes,
                    "train": simulation.train,
                    "evaluate": simulation.evaluate,
                    "timeline": simulation.timeline,
                }
            )
        )

    def _assemble(self, budget: int, policy: str, schedule: Schedule, status: Status) -> Plan:
        """The plan with its schedules, before the simulator has put its figures in."""
        profile, problem = self.profile, self.problem
        arena = schedule.arena
        nothing = Peak(instruction=0, text="", tensors={})
        phases = [
            Phase(
                instructions=instructions(problem, entries, arena.resident, offsets),
                seconds=0.0,
                peak_bytes=0,
                peak=nothing,
            )
            for entries, offsets in ((schedule.train, arena.train), (schedule.draft.evaluate, arena.evaluate))
        ]
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
            optimizer=profile.optimizer,
            device=profile.device,
            tensors=profile.tensors,
            programs=profile.programs,
            layers=profile.layers,
            loss=profile.loss,
            token_losses=profile.token_losses,
            decisions=kinds(problem, schedule.draft, schedule.columns),
            resident=resident,
            arena_bytes=arena.bytes,
            workspace_bytes=0,
            train=phases[0],
            evaluate=phases[1],
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
