"""The decisions of one layer as variables of a program, and what depends on them: what runs again, what is unpacked.

``keep[v]`` and ``offload[v]`` for each forward storage that the backward window needs, a residency mode per weight,
``away[u]`` for optimizer states on disk. ``again[k][e]`` says that forward operator k has run again by its event e. The
decisions bound it from below (an operator runs again before the first reader that needs it, and what that takes runs
before), and it need not be declared integer. Numbers in brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

from tightfit.planner.problem.layer_types import LayerOperator, LayerType
from tightfit.planner.schedule.layer_schedule import Decision
from tightfit.planner.solvers.lp import ExpressionKey, Linear, LinearProgram

MINOR = "minor"
"""the group of trainables too small for a decision each"""
LAST = 1 << 30
Slot = tuple[int, int]
"""(backward position, forward operator that runs again just before it; LAST for the backward operator itself)"""


def choice_count(kind: LayerType) -> int:
    """Integer variables in the program of one layer."""
    states = {MINOR if update.minor else update.trainable for update in kind.updates if update.states}
    modes = sum(len(weight.modes) for name, weight in kind.weights.items() if name not in kind.alike)
    decided = set(kind.candidates).difference(kind.alike)
    return len(decided) + len(decided & kind.offloadable) + modes + len(states)


class LayerVariables:
    """The decision variables of one layer, and those that depend on them, inside `program`."""

    def __init__(self, program: LinearProgram, kind: LayerType) -> None:
        self.program = program
        self.kind = kind
        self.operations = {op.index: op for op in kind.forward}
        self.producer = kind.producer
        self.candidates = set(kind.candidates)
        self._products: dict[tuple[str, frozenset[ExpressionKey]], int] = {}
        self._choices()
        self._recomputation()
        self._weights()

    # --- variables -------------------------------------------------------------------------------------------------

    def _variable(self) -> int:
        return self.program.variable(0.0, 1.0)

    def _peak(self) -> int:
        return self.program.variable()

    def _at_least(self, left: Linear, right: Linear | float) -> None:
        self.program.at_least(left, right)

    def _choices(self) -> None:
        """(1) The decision variables, and one mode per weight."""
        kind = self.kind
        decided = [value for value in kind.candidates if value not in kind.alike]
        self.keep = {value: self.program.choice() for value in decided}
        self.offload = {value: self.program.choice() for value in decided if value in kind.offloadable}
        own = {name: weight for name, weight in kind.weights.items() if name not in kind.alike}
        self.mode = {name: [self.program.choice() for _ in weight.modes] for name, weight in own.items()}
        for variables in self.mode.values():
            self.program.exactly(Linear.sum(variables), 1.0)
        for value, like in kind.alike.items():
            if like in self.mode:
                self.mode[value] = self.mode[like]
                continue
            self.keep[value] = self.keep[like]
            if like in self.offload:
                self.offload[value] = self.offload[like]
        self.away: dict[str, int] = {}
        for update in kind.updates:
            group = MINOR if update.minor else update.trainable
            if update.states and group not in self.away:
                self.away[group] = self.program.choice()

    def _recomputation(self) -> None:
        """(2) again[k][e]: operator k has run again by its event e; what is needed and not there runs again."""
        kind = self.kind
        self.again: dict[int, list[int]] = {}
        for number, op in enumerate(kind.forward):
            events = kind.events.get(op.index)
            if events is None:
                continue
            first = kind.forward[kind.in_first_tile(number)].index
            alike = first != op.index and len(kind.events.get(first, ())) == len(events)
            self.again[op.index] = self.again[first] if alike else [self._variable() for _ in events]
        self.readers: dict[str, list[int]] = {value: [] for value in kind.candidates}
        for k in kind.events:
            for value in self.operations[k].inputs:
                if value in self.candidates:
                    self.readers[value].append(k)
        for variables in {id(variables): variables for variables in self.again.values()}.values():
            for earlier, later in itertools.pairwise(variables):
                self._at_least(Linear().add(later), Linear().add(earlier))
        self.direct: dict[str, list[int]] = {value: kind.direct_uses(value) for value in kind.candidates}
        said: set[ExpressionKey] = set()

        def say(left: Linear, right: Linear) -> None:
            """The row `left` >= `right`, once: those of equal tiles are the same."""
            key = Linear().plus(left).plus(right, -1.0).key()
            if key not in said:
                said.add(key)
                self._at_least(left, right)

        for value in kind.candidates:
            maker = self.producer.get(value)
            stored = Linear().add(self.keep[value])
            if value in self.offload:
                stored.add(self.offload[value])
                # (1) kept or offloaded, not both
                say(Linear(1.0), Linear.sum([self.keep[value], self.offload[value]]))
            runs = self.again.get(maker.index) if maker is not None else None
            if maker is not None and runs is not None and value in self.offload:
                say(Linear(1.0), Linear.sum([self.offload[value], runs[-1]]))
            if self.direct[value]:
                available = Linear().plus(stored).plus(self._again(maker, (self.direct[value][0], LAST)))
                say(available, Linear(1.0))
            for k in self.readers[value]:
                for event, variable in zip(kind.events[k], self.again[k]):
                    available = Linear().plus(stored).plus(self._again(maker, (event, k)))
                    say(available, Linear().add(variable))

    def _again(self, op: LayerOperator | None, slot: Slot, *, strictly: bool = False) -> Linear:
        """Whether the operator has run again by (or strictly before) the slot."""
        if op is None or op.index not in self.again:
            return Linear()
        position, slot_operator = slot
        events = self.kind.events[op.index]
        inclusive = op.index < slot_operator or (op.index == slot_operator and not strictly)
        count = bisect.bisect_right(events, position) if inclusive else bisect.bisect_left(events, position)
        return Linear().add(self.again[op.index][count - 1]) if count else Linear()

    def _all_again(self, k: int) -> Linear:
        return Linear().add(self.again[k][-1])

    def _all_of(self, *sides: Linear) -> Linear:
        """A variable that is at least the product of 0/1 expressions."""
        factors = [side for side in sides if side.terms or side.constant < 1.0]
        if any(not side.terms and side.constant <= 0.0 for side in factors):
            return Linear()
        if not factors:
            return Linear(1.0)
        if len(factors) == 1:
            return factors[0]
        key = ("both", frozenset(side.key() for side in factors))
        if key in self._products:
            return Linear().add(self._products[key])
        variable = self._products[key] = self._variable()
        row = Linear(1.0 - len(factors))
        for side in factors:
            row.plus(side)
        self._at_least(Linear().add(variable), row)
        return Linear().add(variable)

    def _any_of(self, sides: Iterable[Linear]) -> Linear:
        """A variable that is at least each of the 0/1 expressions."""
        alternatives = [side for side in sides if side.terms or side.constant > 0.0]
        if not alternatives:
            return Linear()
        if len(alternatives) == 1:
            return alternatives[0]
        key = ("most", frozenset(side.key() for side in alternatives))
        if key in self._products:
            return Linear().add(self._products[key])
        variable = self._products[key] = self._variable()
        for side in alternatives:
            self._at_least(Linear().add(variable), side)
        return Linear().add(variable)

    # --- weights ---------------------------------------------------------------------------------------------------

    def _in_mode(self, name: str, *, behind: str = "", ahead: str = "", hold: str = "") -> Linear:
        """Whether the weight's mode has these places in the backward gap, the step gap and inside the window."""
        result = Linear()
        for mode, variable in zip(self.kind.weights[name].modes, self.mode[name]):
            if behind in {"", mode.backward_gap} and ahead in {"", mode.step_gap} and hold in {"", mode.hold}:
                result.add(variable)
        return result

    def _weights(self) -> None:
        """(3) Unpackings and reads of each weight in the backward window."""
        self.unpacks: dict[str, Linear] = {}
        self.reads: dict[str, Linear] = {}
        self.carried: dict[str, Linear] = {}
        for name, weight in self.kind.weights.items():
            on_disk = self._in_mode(name, behind="disk")
            not_unpacked = Linear(1.0).plus(self._in_mode(name, behind="unpacked"), -1.0)
            unpacks, reads = Linear(), Linear()
            if weight.repeated:
                self._repeated_uses(name, unpacks, reads)
            elif weight.unpacked_per_use:
                unpacks.plus(not_unpacked, weight.backward_uses)
                reads.plus(on_disk, weight.backward_uses)
                for position in weight.recomputing:
                    rerun = self._all_again(self.kind.forward[position].index)
                    unpacks.plus(self._all_of(rerun, not_unpacked))
                    reads.plus(self._all_of(rerun, on_disk))
            else:
                unpacks.plus(not_unpacked)
                reads.plus(on_disk)
                if weight.recomputing and not weight.trained:  # values are fetched once, and stay for their update
                    rerun = self._all_again(self.kind.forward[weight.recomputing[0]].index)
                    # Unpacked by the recomputation and held until the backward's own use: no second unpacking.
                    carried = self._variable()
                    unpacked_inside = Linear()
                    for mode, variable in zip(weight.modes, self.mode[name]):
                        if mode.hold == "unpacked" and mode.backward_gap != "unpacked":
                            unpacked_inside.add(variable)
                    self._at_least(unpacked_inside, Linear().add(carried))
                    self._at_least(rerun, Linear().add(carried))
                    self.carried[name] = Linear().add(carried)
                    unpacks.plus(self._all_of(rerun, not_unpacked)).add(carried, -1.0)
                    reads.plus(self._all_of(rerun, self._in_mode(name, behind="disk", hold="disk")))
            self.unpacks[name] = unpacks
            self.reads[name] = reads

    def _repeated_uses(self, name: str, unpacks: Linear, reads: Linear) -> None:
        """(3) The same for a weight that each tile uses: once for the window, or at each use, by its mode's `hold`."""
        weight = self.kind.weights[name]
        again = [self._all_again(self.kind.forward[position].index) for position in weight.recomputing]
        used = Linear(1.0) if weight.backward_uses else self._any_of(again)
        on_disk = self._in_mode(name, hold="disk")
        apart = self._in_mode(name, hold="packed").plus(on_disk)
        held = self._in_mode(name, hold="unpacked").plus(self._in_mode(name, behind="unpacked"), -1.0)
        read_once = self._in_mode(name, behind="disk").plus(on_disk, -1.0)
        unpacks.plus(self._all_of(used, held)).plus(apart, weight.backward_uses)
        reads.plus(self._all_of(used, read_once)).plus(on_disk, weight.backward_uses)
        for rerun in again:
            unpacks.plus(self._all_of(rerun, apart))
            reads.plus(self._all_of(rerun, on_disk))

    # --- answers ---------------------------------------------------------------------------------------------------

    def decision(self, values: Sequence[float]) -> Decision:
        """The layer's decision in a solution of the model."""
        kind = self.kind
        keep = {value for value, variable in self.keep.items() if values[variable] > 0.5}
        offload = {value for value, variable in self.offload.items() if values[variable] > 0.5} - keep
        weights = []
        for name, variables in self.mode.items():
            best = max(range(len(variables)), key=lambda index: values[variables[index]])
            weights.append((name, kind.weights[name].modes[best]))
        states = {
            update.trainable
            for update in kind.updates
            if update.states and values[self.away[MINOR if update.minor else update.trainable]] > 0.5
        }
        return Decision(
            keep=frozenset(keep), offload=frozenset(offload), weights=tuple(weights), states=frozenset(states)
        )

    def fix(self, decision: Decision) -> None:
        """Pin every decision variable to `decision` (for checks)."""
        for value, variable in self.keep.items():
            self._pin(variable, value in decision.keep)
        for value, variable in self.offload.items():
            self._pin(variable, value in decision.offload)
        modes = dict(decision.weights)
        for name, variables in self.mode.items():
            for mode, variable in zip(self.kind.weights[name].modes, variables):
                self._pin(variable, mode == modes[name])
        for update in self.kind.updates:
            if update.states:
                variable = self.away[MINOR if update.minor else update.trainable]
                self._pin(variable, update.trainable in decision.states)

    def _pin(self, variable: int, chosen: bool) -> None:
        self.program.bounds(variable, float(chosen), float(chosen))
