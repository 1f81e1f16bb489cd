"""Plans of a bare graph at any number of budgets; what `planner.plan.Planner` is for profiles of models."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from planner.graphs import exact
from planner.graphs.bound import any_schedule_bound, class_bound
from planner.graphs.chains import as_chain, checkpoints
from planner.graphs.dag import dag_of
from planner.graphs.rules import RULES, rule_reruns, rules_for
from planner.graphs.schedule import Rerun, instructions, peak_bytes, pruned, runs, seconds
from planner.graphs.search import Search
from planner.master import Progress
from planner.plan import gap_to, sealed
from planner.schema import Peak, Phase, Plan
from planner.simulate import simulate
from planner.solver import TOLERANCE, Status
from profiles.bare import FIXED
from profiles.errors import InputError
from profiles.schema import Profile

EXACT_OPERATORS = 20
"""graphs up to here are solved over all schedules of the class"""
EXACT_WORK = 30.0
"""deterministic seconds of CP-SAT; such graphs take a fraction of one"""
GRANTED = 0.1
"""of the time limit, in seconds of the processor, for a first schedule that fits"""
LEAST_GRANTED = 1.0
"""seconds of the processor for each try at a smaller budget"""
ROUNDS = 4000
"""of ruin and recreate, shared by the operators that a graph has"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    reruns: frozenset[Rerun] | None
    bound_seconds: float
    timely: bool = True


class GraphPlanner:
    """One bare graph, any number of budgets."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.dag = dag_of(profile)
        self.floor_bytes = self.dag.fixed_bytes + max(self.dag.own_bytes(i) for i in range(len(self.dag)))
        """what the largest operator needs by itself: no schedule has a lower peak"""
        self.found: dict[frozenset[Rerun], int] = {}
        """schedules found so far and their peaks: where the search at other budgets starts"""
        self._minimum: dict[str, tuple[frozenset[Rerun], bool]] = {}
        for rule in rules_for(self.dag):
            self._note(RULES[rule](self.dag))

    def policies(self) -> tuple[str, ...]:
        """The fixed rules that mean something for this graph."""
        return rules_for(self.dag)

    def plan(
        self,
        budget_bytes: int,
        *,
        policy: str | None = None,
        time_limit: float = 30.0,
        progress: Progress | None = None,
    ) -> Plan:
        """As `planner.plan.plan`; the budget is on the bytes that are live, fixed ones included."""
        if budget_bytes <= 0:
            raise InputError(f"a budget of {budget_bytes} bytes is no budget; name a positive size such as 600MiB")
        if time_limit <= 0:
            raise InputError(f"a time limit of {time_limit} s is none; name a positive number of seconds")
        started = time.monotonic()
        deadline = started + time_limit
        name = policy or "solver"
        any_bound = self._any_bound(budget_bytes, 0.1 * time_limit)
        if name == "solver":
            outcome = self._solve(budget_bytes, started, deadline, progress)
        else:
            reruns = rule_reruns(self.dag, name)
            fits = peak_bytes(self.dag, reruns) <= budget_bytes
            outcome = Outcome(reruns=reruns if fits else None, bound_seconds=any_bound)
        if outcome.reruns is None:
            least, proven = self._least(name, deadline)
            if peak_bytes(self.dag, least) > budget_bytes:
                spent = time.monotonic() - started
                return self._infeasible(
                    budget_bytes, name, least, any_bound, spent, proven=proven, timely=outcome.timely
                )
            outcome = Outcome(reruns=least, bound_seconds=outcome.bound_seconds, timely=outcome.timely)
        return self._finish(budget_bytes, name, outcome, any_bound, started)

    def bound(self, budget_bytes: int, *, time_limit: float = 30.0) -> float | None:
        """Seconds that no schedule of the class undercuts at a budget, by linear programs; None: none fits."""
        if self.floor_bytes > budget_bytes:
            return None
        deadline = time.monotonic() + time_limit
        found = class_bound(self.dag, budget_bytes, self._fastest(budget_bytes), deadline=deadline, whole=False)
        return None if found.seconds == float("inf") else found.seconds

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = 30.0) -> Plan:
        """The plan of the smallest budget, in full."""
        started = time.monotonic()
        least, _ = self._least(policy or "solver", started + time_limit)
        budget = peak_bytes(self.dag, least)
        any_bound = self._any_bound(budget, time_limit)
        outcome = Outcome(reruns=least, bound_seconds=any_bound)
        return self._finish(budget, policy or "solver", outcome, any_bound, started)

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = 30.0) -> int:
        """The smallest budget for which `plan` has a plan."""
        return peak_bytes(self.dag, self._least(policy or "solver", time.monotonic() + time_limit)[0])

    def _any_bound(self, budget: int, limit: float) -> float:
        if self.found[frozenset()] <= budget:
            return self.dag.once_seconds
        if self.floor_bytes > budget:
            return float("inf")
        return any_schedule_bound(self.dag, budget, seconds=limit)

    # --- the search ------------------------------------------------------------------------------------------------

    def _note(self, reruns: Iterable[Rerun]) -> frozenset[Rerun]:
        kept = pruned(self.dag, reruns)
        self.found[kept] = peak_bytes(self.dag, kept)
        return kept

    def _solve(self, budget: int, started: float, deadline: float, progress: Progress | None) -> Outcome:
        dag = self.dag
        if self.found[frozenset()] <= budget:
            return Outcome(reruns=frozenset(), bound_seconds=dag.once_seconds)
        if self.floor_bytes > budget:
            return Outcome(reruns=None, bound_seconds=dag.once_seconds)
        if len(dag) <= EXACT_OPERATORS:
            solved = exact.fastest(dag, budget, work=EXACT_WORK)
            if solved.proven:
                bound = dag.once_seconds if solved.reruns is None else seconds(dag, solved.reruns)
                return Outcome(reruns=solved.reruns, bound_seconds=bound)
        return self._search(budget, started, deadline, progress)

    def _search(self, budget: int, started: float, deadline: float, progress: Progress | None) -> Outcome:
        dag = self.dag

        def report(stage: str, incumbent: float, bound: float) -> None:
            if progress is not None:
                left = gap_to(incumbent, bound)
                spent = time.monotonic() - started
                progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": left, "seconds": spent})

        span = deadline - started
        search = Search(dag, budget, deadline=started + 0.5 * span, granted=GRANTED * span)
        memory = search.first(self._seeds(budget))
        if memory is None:
            return Outcome(reruns=None, bound_seconds=dag.once_seconds, timely=search.timely)
        best = self._note(memory.reruns)
        report("evicted", seconds(dag, best), dag.once_seconds)
        search.deadline = started + 0.3 * span
        best = self._note(search.improve(memory, rounds=ROUNDS // 4))
        report("improved", seconds(dag, best), dag.once_seconds)
        enough = seconds(dag, best) * (1 - TOLERANCE)
        found = class_bound(dag, budget, best, deadline=started + 0.7 * span, whole=True, enough=enough)
        report("bounded", seconds(dag, best), found.seconds)
        # The solver's schedules may hold too much between moments; what eviction makes of them is often better still.
        search.deadline = started + 0.95 * span
        enough = found.seconds / (1 - TOLERANCE) - dag.once_seconds
        another = search.first([best, *found.reruns])
        assert another is not None
        best = self._note(search.improve(another, rounds=ROUNDS, enough=enough))
        report("improved", seconds(dag, best), found.seconds)
        return Outcome(reruns=best, bound_seconds=found.seconds, timely=found.timely and search.timely)

    def _seeds(self, budget: int) -> list[frozenset[Rerun]]:
        """Schedules to start from: rules, checkpoints of a chain, and the fastest that fits among those found before."""
        seeds = [RULES[rule](self.dag) for rule in rules_for(self.dag)]
        chain = as_chain(self.dag)
        if chain is not None:
            placed = checkpoints(self.dag, chain, budget)
            seeds.extend([placed] if placed is not None else [])
        return [*seeds, self._fastest(budget)]

    def _fastest(self, budget: int) -> frozenset[Rerun]:
        """The fastest schedule found so far that fits, or no re-runs."""
        fitting = [reruns for reruns, peak in self.found.items() if peak <= budget]
        return min(fitting, key=lambda reruns: (seconds(self.dag, reruns), sorted(reruns)), default=frozenset())

    # --- the smallest budget ---------------------------------------------------------------------------------------

    def _least(self, policy: str, deadline: float) -> tuple[frozenset[Rerun], bool]:
        """The schedule with the lowest peak that `plan` can find, and whether no schedule of the class has a lower one."""
        if policy not in self._minimum:
            self._minimum[policy] = (
                self._find_least(deadline) if policy == "solver" else (rule_reruns(self.dag, policy), True)
            )
        return self._minimum[policy]

    def _find_least(self, deadline: float) -> tuple[frozenset[Rerun], bool]:
        dag = self.dag
        if len(dag) <= EXACT_OPERATORS:
            solved = exact.smallest(dag, work=EXACT_WORK)
            if solved.proven and solved.reruns is not None:
                return solved.reruns, True
        low = self.floor_bytes - 1
        best = min(self.found, key=lambda reruns: (self.found[reruns], sorted(reruns)))
        while self.found[best] - low > 1:
            # Halve what is left between what cannot be and what was found, then byte by byte.
            for budget in ((low + self.found[best]) // 2, self.found[best] - 1):
                search = Search(dag, budget, deadline=deadline, granted=LEAST_GRANTED)
                memory = search.first(self._seeds(budget))
                if memory is not None:
                    best = self._note(memory.reruns)
                    break
                low = max(low, budget)
            if time.monotonic() > deadline:
                break
        return best, self.found[best] == self.floor_bytes

    # --- the answer ------------------------------------------------------------------------------------------------

    def _infeasible(
        self,
        budget: int,
        policy: str,
        least: frozenset[Rerun],
        any_bound: float,
        spent: float,
        *,
        proven: bool,
        timely: bool,
    ) -> Plan:
        told = self._assemble(peak_bytes(self.dag, least), policy, least, "feasible")
        simulation = simulate(told)
        peak = simulation.train.peak
        largest = ", ".join(list(peak.tensors)[:3])
        found = "the smallest found" if timely else "the smallest found before the time limit"
        found = "no schedule has a lower peak" if proven else found
        reason = f"the smallest plan peaks at {peak.text} with {largest} live ({found}); a smaller batch lowers it"
        return sealed(
            told.model_copy(
                update={
                    "status": "infeasible",
                    "budget_bytes": budget,
                    "peak_bytes": 0,
                    "bound_seconds": any_bound,
                    "any_schedule_bound_seconds": any_bound,
                    "solve_seconds": spent,
                    "deterministic": timely,
                    "minimum_budget_bytes": simulation.peak_bytes,
                    "minimum_budget_reason": reason,
                    "decisions": {},
                    "train": None,
                }
            )
        )

    def _finish(self, budget: int, policy: str, outcome: Outcome, any_bound: float, started: float) -> Plan:
        assert outcome.reruns is not None
        raw = self._assemble(budget, policy, outcome.reruns, "feasible")
        simulation = simulate(raw)
        step = simulation.train.seconds
        bound = min(step, max(outcome.bound_seconds, any_bound))
        proven = policy == "solver" and step - bound <= TOLERANCE * step
        return sealed(
            raw.model_copy(
                update={
                    "status": "optimal" if proven else "feasible",
                    "peak_bytes": simulation.peak_bytes,
                    "step_seconds": step,
                    "bound_seconds": bound,
                    "any_schedule_bound_seconds": min(step, any_bound),
                    "gap": gap_to(step, bound),
                    "any_schedule_gap": gap_to(step, min(step, any_bound)),
                    "solve_seconds": time.monotonic() - started,
                    "deterministic": outcome.timely,
                    "arena_bytes": simulation.arena_bytes,
                    "workspace_bytes": simulation.workspace_bytes,
                    "train": simulation.train,
                    "timeline": simulation.timeline,
                }
            )
        )

    def _assemble(self, budget: int, policy: str, reruns: frozenset[Rerun], status: Status) -> Plan:
        """The plan with its schedule, before the simulator has put its figures in."""
        profile = self.profile
        train = Phase(
            instructions=instructions(self.dag, reruns),
            seconds=0.0,
            peak_bytes=0,
            peak=Peak(instruction=0, text="", tensors={}),
        )
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
            decisions=self._decisions(reruns),
            resident={FIXED: 0} if self.dag.fixed_bytes else {},
            arena_bytes=0,
            workspace_bytes=0,
            train=train,
            evaluate=None,
        )

    def _decisions(self, reruns: frozenset[Rerun]) -> dict[str, str]:
        """For outputs that outlive the run after their own: kept, or recomputed at least once."""
        again = {operator for _, operator in reruns}
        position = {run: at for at, run in enumerate(runs(self.dag, reruns))}
        decisions = {}
        for i, name in enumerate(self.dag.names):
            last = max((position[user, user] for user in self.dag.users[i]), default=-1)
            if i in again:
                decisions[name] = "recomputed"
            elif last > position[i, i] + 1:
                decisions[name] = "kept"
        return decisions
