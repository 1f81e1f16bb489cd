"""Plans of a bare graph at any number of budgets; what `planner.plan.Planner` is for profiles of models."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from planner.graphs import exact
from planner.graphs.actions import Action, Carried, carry, instructions, timed, touch_and_go, worth_moving
from planner.graphs.bound import any_schedule_bound, class_bound
from planner.graphs.chains import as_chain, checkpoints
from planner.graphs.dag import dag_of
from planner.graphs.exact_moves import fastest_with_moves
from planner.graphs.rules import RULES, rule_reruns, rules_for
from planner.graphs.schedule import Rerun, peak_bytes, pruned, seconds
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
EXACT_MOVES = 8
"""operators of a graph that names a disk, up to which it is solved so"""
PRICES = (None, 0.05, 0.5, 1.0)
"""of a second of the disk, in seconds of computation, that searches are made with; None: nothing is moved"""
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
    carried: Carried | None
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
        self.moved: list[Carried] = []
        """the same with moves"""
        self._minimum: dict[str, tuple[Carried, bool]] = {}
        self._any_bounds: dict[int, float] = {}
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
        any_bound = self.any_bound(budget_bytes, seconds=0.1 * time_limit)
        if name == "solver":
            outcome = self._solve(budget_bytes, started, deadline, progress)
        else:
            carried = carry(self.dag, rule_reruns(self.dag, name))
            fits = carried.peak_bytes <= budget_bytes
            outcome = Outcome(carried=carried if fits else None, bound_seconds=any_bound)
        if outcome.carried is None:
            least, proven = self._least(name, deadline)
            if least.peak_bytes > budget_bytes:
                spent = time.monotonic() - started
                return self._infeasible(
                    budget_bytes, name, least, any_bound, spent, proven=proven, timely=outcome.timely
                )
            outcome = Outcome(carried=least, bound_seconds=outcome.bound_seconds, timely=outcome.timely)
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
        budget = least.peak_bytes
        any_bound = self.any_bound(budget, seconds=time_limit)
        outcome = Outcome(carried=least, bound_seconds=any_bound)
        return self._finish(budget, policy or "solver", outcome, any_bound, started)

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = 30.0) -> int:
        """The smallest budget for which `plan` has a plan."""
        return self._least(policy or "solver", time.monotonic() + time_limit)[0].peak_bytes

    def any_bound(self, budget: int, *, seconds: float) -> float:
        """Seconds that no schedule at all undercuts at a budget, worked out once within `seconds`; infinity: none fits."""
        if self.found[frozenset()] <= budget:
            return self.dag.once_seconds
        if self.floor_bytes > budget:
            return float("inf")
        if budget not in self._any_bounds:
            self._any_bounds[budget] = any_schedule_bound(self.dag, budget, seconds=seconds)
        return self._any_bounds[budget]

    # --- the search ------------------------------------------------------------------------------------------------

    def _note(self, reruns: Iterable[Rerun]) -> frozenset[Rerun]:
        kept = pruned(self.dag, reruns)
        self.found[kept] = peak_bytes(self.dag, kept)
        return kept

    def _solve(self, budget: int, started: float, deadline: float, progress: Progress | None) -> Outcome:
        dag = self.dag
        if self.found[frozenset()] <= budget:
            return Outcome(carried=carry(dag, ()), bound_seconds=dag.once_seconds)
        if self.floor_bytes > budget:
            return Outcome(carried=None, bound_seconds=dag.once_seconds)
        if dag.read is not None:
            return self._solve_with_moves(budget, started, deadline, progress)
        if len(dag) <= EXACT_OPERATORS:
            solved = exact.fastest(dag, budget, work=EXACT_WORK)
            if solved.proven:
                carried = None if solved.reruns is None else carry(dag, solved.reruns)
                bound = dag.once_seconds if carried is None else carried.seconds
                return Outcome(carried=carried, bound_seconds=bound)
        return self._search(budget, started, deadline, progress)

    def _solve_with_moves(self, budget: int, started: float, deadline: float, progress: Progress | None) -> Outcome:
        """The graph names a disk: the exact solver for few operators, otherwise a search for each price of the disk."""
        dag = self.dag
        if len(dag) - dag.sink <= EXACT_MOVES:
            solved = fastest_with_moves(dag, budget, work=EXACT_WORK)
            if solved.proven and solved.actions is not None:
                carried = timed(dag, solved.actions)
                return Outcome(carried=carried, bound_seconds=min(carried.seconds, solved.bound))
        span = deadline - started
        found = [carried for carried in self.moved if carried.peak_bytes <= budget]
        plain: frozenset[Rerun] = frozenset()
        timely = True
        for number, price in enumerate(PRICES):
            variant = dag if price is None else dag.moving(worth_moving(dag, price), price)
            search = Search(
                variant, budget, deadline=started + 0.7 * span * (number + 1) / len(PRICES), granted=GRANTED * span / 4
            )
            memory = search.first(self._plain_seeds(budget) if price is None else [(), touch_and_go(variant)])
            if memory is None:
                timely = timely and search.timely
                continue
            reruns = search.improve(memory, rounds=ROUNDS // len(PRICES))
            timely = timely and search.timely
            if price is None:
                plain = self._note(reruns)
            carried = carry(variant, reruns, budget)
            found.append(carried)
            self._report(progress, started, "carried out", carried.seconds, dag.once_seconds)
        # All is on the disk that can be: what `floor_bytes` is worth in full always fits.
        best = min([*found, self._smallest(budget)], key=lambda carried: carried.seconds)
        self.moved.append(best)
        bound = class_bound(dag, budget, plain, deadline=started + 0.95 * span, whole=False, enough=best.seconds)
        return Outcome(carried=best, bound_seconds=bound.seconds, timely=timely and bound.timely)

    def _plain_seeds(self, budget: int) -> list[frozenset[Rerun]]:
        """Where a search that moves nothing starts: the optimum without a disk, where it is known."""
        if len(self.dag) > EXACT_OPERATORS:
            return self._seeds(budget)
        solved = exact.fastest(self.dag, budget, work=EXACT_WORK)
        return [*self._seeds(budget), *([solved.reruns] if solved.reruns is not None else [])]

    def _smallest(self, budget: int) -> Carried:
        """Everything on the disk but what runs needs: `floor_bytes`."""
        variant = self.dag.moving(range(len(self.dag)), 1.0)
        return carry(variant, touch_and_go(variant), budget)

    def _report(self, progress: Progress | None, started: float, stage: str, incumbent: float, bound: float) -> None:
        if progress is not None:
            left = gap_to(incumbent, bound)
            spent = time.monotonic() - started
            progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": left, "seconds": spent})

    def _search(self, budget: int, started: float, deadline: float, progress: Progress | None) -> Outcome:
        dag = self.dag

        def report(stage: str, incumbent: float, bound: float) -> None:
            self._report(progress, started, stage, incumbent, bound)

        span = deadline - started
        search = Search(dag, budget, deadline=started + 0.5 * span, granted=GRANTED * span)
        memory = search.first(self._seeds(budget))
        if memory is None:
            return Outcome(carried=None, bound_seconds=dag.once_seconds, timely=search.timely)
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
        return Outcome(carried=carry(dag, best), bound_seconds=found.seconds, timely=found.timely and search.timely)

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

    def _least(self, policy: str, deadline: float) -> tuple[Carried, bool]:
        """The schedule with the lowest peak that `plan` can find, and whether no schedule of the class has a lower one."""
        if policy not in self._minimum:
            if policy != "solver":
                self._minimum[policy] = carry(self.dag, rule_reruns(self.dag, policy)), True
            elif self.dag.read is not None:
                self._minimum[policy] = self._smallest(self.floor_bytes), True
            else:
                least, proven = self._find_least(deadline)
                self._minimum[policy] = carry(self.dag, least), proven
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
        least: Carried,
        any_bound: float,
        spent: float,
        *,
        proven: bool,
        timely: bool,
    ) -> Plan:
        told = self._assemble(least.peak_bytes, policy, least, "feasible")
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
        assert outcome.carried is not None
        raw = self._assemble(budget, policy, outcome.carried, "feasible")
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

    def _assemble(self, budget: int, policy: str, carried: Carried, status: Status) -> Plan:
        """The plan with its schedule, before the simulator has put its figures in."""
        profile = self.profile
        train = Phase(
            instructions=instructions(self.dag, carried.actions),
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
            decisions=self._decisions(carried.actions),
            resident={FIXED: 0} if self.dag.fixed_bytes else {},
            arena_bytes=0,
            workspace_bytes=0,
            train=train,
            evaluate=None,
        )

    def _decisions(self, actions: Iterable[Action]) -> dict[str, str]:
        """For outputs that outlive the run after their own: kept, offloaded, or recomputed at least once."""
        ran: dict[int, int] = {}
        last: dict[int, int] = {}
        decided: dict[int, str] = {}
        clock = 0
        for verb, i in actions:
            if verb == "fetch":
                decided.setdefault(i, "offloaded")
            if verb != "run":
                continue
            clock += 1
            if i in ran:
                decided[i] = "recomputed"
            ran.setdefault(i, clock)
            for source in self.dag.inputs[i]:
                last[source] = clock
        decisions = {}
        for i in range(len(self.dag) - self.dag.sink):
            if i in decided:
                decisions[self.dag.names[i]] = decided[i]
            elif last.get(i, 0) > ran[i] + 1:
                decisions[self.dag.names[i]] = "kept"
        return decisions
