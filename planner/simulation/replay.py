"""Replays one schedule of a plan, instruction by instruction: counts bytes and seconds and checks invariants, for
`simulate`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Literal

from tightfit.planner.instructions import (
    Accumulate,
    Fetch,
    Free,
    Instruction,
    Pass,
    Perturb,
    Read,
    Run,
    Spill,
    Unpack,
    Update,
    to_json,
)
from tightfit.planner.problem.step_graph import SUM
from tightfit.planner.problem.tensor_index import IndexedTensor
from tightfit.planner.schema import Peak, Phase
from tightfit.planner.simulation.plan_index import InvalidSchedule, PlanIndex
from tightfit.planner.simulation.timeline import ReplayPeak, ReplayTotals, Timeline
from tightfit.profiles.schema import Operator

Role = Literal["train", "evaluate", "update"]
"""what a phase is for"""
PAGE = 4096
LINE = 64
LARGEST = 12
"""tensors named at the peak"""
KINDS = (
    "floor",
    "constant",
    "batch",
    "trainable",
    "optimizer",
    "packed",
    "weight",
    "activation",
    "gradient",
    "workspace",
    "fragmentation",
)


class Replay:
    """The replay of one phase of a plan; after `run` it holds peak, seconds and the set of updated trainables."""

    def __init__(self, declared: PlanIndex, phase: Phase, name: str, role: Role) -> None:
        self.declared = declared
        self.phase = phase
        self.instructions: Sequence[Instruction] = phase.instructions
        self.name = name
        self.training = role == "train"
        self.updating = role == "update" if declared.apart else self.training
        """whether trainables are updated in this phase"""
        self.adding = self.training and declared.apart
        """whether gradients are added to sums in it"""
        self.index = -1
        self.now = self.disk = 0.0
        self.taken_up = 0.0
        """when the disk began its latest transfer"""
        self.totals = ReplayTotals()
        self.places: dict[str, int] = {}
        self.starts: list[int] = []
        self.owners: list[str] = []
        self.live = self.most_live = self.top = self.workspace = 0
        self.kinds = dict.fromkeys(KINDS, 0)
        self.landing: dict[str, float] = {}
        self.writing: dict[str, float] = {}
        self.on_disk: set[str] = set()
        self.dirty: set[str] = set()
        self.updated: set[str] = set()
        self.summed: set[str] = set()
        """trainables whose gradients were added to their sums"""
        self.makers = declared.makers(phase)
        self.gradient_runs: dict[str, int] = {}
        self.passed: set[str] = set()
        """skipped layers whose output's gradient was passed on as their input's"""
        self.shift = dict.fromkeys(declared.trainables, 0)
        """trainable -> its current perturbation, in multiples of epsilon"""
        self.ran: set[tuple[str, int]] = set()
        self.cursor_index = self.forwards = 0
        self.timeline = Timeline(len(self.instructions) + 1)
        self.peak = ReplayPeak()
        self.expected = self._expected()
        self.floor = declared.device.floor.held_bytes + declared.device.floor.instruction_bytes * declared.instructions

    def _expected(self) -> list[tuple[str, int]]:
        """The first runs in the order they must take: the forward of all layers, then the backward of the layers in
        reverse; with MeZO two forwards; in an evaluation the operators for inference.
        """

        def turns(layer: str, phase: str) -> list[tuple[str, int]]:
            operators = self.declared.layers[layer][0]
            return [(layer, position) for position, operator in enumerate(operators) if operator.phase == phase]

        if not self.training:
            inference = self.declared.inference if not self.updating else {}
            return [(layer, position) for layer in self.declared.order for position in inference.get(layer, ())]
        forward = [turn for layer in self.declared.order for turn in turns(layer, "forward")]
        self.forwards = len(forward)
        if self.declared.two_forwards:
            return forward * 2
        backward = [layer for layer in reversed(self.declared.order) if layer not in self.phase.skipped]
        return forward + [turn for layer in backward for turn in turns(layer, "backward")]

    def fail(self, invariant: str, tensor: str, text: str) -> InvalidSchedule:
        return InvalidSchedule(invariant, self.name, self.index, tensor, text)

    # --- the replay ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        for name, offset in self.declared.plan.resident.items():
            self._allocate(name, offset)
        for name, states in self.declared.trainables.items():
            self.on_disk.update(tensor for tensor in (name, *states) if tensor not in self.places)
        self._record(0)
        for index, instruction in enumerate(self.instructions):
            self.index = index
            self._record(self._replay(instruction))
        self.index = len(self.instructions)
        self._finish()

    def _replay(self, instruction: Instruction) -> int:
        """Carry out one instruction; the heap bytes (workspace) that it needs while it runs."""
        match instruction:
            case Run(layer, operator, at):
                return self._run(layer, operator, at)
            case Free(tensor):
                self._free(tensor)
            case Read(weight, at):
                self._read(weight, at)
            case Unpack(weight, at):
                self._unpack(weight, at)
            case Spill(tensor):
                self._spill(tensor)
            case Fetch(tensor, at):
                self._fetch(tensor, at)
            case Update(trainable):
                return self._update(trainable)
            case Perturb(trainable, times):
                return self._perturb(trainable, times)
            case Pass(above, below):
                self._pass(above, below)
            case Accumulate(trainable, at):
                self._accumulate(trainable, at)
        return 0

    def _finish(self) -> None:
        end = max([self.now, self.disk])
        self.totals.stall += end - self.now
        self.now = end
        resident = self.declared.plan.resident
        for name in self.places:
            if name not in resident:
                raise self.fail("leak", name, "is still resident when the phase ends")
        for name, offset in resident.items():
            if self.places.get(name) != offset:
                raise self.fail("leak", name, f"must be resident at offset {offset} when the phase ends")
        if self.cursor_index != len(self.expected):
            layer, operator = self.expected[self.cursor_index]
            raise self.fail("operator-order", layer, f"operator {operator} never runs")
        for name in self.declared.trainables:
            if self.adding and name not in self.summed:
                raise self.fail("sum-once", name, "has a gradient that is never added to its sum")
            trained = self.declared.two_forwards or f"grad:{name}" in self.makers or not self.phase.skipped
            if self.updating and trained and name not in self.updated:
                raise self.fail("update-once", name, "is never updated")

    def _tensor(self, name: str) -> IndexedTensor:
        tensor = self.declared.tensors.get(name)
        if tensor is None:
            raise self.fail("form", name, "no such tensor")
        return tensor

    def _need(self, name: str) -> None:
        """Check that the tensor is resident, and wait until its transfer has landed."""
        if name not in self.places:
            raise self.fail("use-before-resident", name, "is read but not resident")
        self._wait(self.landing.pop(name, self.now))

    def _wait(self, until: float) -> None:
        if until > self.now:
            self.totals.stall += until - self.now
            self.now = until

    def _allocate(self, name: str, offset: int) -> None:
        tensor = self._tensor(name)
        if name in self.places:
            raise self.fail("already-resident", name, "is made while it is resident")
        alignment = PAGE if name.startswith("packed:") else LINE
        if offset < 0 or offset % alignment:
            raise self.fail("offset", name, f"offset {offset} is not a multiple of {alignment}")
        end = offset + tensor.bytes
        arena = self.declared.plan.arena_bytes
        if end > arena:
            raise self.fail("offset", name, f"ends at {end}, beyond the arena of {arena} bytes")
        self.places[name] = offset
        self.live += tensor.bytes
        self.kinds[tensor.kind] += tensor.bytes
        if tensor.bytes:
            index = bisect.bisect_left(self.starts, offset)
            for other in (index - 1, index):
                if 0 <= other < len(self.starts):
                    low = self.starts[other]
                    high = low + self._tensor(self.owners[other]).bytes
                    if low < end and offset < high:
                        raise self.fail("overlap", name, f"shares bytes with {self.owners[other]}")
            self.starts.insert(index, offset)
            self.owners.insert(index, name)
        self.top = max(self.top, end)

    def _release(self, name: str) -> None:
        tensor = self._tensor(name)
        offset = self.places.pop(name)
        self.live -= tensor.bytes
        self.kinds[tensor.kind] -= tensor.bytes
        if tensor.bytes:
            index = bisect.bisect_left(self.starts, offset)
            del self.starts[index], self.owners[index]

    def _move(self, size: int, *, out: bool) -> float:
        """Queue a transfer on the disk; the time at which it is done."""
        channel = self.declared.device.write if out else self.declared.device.read
        self.taken_up = max(self.disk, self.now)
        self.disk = self.taken_up + channel.latency_seconds + size / channel.bytes_per_second
        done = self.disk
        cost = channel.compute_seconds_per_transfer + size * channel.compute_seconds_per_byte
        self.now += cost
        self.totals.compute += cost
        if out:
            self.totals.write_bytes += size
        else:
            self.totals.read_bytes += size
        return done

    def _read(self, name: str, offset: int) -> None:
        tensor = self._tensor(name)
        if f"packed:{name}" not in self.declared.tensors:
            raise self.fail("transfer", name, "is not a weight of the store")
        self._allocate(f"packed:{name}", offset)
        self.landing[f"packed:{name}"] = self._move(tensor.packed_bytes, out=False)

    def _unpack(self, name: str, offset: int) -> None:
        tensor = self._tensor(name)
        self._need(f"packed:{name}")
        self._allocate(name, offset)
        self.now += tensor.unpack_seconds
        self.totals.unpack += tensor.unpack_seconds

    def _run(self, layer: str, position: int, offsets: Sequence[int | None]) -> int:
        if layer not in self.declared.layers or not 0 <= position < len(self.declared.layers[layer][0]):
            raise self.fail("form", str(layer), f"has no operator {position}")
        operators, names = self.declared.layers[layer]
        operator = operators[position]
        rerun = self._check_order(layer, position, operator)
        for value in operator.inputs:
            if value in operator.gathers:
                continue
            name = names[value]
            if name in self.updated:
                raise self.fail("update-once", name, "is read after its update")
            if self.training and self.declared.two_forwards and name in self.shift:
                wanted = 1 if self.cursor_index <= self.forwards else -1
                if self.shift[name] != wanted:
                    raise self.fail("perturbed", name, f"is read at {self.shift[name]:+} epsilon, not at {wanted:+}")
            self._need(name)
        if len(offsets) != len(operator.outputs):
            raise self.fail(
                "form", layer, f"operator {position} has {len(operator.outputs)} outputs, {len(offsets)} offsets"
            )
        for output, offset in zip(operator.outputs, offsets):
            if output is None:
                if offset is not None:
                    raise self.fail("form", layer, f"operator {position}: an unused output has an offset")
                continue
            name = names[output]
            if offset is None:
                raise self.fail("form", name, "has no offset")
            if name in self.places:
                if self.places[name] != offset:
                    raise self.fail("already-resident", name, f"lies at {self.places[name]} and is made at {offset}")
                self._wait(self.landing.pop(name, self.now))
            else:
                self._allocate(name, offset)
            self.gradient_runs[name] = self.gradient_runs.get(name, 0) + 1
        self.now += operator.seconds
        if rerun:
            self.totals.recompute += operator.seconds
        else:
            self.totals.compute += operator.seconds
        self.workspace = max(self.workspace, operator.workspace_bytes)
        return operator.workspace_bytes

    def _check_order(self, layer: str, position: int, operator: Operator) -> bool:
        """Whether this run is a recomputation. Raises InvalidSchedule where the operator must not run now."""
        if self.cursor_index < len(self.expected) and self.expected[self.cursor_index] == (layer, position):
            if self.cursor_index == self.forwards and operator.phase == "forward":
                self.ran.clear()  # the second forward's runs are first runs again
            self.cursor_index += 1
            self.ran.add((layer, position))
            return False
        if (layer, position) not in self.ran:
            raise self.fail("operator-order", layer, f"operator {position} runs before its turn")
        if operator.phase == "backward":
            raise self.fail("operator-order", layer, f"backward operator {position} runs twice")
        if not operator.recomputable:
            raise self.fail("operator-order", layer, f"operator {position} is random and may not run again")
        return True

    def _free(self, name: str) -> None:
        self._tensor(name)
        if name not in self.places:
            raise self.fail("double-free", name, "is not resident")
        self._wait(self.writing.pop(name, self.now))
        self._wait(self.landing.pop(name, self.now))
        if name in self.dirty:
            raise self.fail("lost-state", name, "was updated and is freed without a copy on disk")
        self._release(name)

    def _spill(self, name: str) -> None:
        tensor = self._tensor(name)
        self._need(name)
        self.writing[name] = self._move(tensor.bytes, out=True)
        self.on_disk.add(name)
        self.dirty.discard(name)

    def _fetch(self, name: str, offset: int) -> None:
        tensor = self._tensor(name)
        if name not in self.on_disk:
            raise self.fail("transfer", name, "is fetched but was never spilled")
        self._allocate(name, offset)
        self.landing[name] = self._move(tensor.bytes, out=False)

    def _update(self, name: str) -> int:
        states = self.declared.trainables.get(name)
        gradient = f"grad:{name}"
        if states is None:
            raise self.fail("update-once", name, "is not a trainable")
        if not self.updating:
            when = "before the norm of all gradients is known" if self.training else "while evaluating"
            raise self.fail("update-once", name, f"is updated {when}")
        if name in self.updated:
            raise self.fail("update-once", name, "is updated twice")
        if self.declared.two_forwards:
            self._need(name)
            if self.shift[name] != -1 or self.cursor_index != len(self.expected):
                raise self.fail("perturbed", name, "is updated before both forwards are through")
            self.shift[name] = 0
        elif self.declared.apart:
            for needed in (name, *states):
                self._need(needed)
        else:
            for needed in (name, gradient, *states):
                self._need(needed)
            if not self._complete(gradient):
                raise self.fail("update-once", name, "is updated before its gradient is complete")
        self.updated.add(name)
        # A sum has served once its trainable is updated from it: the next step begins another.
        changed = [name, *states]
        if self.declared.apart:
            changed = [tensor for tensor in changed if not tensor.startswith(SUM)]
        self.dirty.update(changed)
        for changed_name in changed:
            if changed_name in self.writing:
                raise self.fail("lost-state", changed_name, "is updated while it is being written")
            self.on_disk.discard(changed_name)
        return self._touch(name)

    def _accumulate(self, name: str, offset: int) -> None:
        gradient, total = f"grad:{name}", f"{SUM}{name}"
        if name not in self.declared.trainables or not self.adding:
            raise self.fail("sum-once", name, "has no gradient that is added to a sum in this phase")
        if name in self.summed:
            raise self.fail("sum-once", name, "has its gradient added twice")
        self._need(gradient)
        if not self._complete(gradient):
            raise self.fail("sum-once", name, "has its gradient added before it is complete")
        if self.declared.plan.accumulate == 1 and total not in self.places:
            self._allocate(total, offset)
        self._need(total)
        if self.places[total] != offset:
            raise self.fail("sum-once", total, f"lies at {self.places[total]} and is added to at {offset}")
        if total in self.writing:
            raise self.fail("lost-state", total, "is added to while it is being written")
        self.summed.add(name)
        self.dirty.add(total)
        self.on_disk.discard(total)
        seconds = self.declared.accumulate_seconds[name]
        self.now += seconds
        self.totals.compute += seconds

    def _perturb(self, name: str, times: int) -> int:
        if not self.training or not self.declared.two_forwards or name not in self.shift:
            raise self.fail("perturbed", name, "is not perturbed in this phase")
        if name in self.updated:
            raise self.fail("perturbed", name, "is perturbed after its update")
        self._need(name)
        self.shift[name] += times
        return self._touch(name)

    def _touch(self, name: str) -> int:
        """Count the seconds of an update or a perturbation; the heap bytes of the noise that it
        draws (MeZO), else 0.
        """
        tensor, seconds = self._tensor(name), self.declared.update_seconds[name]
        self.now += seconds
        self.totals.compute += seconds
        noise = tensor.bytes if self.declared.two_forwards else 0
        self.workspace = max(self.workspace, noise)
        return noise

    def _pass(self, above: str, below: str) -> None:
        layer, expected = self.declared.passages.get(above, ("", ""))
        if below != expected or layer not in self.phase.skipped:
            raise self.fail("passed-once", above, f"is not the gradient of an output whose input's is {below}")
        if layer in self.passed:
            raise self.fail("passed-once", above, f"is passed through {layer} twice")
        self._need(above)
        if not self._complete(above):
            raise self.fail("passed-once", above, "is passed on before it is complete")
        self.passed.add(layer)
        offset = self.places[above]
        self._release(above)
        self._allocate(below, offset)

    def _complete(self, gradient: str) -> bool:
        """Whether every operator that adds to the gradient has run; true of one that was passed on, which no operator
        makes.
        """
        return self.gradient_runs.get(gradient, 0) == self.makers.get(gradient, 0)

    # --- the record ------------------------------------------------------------------------------------------------

    def _record(self, workspace: int) -> None:
        self.most_live = max(self.most_live, self.live)
        used = self.live + workspace
        if self.timeline.fuller(used):
            fragmentation = max(0, self.top - self.live)
            self.timeline.put(
                used,
                instruction=max(0, self.index),
                seconds=self.now,
                total=self.floor + self.top + workspace,
                by_kind={**self.kinds, "floor": self.floor, "workspace": workspace, "fragmentation": fragmentation},
            )
        if used > self.peak.bytes:
            self.peak = ReplayPeak(bytes=used, instruction=self.index, tensors=tuple(self.places))

    def _text(self, index: int) -> str:
        if not 0 <= index < len(self.instructions):
            return "start of the step"
        match self.instructions[index]:
            case Run(layer, position):
                operator = self.declared.layers[layer][0][position]
                again = " again" if (layer, position) in self.ran_before(index) else ""
                return f"{layer}: {operator.target} ({operator.phase}{again})"
            case other:
                verb, name, *_ = to_json(other)
                return f"{verb} {name}"

    def ran_before(self, index: int) -> set[tuple[str, int]]:
        return {(i.layer, i.operator) for i in self.instructions[:index] if isinstance(i, Run)}

    def replayed_phase(self) -> Phase:
        """The phase with the figures that the replay found."""
        tensors = {name: self._tensor(name).bytes for name in self.peak.tensors}
        largest = sorted(tensors.items(), key=lambda item: (-item[1], item[0]))[:LARGEST]
        reached = self.floor + self.top + self.workspace
        return Phase(
            instructions=list(self.instructions),
            skipped=self.phase.skipped,
            seconds=self.now,
            peak_bytes=max(self.declared.device.floor.start_peak_bytes, reached),
            peak=Peak(instruction=self.peak.instruction, text=self._text(self.peak.instruction), tensors=dict(largest)),
            compute_seconds=self.totals.compute,
            recompute_seconds=self.totals.recompute,
            unpack_seconds=self.totals.unpack,
            stall_seconds=self.totals.stall,
            read_bytes=self.totals.read_bytes,
            write_bytes=self.totals.write_bytes,
        )
