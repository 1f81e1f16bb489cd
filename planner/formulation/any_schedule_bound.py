"""A lower bound on the step's time that holds for any schedule at a budget, whatever it recomputes, moves or reorders.

Take the moment at which the last forward operator (the loss), the pivot, has first run. Every operator that depends on
it runs later, and what those operators read and earlier ones made must be resident at that moment, or be made again, or
come from disk. The same holds for weights and optimizer states at that moment and at the boundary between two steps.
Memory at both moments is limited; a linear program uses it best.

It asks only for what must happen at least once. Making a tensor again costs one more run of its maker, not of what
makes the maker's inputs; so the bound also holds for schedules that recompute those in turn: whole layers, layer inputs
among them, any number of times. That recomputation reads weights again is left out too; and every operator is at least
one instruction.

Makers whose tensors cost and free the same, as those of equal layers do, stand in the program once, with their number,
and so do weights and states: the mean over them of any solution is a solution, of the same time and bytes. Numbers in
brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

from collections import Counter

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.problem.clipping import accumulate_seconds, clipped_seconds
from tightfit.planner.problem.layer_figures import KIB, MS
from tightfit.planner.problem.layer_types import ALWAYS, LayeredStep, compute_seconds, transfer_seconds
from tightfit.planner.problem.step_graph import StepGraph, state_bytes, state_roles
from tightfit.planner.solvers.highs import MARGIN
from tightfit.planner.solvers.lp import INFINITY, GrowingProgram, Linear
from tightfit.profiles.schema import Profile, Tensor


class AnyScheduleBound:
    """The bound for one step at any number of budgets. `workspace_bytes`: where the step needs another workspace than
    its profile says.
    """

    def __init__(self, problem: LayeredStep, *, workspace_bytes: int | None = None) -> None:
        self.profile: Profile = problem.profile
        self.graph: StepGraph = problem.graph
        floor = self.profile.device.floor
        steps = self.graph.steps
        # Every operator is at least one instruction, and so is every operator of an evaluation.
        apart = {step.layer for step in self.graph.inference}
        evaluation = len(self.graph.inference) + sum(s.phase == "forward" and s.layer not in apart for s in steps)
        instructions = floor.instruction_bytes * (len(steps) + evaluation)
        self.moving = problem.moving
        always = sum(
            storage.bytes
            for name, storage in self.graph.storages.items()
            if storage.kind in ALWAYS and name not in self.moving
        )
        workspace = problem.workspace_bytes if workspace_bytes is None else workspace_bytes
        self.taken = floor.held_bytes + workspace + instructions + always
        """(24) bytes of any budget that no decision touches"""
        self.fixed = sum(step.seconds for step in steps)
        self.fixed += sum(self._update_seconds(tensor) for tensor in self.profile.tensors if tensor.kind == "trainable")
        pivot = max((step.index for step in steps if step.phase == "forward"), default=-1)
        self.earlier = self._before(pivot)
        self.later = self._after(pivot)
        self.program = GrowingProgram()
        self.compute: dict[int, float] = {}
        """ms on the compute timeline per unit of each variable"""
        self.disk: dict[int, float] = {}
        """ms of the disk per unit"""
        self.at_pivot: dict[int, float] = {}
        """KiB at the moment of the loss per unit"""
        self.at_boundary: dict[int, float] = {}
        """KiB between two steps per unit"""
        self._activations()
        self._weights()
        self._states()
        self._values()
        # (28) the step lasts as long as its computation, and as long as what the disk does
        self.total = self.program.variable()
        self.program.at_least(Linear().add(self.total), self.fixed * MS, _weighted(self.compute))
        self.program.at_least(Linear().add(self.total), _weighted(self.disk))
        # (24) memory at both moments; `step_seconds` says how much there is
        self.rooms = [
            self.program.at_least(Linear(), _weighted(moment)) for moment in (self.at_pivot, self.at_boundary)
        ]

    def step_seconds(self, budget_bytes: int, cutoff: Cutoff = NEVER) -> float:
        """Seconds per step that no schedule undercuts; where `cutoff` strikes, what one run of every operator takes."""
        for row in self.rooms:
            self.program.row_bounds(row, -max(0.0, (budget_bytes - self.taken) / KIB), INFINITY)
        try:
            result = self.program.solve(Linear().add(self.total), cutoff.left())
        except TimeoutError:
            return self.fixed
        if not result.optimal:
            return self.fixed
        return max(self.fixed, result.objective / MS * (1 - MARGIN))

    def _update_seconds(self, tensor: Tensor) -> float:
        optimizer, steps = self.profile.optimizer, self.profile.accumulate
        if self.profile.max_grad_norm is None:
            return tensor.update_seconds
        return accumulate_seconds(tensor, optimizer) + clipped_seconds(tensor, optimizer) / steps

    def _before(self, pivot: int) -> set[int]:
        """Steps without which the pivot cannot run, itself included."""
        earlier: set[int] = set()
        needed: set[str] = set()
        for step in reversed(self.graph.steps[: pivot + 1]):
            if step.index == pivot or needed & set(filter(None, step.outputs)):
                earlier.add(step.index)
                needed.update(step.inputs)
        return earlier

    def _after(self, pivot: int) -> set[int]:
        """Steps that can only run once the pivot has."""
        steps = self.graph.steps
        later: set[int] = set()
        dependent = set(filter(None, steps[pivot].outputs)) if pivot >= 0 else set()
        for step in steps[pivot + 1 :]:
            if dependent & set(step.inputs):
                later.add(step.index)
                dependent.update(filter(None, step.outputs))
        return later

    def _share(self) -> int:
        return self.program.variable(0.0, 1.0)

    def _one_of(self, shares: list[int]) -> None:
        self.program.at_least(Linear.sum(shares), 1.0)

    def _activations(self) -> None:
        """(25) What is made before the loss and read after it."""
        device = self.profile.device
        sizes_by_maker: dict[int, list[int]] = {}
        """maker -> bytes of each such tensor that it makes"""
        for storage in self.graph.storages.values():
            if storage.kind in ALWAYS or storage.kind == "weight" or not storage.bytes:
                continue
            makers = [index for index in storage.producers if index in self.earlier]
            read = any(index in self.later for index in storage.consumers)
            if makers and read and len(makers) == len(storage.producers):
                sizes_by_maker.setdefault(makers[-1], []).append(storage.bytes)
        alike: Counter[tuple[float | None, tuple[int, ...]]] = Counter()
        for index, sizes in sizes_by_maker.items():
            maker = self.graph.steps[index]
            alike[maker.seconds if maker.recomputable else None, tuple(sorted(sizes))] += 1
        for (seconds, sizes_of_one), count in alike.items():
            rerun = None
            if seconds is not None:
                rerun = self._share()
                self.compute[rerun] = count * seconds * MS
            for size in sizes_of_one:
                kept, moved = self._share(), self._share()
                self.at_pivot[kept] = count * size / KIB
                trip = transfer_seconds(device.write, size) + transfer_seconds(device.read, size)
                self.disk[moved] = count * trip * MS
                cost = compute_seconds(device.write, size) + compute_seconds(device.read, size)
                self.compute[moved] = count * cost * MS
                self._one_of([kept, moved] if rerun is None else [kept, moved, rerun])

    def _weights(self) -> None:
        """(26) What is read after the loss, at that moment; what is read before it, between two steps."""
        read = self.profile.device.read
        alike: Counter[tuple[bool, int, int, float]] = Counter()
        for tensor in self.profile.tensors:
            if tensor.kind != "weight":
                continue
            uses = self.graph.storages[tensor.name].consumers
            for pivot, moment in ((True, self.later), (False, self.earlier)):
                if any(index in moment for index in uses):
                    alike[pivot, tensor.bytes, tensor.packed_bytes, tensor.unpack_seconds] += 1
        for (pivot, size, packed_size, unpack_seconds), count in alike.items():
            resident = self.at_pivot if pivot else self.at_boundary
            unpacked, packed, unpacking, reading = (self._share() for _ in range(4))
            resident[unpacked] = count * size / KIB
            resident[packed] = count * packed_size / KIB
            self.compute[unpacking] = count * unpack_seconds * MS
            self.compute[reading] = count * compute_seconds(read, packed_size) * MS
            self.disk[reading] = count * transfer_seconds(read, packed_size) * MS
            self._one_of([unpacking, unpacked])
            self._one_of([reading, unpacked, packed])

    def _states(self) -> None:
        """(27) Optimizer states whose update comes after the loss, at both moments."""
        device = self.profile.device
        roles, steps = state_roles(self.profile.optimizer), self.profile.accumulate
        # Of the steps that make one update only the last needs the moments; a fleet's member has no states in its plan.
        counts = dict.fromkeys(roles if steps == 1 else roles[-1:], 1.0)
        if self.profile.max_grad_norm is not None:
            # The first step of an update needs no sum, and after the last one there is none.
            counts[roles[-1]] = (steps - 1) / steps
        alike: dict[int, float] = {}
        for tensor in self.profile.tensors:
            if tensor.kind != "trainable":
                continue
            gradient = self.graph.storages.get(f"grad:{tensor.name}")
            if gradient is not None and all(index in self.later for index in gradient.producers):
                for role, count in counts.items():
                    size = state_bytes(role, tensor)
                    alike[size] = alike.get(size, 0.0) + count
        for size, states in alike.items():
            for resident, channel in ((self.at_pivot, device.read), (self.at_boundary, device.write)):
                kept, moved = self._share(), self._share()
                resident[kept] = states * size / KIB
                self.disk[moved] = states * transfer_seconds(channel, size) * MS
                self.compute[moved] = states * compute_seconds(channel, size) * MS
                self._one_of([kept, moved])

    def _values(self) -> None:
        """(27) Values of trainables that may lie on disk: read after the loss at that moment, read before it between
        two steps. What is not there between two steps was written after its update.
        """
        device = self.profile.device
        alike: Counter[tuple[bool, bool, int]] = Counter()
        for name in self.moving:
            storage, gradient = self.graph.storages[name], self.graph.storages[f"grad:{name}"]
            if any(index in self.later for index in storage.consumers):
                alike[True, False, storage.bytes] += 1
            written = all(index in self.later for index in gradient.producers)
            # Where the update is apart, only the last of its steps comes before it.
            written = written and (self.profile.max_grad_norm is None or self.profile.accumulate == 1)
            if any(index in self.earlier for index in storage.consumers):
                alike[False, written, storage.bytes] += 1
        for (pivot, written, size), count in alike.items():
            kept, moved = self._share(), self._share()
            (self.at_pivot if pivot else self.at_boundary)[kept] = count * size / KIB
            channels = [device.read, device.write] if written else [device.read]
            self.disk[moved] = count * sum(transfer_seconds(channel, size) for channel in channels) * MS
            self.compute[moved] = count * sum(compute_seconds(channel, size) for channel in channels) * MS
            self._one_of([kept, moved])


def _weighted(terms: dict[int, float]) -> Linear:
    result = Linear()
    result.terms.update(terms)
    return result
