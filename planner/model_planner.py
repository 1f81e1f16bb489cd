"""`ModelPlanner`, which plans a model's training step at any number of budgets: search, schedule, placement,
simulation.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property

from tightfit.planner.cutoff import Clock, Cutoff
from tightfit.planner.formulation.any_schedule_bound import AnyScheduleBound
from tightfit.planner.known_plans import remember_smallest, smallest_known
from tightfit.planner.plan_result import answered, drafted, drafted_phase, rebudgeted, sealed, too_small, until_known
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.clipping import refuse_clipping
from tightfit.planner.problem.device_forward import device_forward
from tightfit.planner.problem.gradients import without_resting_states
from tightfit.planner.problem.layer_types import LayeredStep
from tightfit.planner.problem.optimizers import refuse_other_optimizers
from tightfit.planner.schedule.lowering import DraftInstruction, instructions, tensor_decisions
from tightfit.planner.schedule.realize import CyclePart, Schedule, fewest_bytes, realize_cycle, smallest_cycle
from tightfit.planner.schema import Phase, Plan
from tightfit.planner.search_options import (
    ALL,
    NEIGHBOUR_BYTES,
    TIME_LIMIT,
    SearchOptions,
    SearchProgress,
    checked_budget,
    checked_gap,
    checked_limit,
)
from tightfit.planner.simulation.simulate import simulate
from tightfit.planner.solve.minimum_budget import lower_peak
from tightfit.planner.solve.model_search import SearchResult, Solver
from tightfit.planner.solve.policies import POLICIES, policy_parts
from tightfit.profiles.schema import MOBILLM, Profile
from tightfit.runtime.common.gc_pause import paused_collector


class ModelPlanner:
    """Plans one model's step at any number of budgets; later searches reuse what earlier ones found and proved."""

    def __init__(self, profile: Profile, options: SearchOptions = ALL, now: Clock = time.monotonic) -> None:
        """`now`: the clock by which time limits are kept."""
        self.profile, self.options, self.now = profile, options, now
        self.problem: LayeredStep = layered(profile)
        self.solver = Solver(self.problem, options)
        self._minimum: dict[str, tuple[Schedule, bool]] = {}
        """policy -> (schedule of the lowest peak found, whether the search for a lower one has ended)"""
        self._known: dict[str, Plan | None] = {}
        """policy -> the plan of the lowest peak that an earlier call, perhaps in another process, has found"""
        self._parts: dict[str, tuple[CyclePart, ...]] = {}
        self._relaxed: dict[str, tuple[AnyScheduleBound, ...]] = {}
        """policy with steps of its own (MeZO, LCSB) -> programs of the bound for any schedule of each of these steps"""
        self.interrupted = False
        """whether Ctrl-C ended the search of the latest `plan`, whose plan is then the best found until then"""

    def plan(
        self,
        budget_bytes: int,
        *,
        policy: str | None = None,
        time_limit: float | None = TIME_LIMIT,
        gap: float = 0.0,
        progress: SearchProgress | None = None,
    ) -> Plan:
        """As `tightfit.planner.plan.plan`, reusing what was found at earlier budgets."""
        if time_limit is None:
            return until_known(
                lambda limit: self.plan(budget_bytes, policy=policy, time_limit=limit, gap=gap, progress=progress),
                progress,
            )
        if policy == MOBILLM:
            device_plan = self._device_planner.plan(budget_bytes, time_limit=time_limit, gap=gap, progress=progress)
            self.interrupted = self._device_planner.interrupted
            return self._as_own_plan(device_plan)
        budget_bytes, time_limit, gap = checked_budget(budget_bytes), checked_limit(time_limit), checked_gap(gap)
        cutoff = Cutoff(time_limit, self.now)
        name = policy or "solver"
        any_bound = self._any_bound(budget_bytes, name, cutoff)
        outcome = SearchResult(schedule=None, bound_seconds=any_bound, any_bound_seconds=any_bound)
        below_start = budget_bytes < self.profile.device.floor.start_peak_bytes
        if not below_start and name != "solver":
            outcome = self._search_rule(budget_bytes, name, any_bound, cutoff)
        elif not below_start:
            outcome = self.solver.solve(budget_bytes, cutoff, progress, bound=any_bound, gap=gap)
        self.interrupted = outcome.interrupted
        if outcome.schedule is None:
            lowest, ended = self._lowest_schedule(name, cutoff)
            if lowest.peak_bytes > budget_bytes:
                smallest = self._lowest_plan(name, lowest)
                if smallest.peak_bytes <= budget_bytes:
                    return rebudgeted(smallest, budget_bytes=budget_bytes, bound_seconds=any_bound, any_bound=any_bound)
                ended = ended and outcome.deterministic
                return self._infeasible(budget_bytes, smallest, any_bound, cutoff, ended=ended)
            outcome = replace(outcome, schedule=lowest, deterministic=ended and outcome.deterministic)
        return self._finish(budget_bytes, name, outcome, cutoff, asked=gap)

    def class_bound(self, solved: Plan) -> float:
        """The best lower bound, in seconds, on every plan of the class that was proven for the budget of `solved`, a
        plan of the solver.

        The plan's own bound may be weaker: with segments, which are outside the class, it is the one for any schedule.
        """
        return max(solved.bound_seconds, self.solver.proven.get(solved.budget_bytes, 0.0))

    @cached_property
    def _device_planner(self) -> ModelPlanner:
        """The planner of the step of the policy `MOBILLM`, for which the solver decides as for any step."""
        refuse_clipping(self.profile, MOBILLM)
        refuse_other_optimizers(self.profile.optimizer, MOBILLM, "trains a side network on a server, with AdamW")
        return ModelPlanner(device_forward(self.profile), self.options, self.now)

    def _as_own_plan(self, plan: Plan) -> Plan:
        """A plan of `_device_planner` as one of this profile."""
        return sealed(plan.model_copy(update={"policy": MOBILLM, "profile_fingerprint": self.profile.fingerprint}))

    def _search_rule(self, budget_bytes: int, policy: str, bound: float, cutoff: Cutoff) -> SearchResult:
        schedule, ended = None, True
        try:
            schedule = self._realize_rule(policy, budget_bytes, cutoff)
        except TimeoutError:
            ended = False
        return SearchResult(schedule=schedule, bound_seconds=bound, any_bound_seconds=bound, deterministic=ended)

    def _realize_rule(self, policy: str, budget_bytes: int, cutoff: Cutoff) -> Schedule | None:
        parts = self._cycle_of(policy)
        taken = max(part.problem.taken_bytes for part in parts)
        room = self.solver.room(budget_bytes) + self.problem.taken_bytes - taken
        return realize_cycle(parts, room, cutoff)[0]

    def _cycle_of(self, policy: str) -> tuple[CyclePart, ...]:
        if policy not in self._parts:
            self._parts[policy] = policy_parts(self.problem, policy)
        return self._parts[policy]

    @cached_property
    def _any_schedule(self) -> AnyScheduleBound:
        return AnyScheduleBound(self.problem)

    def _any_bound(self, budget_bytes: int, policy: str, cutoff: Cutoff) -> float:
        """A lower bound in seconds on any schedule of the step within the budget; for a policy with steps of its own
        (MeZO, LCSB), on their mean.
        """
        if policy == "solver" or policy in POLICIES:
            return self._any_schedule.step_seconds(budget_bytes, cutoff)
        parts = self._cycle_of(policy)
        if policy not in self._relaxed:
            self._relaxed[policy] = tuple(
                AnyScheduleBound(
                    layered(without_resting_states(part.problem.profile)), workspace_bytes=part.problem.workspace_bytes
                )
                for part in parts
            )
        bounds = [step.step_seconds(budget_bytes, cutoff) for step in self._relaxed[policy]]
        seconds = sum(bounds) / len(parts)
        return 2 * seconds if parts[0].perturbed else seconds

    # --- beside the budget -----------------------------------------------------------------------------------------

    def bound(self, budget_bytes: int, *, time_limit: float = TIME_LIMIT) -> float | None:
        """A lower bound on the seconds per step of every plan of the class within `budget_bytes`; None: the MILP has no
        solution there.

        `time_limit` is in seconds. Raises TimeoutError where it is over before there is a bound.
        """
        return self.solver.bound(budget_bytes, Cutoff(checked_limit(time_limit), self.now))

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> Plan:
        """The plan at the smallest budget found, with its bounds."""
        if policy == MOBILLM:
            return self._as_own_plan(self._device_planner.smallest_plan(time_limit=time_limit))
        cutoff = Cutoff(checked_limit(time_limit), self.now)
        lowest, ended = self._lowest_schedule(policy or "solver", cutoff)
        smallest = self._lowest_plan(policy or "solver", lowest)
        any_bound = self._any_bound(smallest.peak_bytes, smallest.policy, cutoff)
        plan = rebudgeted(smallest, bound_seconds=any_bound, any_bound=any_bound)
        figures = {"deterministic": ended, "solve_seconds": cutoff.elapsed}
        return sealed(plan.model_copy(update=figures))

    def _lowest_plan(self, policy: str, lowest: Schedule) -> Plan:
        """The plan of the lowest peak, without bounds: that of the schedule `lowest`, or one that an earlier call
        found.
        """
        if policy not in self._known:
            self._known[policy] = smallest_known(self.profile, policy)
        known = self._known[policy]
        if known is not None and known.peak_bytes <= lowest.peak_bytes:
            return known
        result = SearchResult(schedule=lowest, bound_seconds=0.0, any_bound_seconds=0.0)
        plan = self._known[policy] = self._finish(lowest.peak_bytes, policy, result, Cutoff(now=self.now))
        remember_smallest(self.profile, plan)
        return plan

    # --- the smallest budget ---------------------------------------------------------------------------------------

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> int:
        """The smallest budget, in bytes, for which `plan` finds a plan."""
        if policy == MOBILLM:
            return self._device_planner.minimum_bytes(time_limit=time_limit)
        return self._lowest_plan(policy or "solver", self.minimum(policy=policy, time_limit=time_limit)).peak_bytes

    @staticmethod
    def policies() -> tuple[str, ...]:
        """The fixed rules that follow the exact gradient."""
        return tuple(POLICIES)

    @staticmethod
    def neighbour_bytes(budget_bytes: int) -> int:
        """Distance in bytes to the neighbouring budgets that are used to value memory:
        `NEIGHBOUR_BYTES` at any budget.
        """
        return NEIGHBOUR_BYTES

    def minimum(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> Schedule:
        """The schedule with the lowest peak that `plan` can find. Unless time ran out, it finds
        none for one byte less.
        """
        if policy == MOBILLM:
            return self._device_planner.minimum(time_limit=time_limit)
        cutoff = Cutoff(checked_limit(time_limit), self.now)
        name = policy or "solver"
        lowest, ended = self._lowest_schedule(name, cutoff)
        # The plan at the smallest budget, made for its speed, may hold a few instructions less: then one is found below
        # that budget.
        while name == "solver" and ended and not cutoff.over:
            made = self.plan(lowest.peak_bytes, time_limit=cutoff.left())
            if self.interrupted:
                raise KeyboardInterrupt
            if made.peak_bytes >= lowest.peak_bytes:
                break
            lowest, ended = self._lowest_schedule(name, cutoff)
        return lowest

    def _lowest_schedule(self, policy: str, cutoff: Cutoff) -> tuple[Schedule, bool]:
        if policy == "solver":
            return self.solver.lowest_schedule(cutoff)
        if policy not in self._minimum:
            # Nothing cuts this, so that a fixed rule always has a plan where it fits.
            quick = replace(self.options, packing=False)
            self._minimum[policy] = smallest_cycle(self._cycle_of(policy), options=quick), False
        lowest, ended = self._minimum[policy]
        if not ended:
            try:
                packed = smallest_cycle(self._cycle_of(policy), cutoff)
                lowest, ended = lower_peak(
                    min(lowest, packed, key=lambda schedule: schedule.peak_bytes),
                    lambda known, step: self._realize_rule(policy, known.peak_bytes - step, cutoff),
                    self.profile.device.floor.start_peak_bytes,
                )
            except TimeoutError:
                return lowest, False
            self._minimum[policy] = lowest, ended
        return lowest, ended

    def _fewest_bytes(self, policy: str) -> int:
        """No plan of the policy holds fewer, as far as that is proven by now."""
        if policy == "solver":
            return self.solver.fewest_bytes
        parts = self._cycle_of(policy)
        taken = max(part.problem.taken_bytes for part in parts)
        return max(self.profile.device.floor.start_peak_bytes, taken + fewest_bytes(parts))

    def _infeasible(self, budget: int, lowest_plan: Plan, any_bound: float, cutoff: Cutoff, *, ended: bool) -> Plan:
        """The answer where nothing was found that fits; `lowest_plan` is the plan of the lowest peak that is known."""
        floor = lowest_plan.device.floor
        simulation = simulate(lowest_plan)
        smallest_bytes = simulation.peak_bytes
        phases = (simulation.train, *simulation.cycle, simulation.evaluate, simulation.update)
        worst = max((phase for phase in phases if phase is not None), key=lambda phase: phase.peak_bytes)
        largest = ", ".join(list(worst.peak.tensors)[:3])
        if budget < floor.start_peak_bytes:
            reason = (
                f"importing Python and PyTorch alone reaches {floor.start_peak_bytes} bytes; the smallest plan needs"
                f" {smallest_bytes}"
            )
            if "+cu" in (lowest_plan.device.torch_version or "") and not floor.cuda_stubs:
                reason += (
                    f"; torch {lowest_plan.device.torch_version} is built for CUDA, the build without takes a fraction"
                    " of that: pip install torch --index-url https://download.pytorch.org/whl/cpu"
                )
        else:
            reason = (
                f"the smallest plan peaks at {worst.peak.text} with {largest} resident: {floor.held_bytes} bytes of"
                f" Python and PyTorch, {simulation.arena_bytes} of tensors, {simulation.workspace_bytes} of workspace"
                f" and {smallest_bytes - floor.held_bytes - simulation.arena_bytes - simulation.workspace_bytes}"
                " of schedule; a shorter sequence, a smaller batch or smaller head chunks lower it"
            )
        return too_small(
            lowest_plan,
            budget,
            minimum_bytes=smallest_bytes,
            bound_bytes=self._fewest_bytes(lowest_plan.policy),
            reason=reason,
            any_bound=any_bound,
            solve_seconds=cutoff.elapsed,
            deterministic=ended,
        )

    # --- the answer ------------------------------------------------------------------------------------------------

    @paused_collector()
    def _finish(self, budget: int, policy: str, outcome: SearchResult, cutoff: Cutoff, *, asked: float = 0.0) -> Plan:
        assert outcome.schedule is not None
        raw = self._assemble(budget, policy, outcome.schedule)
        simulation = simulate(raw)
        return answered(
            raw,
            simulation,
            bound_seconds=outcome.proven_seconds,
            any_bound=outcome.any_bound_seconds,
            solve_seconds=cutoff.elapsed,
            deterministic=outcome.deterministic,
            asked=asked,
            interrupted=outcome.interrupted,
        )

    def _assemble(self, budget: int, policy: str, schedule: Schedule) -> Plan:
        """The plan with its schedules, before the simulator's figures are entered."""
        profile, arena = self.profile, schedule.arena
        steps = (schedule, *schedule.following)
        # The steps of a cycle run different parts of the profile, so the plan names the whole of it.
        step_profile = profile if schedule.following else schedule.problem.profile
        train = [
            _phase(step, step.train, step.arena.train).model_copy(update={"skipped": list(step.skipped)})
            for step in steps
        ]
        decisions: dict[str, str] = {}
        for step in reversed(steps):
            decisions |= tensor_decisions(step.problem, step.draft, step.columns)
        resident = {name: arena.resident.get(name, 0) for name in schedule.draft.resident}
        return drafted(
            profile,
            step_profile,
            policy=policy,
            budget_bytes=budget,
            decisions=dict(sorted(decisions.items())),
            resident=resident,
            arena_bytes=arena.bytes,
            train=train,
            evaluate=_phase(schedule, schedule.draft.evaluate, arena.evaluate),
            update=_phase(schedule, schedule.draft.update, arena.update) if schedule.draft.update else None,
        )


def _phase(schedule: Schedule, entries: tuple[DraftInstruction, ...], offsets: dict[tuple[int, str], int]) -> Phase:
    return drafted_phase(instructions(schedule.problem, entries, schedule.arena.resident, offsets))
