"""The mixed-integer model of one layer: its bytes window by window and its seconds, over the variables of
`layer_variables`.

`LayerProgram` adds a layer to a program; `column_generation` puts the blocks of all layers of a small model into one
program, or prices the block of one layer type at a time at the dual prices of the step. Units: KiB and milliseconds.
Numbers in brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from tightfit.planner.formulation.layer_variables import LAST, MINOR, LayerVariables, Slot
from tightfit.planner.problem.layer_figures import KIB, MS, LayerFigures
from tightfit.planner.problem.layer_types import LayerType, LayerWeight, compute_seconds, transfer_seconds, weight_uses
from tightfit.planner.problem.step_graph import SUM
from tightfit.planner.schedule.layer_schedule import Decision, measure, state_names_of
from tightfit.planner.solvers.lp import Linear, LinearProgram


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """A weight at an operator that reads it; all but `weight` and `before` (KiB) are 0/1 expressions."""

    weight: LayerWeight
    before: Linear
    """what the weight holds until it is unpacked"""
    runs: Linear
    """whether it is there unpacked"""
    unpacks: Linear
    """whether it is unpacked here"""
    retained: Linear
    """whether the packed form stays beside the unpacked one"""


class LayerProgram(LayerVariables):
    """One layer inside `program`, with its figures: bytes at its windows' peaks and between them, seconds,
    instructions.
    """

    def __init__(self, program: LinearProgram, kind: LayerType) -> None:
        super().__init__(program, kind)
        self._rows: dict[tuple[int, bytes], float] = {}
        """(peak, terms) of each row -> its constant"""
        self._idle_cache: dict[tuple[str, tuple[int, ...]], tuple[Linear, Linear]] = {}
        self.between = self._between()
        self.outside = self._outside()
        self.most_between, self.most_outside = self._peak(), self._peak()
        self._at_least(Linear().add(self.most_between), self.between)
        self._at_least(Linear().add(self.most_outside), self.outside)
        self.forward_peak = self._peak()
        self.evaluate_peak = self._peak()
        self.backward_peak = self._peak()
        self._forward_rows(self.forward_peak, evaluate=False)
        self._forward_rows(self.evaluate_peak, evaluate=True)
        self._apart_rows()
        self._backward_rows()
        self._seconds()
        self._instructions()

    # --- bytes -----------------------------------------------------------------------------------------------------

    def _size(self, value: str) -> float:
        return self.kind.bytes[value] / KIB

    def _states(self) -> Linear:
        """KiB of optimizer state that stays resident."""
        result = Linear()
        for update in self.kind.updates:
            if update.states:
                size = update.state_bytes / KIB
                result.constant += size
                result.add(self.away[MINOR if update.minor else update.trainable], -size)
        return result

    def _gap(self, name: str, *, step: bool) -> Linear:
        """KiB that a weight holds in the step gap, or in the backward gap."""
        weight = self.kind.weights[name]
        where = "ahead" if step else "behind"
        result = Linear().plus(self._in_mode(name, **{where: "unpacked"}), weight.bytes / KIB)
        return result.plus(self._in_mode(name, **{where: "packed"}), weight.packed_bytes / KIB)

    def _between(self) -> Linear:
        """(4) Bytes that the layer holds from its forward to its backward window."""
        result = Linear().plus(self._states())
        for value, variable in self.keep.items():
            result.add(variable, self._size(value))
        for name in self.kind.weights:
            result.plus(self._gap(name, step=False))
        return result

    def _outside(self) -> Linear:
        """(4) Bytes that the layer holds from its backward to its next forward window."""
        result = Linear().plus(self._states())
        for name in self.kind.weights:
            result.plus(self._gap(name, step=True))
        return result

    def _row(self, peak: int, row: Linear) -> None:
        """Row: `peak` >= `row`, unless one with the same terms says as much already."""
        # As bytes, since the terms of all rows as Python's objects take ten times as much; `+ 0.0` makes -0.0 the same
        # as 0.0.
        key = peak, array("d", (number + 0.0 for term in sorted(row.terms.items()) for number in term)).tobytes()
        if row.constant > self._rows.get(key, -1.0):
            self._rows[key] = row.constant
            self._at_least(Linear().add(peak), row)

    def _forward_rows(self, peak: int, *, evaluate: bool) -> None:
        """(5) Bytes in the forward window, or in an evaluation's: at its start and at each operator."""
        kind = self.kind
        leaving = kind.leaves_evaluate if evaluate else kind.leaves_forward
        operations = kind.evaluate if evaluate else kind.forward
        read = weight_uses(operations)
        born = dict.fromkeys(kind.enters_forward, -1)
        last: dict[str, int] = dict.fromkeys(kind.enters_forward, -1)
        for position, op in enumerate(operations):
            for value in [*op.inputs, *op.outputs]:
                last[value] = position
            for value in op.outputs:
                born.setdefault(value, position)
        for value in leaving:
            last[value] = LAST
        self._row(peak, Linear(sum(self._size(v) for v in kind.enters_forward)).plus(self._outside()))
        for position, op in enumerate(operations):
            if operations is kind.forward and not kind.at_an_end(kind.tile_of(position)):
                continue
            shared = Linear().plus(self._states())
            output_kib = 0.0
            for value, start in born.items():
                if start <= position <= last[value]:
                    if start == position:
                        output_kib += self._size(value)
                    else:
                        shared.constant += self._size(value)
                elif start < position and not evaluate and value in self.keep:
                    shared.add(self.keep[value], self._size(value))
            uses: list[WeightUse] = []
            used: dict[str, WeightUse] = {}
            for name, weight in kind.weights.items():
                first, final = read.get(name, (LAST, LAST))
                if first > position:
                    shared.plus(self._gap(name, step=True))
                elif final < position:
                    shared.plus(self._gap(name, step=evaluate))
                elif first == position or (weight.repeated and name in op.weights):
                    used[name] = self._forward_use(
                        name, first=first == position, last=final == position, evaluate=evaluate
                    )
                elif weight.repeated:
                    shared.plus(self._held(name, "ahead" if evaluate else "behind"))
                else:
                    shared.constant += weight.bytes / KIB
                    shared.plus(self._retained_forward(name, evaluate=evaluate), weight.packed_bytes / KIB)
            uses = [used[name] for name in op.weights if name in used]
            self._use_rows(peak, shared, Linear(output_kib), uses)

    def _forward_use(self, name: str, *, first: bool, last: bool, evaluate: bool) -> WeightUse:
        """A weight at a use in the forward window, or in an evaluation's, that may have to unpack it."""
        gap = "ahead" if evaluate else "behind"
        before, there = self._gap(name, step=True), self._in_mode(name, ahead="unpacked")
        if not first:
            before, there = self._held(name, gap), self._in_mode(name, hold="unpacked")
        inside = self.kind.weights[name].repeated and not last
        return WeightUse(
            weight=self.kind.weights[name],
            before=before,
            runs=Linear(1.0),
            unpacks=Linear(1.0).plus(there, -1.0),
            retained=self._packed_inside(name, gap) if inside else self._retained_forward(name, evaluate=evaluate),
        )

    def _packed_inside(self, name: str, gap: str) -> Linear:
        """Whether the packed form of a weight that each tile uses is there between its uses in a window, before `gap`
        (behind: the backward gap, ahead: the step gap).
        """
        needed = self._in_mode(name, hold="unpacked", **{gap: "packed"})
        return self._in_mode(name, hold="packed").plus(needed)

    def _held(self, name: str, gap: str) -> Linear:
        """KiB of it between these uses."""
        weight = self.kind.weights[name]
        packed = Linear().plus(self._packed_inside(name, gap), weight.packed_bytes / KIB)
        return packed.plus(self._in_mode(name, hold="unpacked"), weight.bytes / KIB)

    def _apart_rows(self) -> None:
        """(49) Bytes at the updates where they are apart: the layer outside its windows, and one trainable's states and
        values that are fetched.
        """
        kind = self.kind
        for update in kind.updates if kind.apart else ():
            row = Linear(-kind.across_evaluate / KIB).plus(self.outside)
            row.add(self.away[MINOR if update.minor else update.trainable], update.state_bytes / KIB)
            if update.trainable in kind.weights:
                size = kind.weights[update.trainable].bytes / KIB
                row.plus(self._in_mode(update.trainable, ahead="disk"), size)
            self._row(self.evaluate_peak, row)

    def _retained_forward(self, name: str, *, evaluate: bool) -> Linear:
        return self._in_mode(name, ahead="packed") if evaluate else self._in_mode(name, behind="packed")

    def _use_rows(self, peak: int, shared: Linear, output_kib: Linear, uses: list[WeightUse]) -> None:
        """(7) Bytes at each unpacking for an operator (packed and unpacked form together) and at its run.

        `shared`: KiB of everything but the weights of `uses` and the output; `output_kib`: those of the output.
        """
        for index, use in enumerate(uses):
            row = Linear().plus(shared)
            for earlier in uses[:index]:
                row.plus(earlier.runs, earlier.weight.bytes / KIB)
                row.plus(earlier.retained, earlier.weight.packed_bytes / KIB)
            for later in uses[index + 1 :]:
                row.plus(later.before)
            row.plus(use.runs, use.weight.bytes / KIB)
            row.plus(self._any_of([use.unpacks, use.retained]), use.weight.packed_bytes / KIB)
            self._row(peak, row)
        row = Linear().plus(shared).plus(output_kib)
        for use in uses:
            row.plus(use.runs, use.weight.bytes / KIB).plus(use.retained, use.weight.packed_bytes / KIB)
        self._row(peak, row)

    def _slots(self) -> list[Slot]:
        """The slots of the tiles whose bytes are looked at."""
        kind = self.kind
        looked_at = {t for t, tile in enumerate(kind.backward_tiles) if kind.at_an_end(tile)}
        again = [k for k in kind.events if kind.at_an_end(kind.tile_of(kind.position[k]))]
        slots = [(t, k) for k in again for t in kind.events[k] if t in looked_at]
        return sorted([*slots, *((t, LAST) for t in looked_at)])

    def _backward_rows(self) -> None:
        """(6) Bytes in the backward window: at its start and at each slot."""
        kind = self.kind
        start = Linear(sum(self._size(v) for v in kind.enters_backward)).plus(self.between)
        self._row(self.backward_peak, start)
        born = dict.fromkeys(kind.enters_backward, -1)
        last: dict[str, int] = dict.fromkeys(kind.enters_backward, -1)
        for t, op in enumerate(kind.backward):
            for value in op.outputs:
                born.setdefault(value, t)
            for value in [*op.inputs, *op.outputs]:
                last[value] = t
        for value in kind.leaves_backward | kind.closes_backward:
            last[value] = LAST
        for update in kind.updates:
            last[update.gradient] = max(update.after, last.get(update.gradient, -1))
        fixed = {value for value in born if value not in self.candidates}
        for slot in self._slots():
            t, k = slot
            row = Linear().plus(self._states())
            output_kib = 0.0
            for value in fixed:
                if born[value] < t and last[value] >= t:
                    row.constant += self._size(value)
                elif born[value] == t and k == LAST:
                    output_kib += self._size(value)
            output = Linear(output_kib)
            outputs = self.operations[k].outputs if k != LAST else ()
            for value, count in kind.counted.items():
                live = self._live(value, slot)
                if value in outputs:
                    # The output itself is not there yet while weights are unpacked.
                    output.plus(live, self._size(value))
                else:
                    row.plus(live, count * self._size(value))
            if k != LAST:
                run = self._runs_at(k, t)
                for value in outputs:
                    if value not in self.candidates and not (value in born and born[value] < t <= last[value]):
                        output.plus(run, self._size(value))
            self._weight_rows(slot, row, output)
            if k == LAST:
                self._update_rows(t, born, last, fixed)

    def _runs_at(self, k: int, t: int) -> Linear:
        """Whether operator k runs again at its event t."""
        index = self.kind.events[k].index(t)
        result = Linear().add(self.again[k][index])
        return result.add(self.again[k][index - 1], -1.0) if index else result

    def _live(self, value: str, slot: Slot) -> Linear:
        """(6) Whether a candidate is resident at the slot: it is there by then, and an operator at the slot or later
        reads it.
        """
        t, k = slot
        maker = self.producer.get(value)
        direct = self.direct[value]
        resident = Linear().add(self.keep[value])
        rerun = self._again(maker, slot)
        if rerun.terms:
            assert maker is not None
            resident = self._any_of([resident, rerun]) if len(maker.outputs) > 1 else resident.plus(rerun)
        offloaded = Linear().add(self.offload[value]) if value in self.offload else Linear()
        if direct and direct[-1] >= t:
            if not offloaded.terms:
                return resident
            if direct[0] < t or (direct[0] == t and k == LAST):
                return resident.plus(offloaded)
            fetches = [self._all_of(offloaded, self._again(self.operations[w], slot)) for w in self.readers[value]]
            return resident.plus(self._any_of(fetches))
        tails = []
        for w in self.readers[value]:
            tail = self._all_again(w).plus(self._again(self.operations[w], slot, strictly=True), -1.0)
            if any((event, w) >= slot for event in self.kind.events[w]):
                tails.append(tail)
        if maker is not None and maker.index == k:
            tails.append(self._runs_at(k, t))
        if not tails:
            return Linear()
        parts = [self._all_of(resident, tail) for tail in tails]
        if offloaded.terms:
            early = bool(direct)
            for tail in tails:
                due = [Linear(1.0)] if early else [self._again(self.operations[w], slot) for w in self.readers[value]]
                parts.extend(self._all_of(offloaded, tail, is_due) for is_due in due)
        return self._any_of(parts)

    def _weight_rows(self, slot: Slot, row: Linear, output: Linear) -> None:
        """(6) Complete the slot's row with the weights and post it, by way of (7)."""
        t, k = slot
        kind = self.kind
        op = self.operations[k] if k != LAST else kind.backward[t]
        uses: dict[str, WeightUse] = {}
        for name, weight in kind.weights.items():
            unpacked, packed = self._idle(name, slot, strictly=True)
            before = Linear().plus(unpacked, weight.bytes / KIB).plus(packed, weight.packed_bytes / KIB)
            shared = not (weight.unpacked_per_use or weight.repeated)
            if name not in op.weights or (shared and k == LAST and weight.backward_first < t):
                row.plus(before)
                continue
            resident = self._in_mode(name, behind="unpacked")
            if k == LAST:
                unpacks = Linear(1.0).plus(resident, -1.0)
                if name in self.carried:
                    unpacks.plus(self.carried[name], -1.0)
                retained = self._in_mode(name, ahead="packed")
                if weight.repeated:
                    unpacks = Linear(1.0).plus(unpacked, -1.0)
                    retained = retained if t >= weight.backward_last else self._packed_inside(name, "ahead")
                uses[name] = WeightUse(
                    weight=weight, before=before, runs=Linear(1.0), unpacks=unpacks, retained=retained
                )
            else:
                run = self._runs_at(k, t)
                uses[name] = WeightUse(
                    weight=weight,
                    before=before,
                    runs=self._any_of([run, unpacked]),
                    unpacks=Linear().plus(run).plus(resident, -1.0),
                    retained=self._idle(name, slot, strictly=False)[1],
                )
        self._use_rows(self.backward_peak, row, output, [uses[name] for name in op.weights if name in uses])

    def _idle(self, name: str, slot: Slot, *, strictly: bool) -> tuple[Linear, Linear]:
        """Whether the weight lies unpacked, and packed, around the slot in the backward window."""
        weight = self.kind.weights[name]
        if weight.unpacked_per_use:
            return self._in_mode(name, behind="unpacked"), self._in_mode(name, behind="packed")
        if slot > (weight.backward_last, LAST):
            return self._in_mode(name, ahead="unpacked"), self._in_mode(name, ahead="packed")
        if slot > (weight.backward_first, LAST):
            if weight.repeated:
                return self._in_mode(name, hold="unpacked"), self._packed_inside(name, "ahead")
            return Linear(1.0), self._in_mode(name, ahead="packed")
        rerun = Linear()
        if weight.recomputing:
            # Of several tiles the last one comes first in the backward.
            rerun = self._again(self.kind.forward[weight.recomputing[-1]], slot, strictly=strictly)
        key = (name, tuple(rerun.terms))
        if key not in self._idle_cache:
            resident, unpacked_if_rerun, fixed, given_up, staged = Linear(), Linear(), Linear(), Linear(), Linear()
            for mode, variable in zip(weight.modes, self.mode[name]):
                if mode.backward_gap == "unpacked":
                    resident.add(variable)
                elif mode.hold == "unpacked":
                    unpacked_if_rerun.add(variable)
                if mode.backward_gap == "packed":
                    (given_up if mode.hold == "unpacked" and mode.step_gap != "packed" else fixed).add(variable)
                elif mode.backward_gap == "disk" and (
                    mode.hold == "packed" or (weight.repeated and mode.step_gap == "packed")
                ):
                    staged.add(variable)
            unpacked = self._any_of([resident, self._all_of(unpacked_if_rerun, rerun)])
            packed = Linear().plus(fixed)
            if rerun.terms:
                packed.plus(self._at_least_positive(given_up, rerun)).plus(self._all_of(staged, rerun))
            else:
                packed.plus(given_up)
            self._idle_cache[key] = (unpacked, packed)
        unpacked, packed = self._idle_cache[key]
        return Linear().plus(unpacked), Linear().plus(packed)

    def _at_least_positive(self, left: Linear, right: Linear) -> Linear:
        """A variable that is at least left - right, and 0."""
        if not left.terms:
            return Linear()
        variable = self._variable()
        self._at_least(Linear().add(variable), Linear().plus(left).plus(right, -1.0))
        return Linear().add(variable)

    def _update_rows(self, t: int, born: dict[str, int], last: dict[str, int], fixed: set[str]) -> None:
        """(8) Bytes at the updates after backward operation t, whose optimizer states may have to be fetched."""
        kind = self.kind
        due = [update for update in kind.updates if update.after == t]
        after = (t + 1, -1)
        freed: set[str] = set()
        for update in due:
            row = Linear().plus(self._states())
            for value in fixed:
                ends = last[value] > t or any(value == other.gradient for other in due)
                if born[value] <= t and ends and value not in freed:
                    row.constant += self._size(value)
            for value, count in kind.counted.items():
                row.plus(self._live(value, after), count * self._size(value))
            for name, weight in kind.weights.items():
                unpacked, packed = self._idle(name, after, strictly=True)
                row.plus(unpacked, weight.bytes / KIB).plus(packed, weight.packed_bytes / KIB)
            if update.states:
                away = self.away[MINOR if update.minor else update.trainable]
                # (49) where updates are apart, only the sum is there
                row.add(away, (update.role_bytes[-1] if kind.apart else update.state_bytes) / KIB)
            for other in due if not kind.apart else ():
                # Values that are to go to disk are there until their own update.
                if other.trainable in kind.weights and other.gradient not in freed:
                    weight = kind.weights[other.trainable]
                    row.plus(self._in_mode(other.trainable, ahead="disk"), weight.bytes / KIB)
            self._row(self.backward_peak, row)
            freed.add(update.gradient)

    # --- seconds ---------------------------------------------------------------------------------------------------

    def _seconds(self) -> None:
        """(9) Seconds of computation and disk in both windows, and (10) instructions, but for their constant."""
        kind = self.kind
        self.forward_seconds, self.reads_forward, self.spills_forward = Linear(), Linear(), Linear()
        self.backward_seconds, self.reads_backward, self.fetches_backward = Linear(), Linear(), Linear()
        self.states_fetched, self.states_spilled = Linear(), Linear()
        self.arriving_forward, self.arriving_backward, self.leaving = Linear(), Linear(), Linear()
        count = Linear()
        self.forward_seconds.constant += MS * sum(op.seconds for op in kind.forward)
        self.backward_seconds.constant += MS * sum(op.seconds for op in kind.backward)
        self.backward_seconds.constant += MS * sum(update.seconds for update in kind.updates)
        share = 1 / max(1, kind.apart)
        self.backward_seconds.constant += MS * share * sum(update.apart_seconds for update in kind.updates)
        for k in kind.events:
            op = self.operations[k]
            self.backward_seconds.plus(self._all_again(k), MS * op.seconds)
            # (10) Of several outputs one at least is made anew and freed; the others may lie there already.
            count.plus(self._all_again(k), 2.0)
        read = weight_uses(kind.forward)
        for name, weight in kind.weights.items():
            if name in read:
                unpacks = Linear(1.0).plus(self._in_mode(name, ahead="unpacked"), -1.0)
                reads = self._in_mode(name, ahead="disk")
                if weight.repeated:
                    later_uses = sum(name in op.weights for op in kind.forward) - 1
                    unpacks.plus(self._in_mode(name, hold="packed"), later_uses)
                    unpacks.plus(self._in_mode(name, hold="disk"), later_uses)
                    reads.plus(self._in_mode(name, hold="disk"), later_uses)
                self.forward_seconds.plus(unpacks, MS * weight.unpack_seconds)
                self.arriving_forward.plus(reads, MS * weight.read_compute_seconds)
                self.reads_forward.plus(reads, MS * weight.read_seconds)
                if not weight.trained:
                    count.plus(unpacks, 4.0).plus(reads, 4.0)
            self.backward_seconds.plus(self.unpacks[name], MS * weight.unpack_seconds)
            self.arriving_backward.plus(self.reads[name], MS * weight.read_compute_seconds)
            self.reads_backward.plus(self.reads[name], MS * weight.read_seconds)
            if not weight.trained:
                count.plus(self.unpacks[name], 2.0).plus(self.reads[name], 2.0)
                continue
            # Values on disk between steps are written and freed after their update, and fetched in each forward window;
            # they are freed in an evaluation, and in training where they are on disk between its windows too.
            on_disk = self._in_mode(name, ahead="disk")
            size = kind.raw_bytes[name]
            self.leaving.plus(on_disk, MS * share * compute_seconds(kind.write, size))
            written = MS * share * transfer_seconds(kind.write, size)
            if kind.apart:
                # (49) they are freed after their last use in the backward, and fetched for the update as well
                self.arriving_backward.plus(on_disk, MS * share * compute_seconds(kind.read, size))
                self.states_fetched.plus(on_disk, written + MS * share * transfer_seconds(kind.read, size))
            else:
                self.states_spilled.plus(on_disk, written)
            count.plus(on_disk, (4.0 if kind.apart else 2.0) + (3.0 if name in read else 0.0))
            count.plus(self.reads[name], 1.0 + (1.0 if name in read else 0.0))
        for value, variable in self.offload.items():
            size = kind.raw_bytes[value]
            self.leaving.add(variable, MS * compute_seconds(kind.write, size))
            self.arriving_backward.add(variable, MS * compute_seconds(kind.read, size))
            self.spills_forward.add(variable, MS * transfer_seconds(kind.write, size))
            self.fetches_backward.add(variable, MS * transfer_seconds(kind.read, size))
            count.add(variable, 3.0)
        for update in kind.updates:
            if update.states:
                disk_states = self.away[MINOR if update.minor else update.trainable]
                for name in state_names_of(update):
                    size = kind.raw_bytes[name]
                    # (49) fetched and written in the step, and in the update where it is apart; in the step there is
                    # only the sum, which is not written in the update
                    fetched, written, later_fetched, later_written = 1.0, 1.0, 0.0, 0.0
                    if kind.apart:
                        summed = float(name.startswith(SUM))
                        fetched, written = summed * (kind.apart > 1), summed
                        later_fetched, later_written = share, share * (1 - summed)
                    self.arriving_backward.add(
                        disk_states, MS * (fetched + later_fetched) * compute_seconds(kind.read, size)
                    )
                    self.leaving.add(disk_states, MS * (written + later_written) * compute_seconds(kind.write, size))
                    self.states_fetched.add(
                        disk_states,
                        MS * (fetched + later_fetched) * transfer_seconds(kind.read, size)
                        + MS * later_written * transfer_seconds(kind.write, size),
                    )
                    self.states_spilled.add(disk_states, MS * written * transfer_seconds(kind.write, size))
                fetches = float(kind.apart > 1)
                count.add(disk_states, fetches + 2.0 + 3.0 * update.states - 1.0 if kind.apart else 3.0 * update.states)
        self.instructions = count

    def _instructions(self) -> None:
        """(10) The constant of the instruction count, by counting one decision: everything kept, nothing runs again."""
        kind = self.kind
        decision = Decision(
            keep=frozenset(kind.candidates),
            offload=frozenset(),
            weights=tuple((name, weight.modes[0]) for name, weight in kind.weights.items()),
            states=frozenset(),
        )
        counted = measure(kind, decision).instructions
        chosen = {variables[0] for variables in self.mode.values()}
        linear = self.instructions.constant + sum(
            coefficient for variable, coefficient in self.instructions.terms.items() if variable in chosen
        )
        self.instructions.constant += counted - linear

    def figures(self) -> LayerFigures[Linear]:
        """The layer's figures as expressions, in KiB and ms."""

        def expression(name: str) -> Linear:
            figure = getattr(self, name)
            return figure if isinstance(figure, Linear) else Linear().add(figure)

        return LayerFigures.of(expression)
