"""How much memory planning takes, counted from the layers before a solver is loaded.

Most of it are the programs of layer types under which columns are priced (`tightfit.planner.solve.pricing`): as
Python's arrays, as MathOpt's model and as HiGHS has it. How many entries they have follows from a layer's operators,
weights and candidates. Where the rule that keeps everything fits the budget, nothing is priced.
"""

from __future__ import annotations

from dataclasses import replace

from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.layer_types import LayeredStep, LayerType
from tightfit.planner.schedule.column_bytes import charged_bytes
from tightfit.planner.search_options import PlanOptions
from tightfit.planner.solve.policies import keep_all, rule_columns
from tightfit.profiles.schema import MOBILLM, Profile
from tightfit.runtime.common.units import MIB

SOLVER_BYTES = 49 * MIB
"""OR-tools once it is loaded, its linear programs, a schedule that is carried out and a plan that is written"""
STEP_BYTES = 4 << 10
"""of each operator of the step in schedules and plans"""
SEARCH_BYTES = 60 * MIB
"""of the search beside the programs: columns, the master program, rounding, HiGHS itself, and CP-SAT, which packs the
arena where that is hard
"""
ENTRY_BYTES = 280
"""of each entry of a layer's program"""
COMFORTABLY = 0.95
"""share of a budget's room up to which what keeps everything surely finds its places"""


def planning_bytes(profile: Profile, budget_bytes: int, options: PlanOptions) -> int:
    """Most bytes that planning the profile of a model at a budget adds to those that a process holds which has read
    it.
    """
    problem = layered(profile)
    needed = SOLVER_BYTES + STEP_BYTES * len(problem.graph.steps)
    if options.policy in {None, "solver", MOBILLM} and not _keeps_all(problem, budget_bytes):
        needed += SEARCH_BYTES + ENTRY_BYTES * sum(map(_entries, _priced(problem)))
    return needed


def _keeps_all(problem: LayeredStep, budget_bytes: int) -> bool:
    """Whether a schedule that keeps everything fits for sure, so that no other is searched for."""
    charged = charged_bytes(problem, rule_columns(problem, keep_all))
    return charged <= COMFORTABLY * (budget_bytes - problem.taken_bytes)


def _priced(problem: LayeredStep) -> list[LayerType]:
    """The layer types that have a program: of those that differ only in what an evaluation leaves one stands for
    all.
    """
    kinds: list[LayerType] = []
    for kind in problem.types:
        alike = replace(kind, leaves_evaluate=frozenset())
        if alike not in kinds:
            kinds.append(alike)
    return kinds


def _entries(kind: LayerType) -> int:
    """Entries of a layer's program, within a tenth: a row for each operator of a window and for each weight that is
    first used there, over what each weight, candidate and state may hold then.
    """
    weights, candidates = len(kind.weights), len(kind.candidates)
    modes = sum(len(weight.modes) for weight in kind.weights.values())
    states = sum(bool(update.states) for update in kind.updates)
    backward = len(kind.backward) + sum(map(len, kind.events.values()))
    ahead = len(kind.forward) + len(kind.evaluate) + 2 * weights
    return backward * (candidates + modes + states) + ahead * (2 * modes // 3 + states + candidates // 2)
