"""Replays a bare graph's plan, which has no arena: the budget limits the live bytes.

`tightfit.planner.simulation.simulate.simulate` calls it for plans of model kind ``graph``. Invariants and their names,
and the way time is counted, are those of `tightfit.planner.simulation.simulate`. Any recomputable operator may run
again at any time after its first run; where the graph names a disk, any output may be written there once and fetched
back.
"""

from __future__ import annotations

from tightfit.planner.instructions import Fetch, Free, Instruction, Run, Spill, to_json
from tightfit.planner.schema import Peak, Phase, Plan
from tightfit.planner.simulation.figures import Simulation
from tightfit.planner.simulation.plan_index import InvalidSchedule
from tightfit.planner.simulation.replay import LARGEST
from tightfit.planner.simulation.timeline import Timeline
from tightfit.profiles.graph_input import FIXED, LAYER, NO_CHANNEL
from tightfit.runtime.common.errors import InputError


def replay(plan: Plan) -> Simulation:
    """Replay a bare graph's plan. Raises InvalidSchedule where an invariant breaks, InputError where the plan has no
    schedule.
    """
    if plan.train is None:
        raise InputError(
            f"the plan is {plan.status} and has no schedule; plan with at least {plan.minimum_budget_bytes} bytes"
        )
    return GraphReplay(plan, plan.train.instructions).run()


class GraphReplay:
    """The replay of a bare graph's plan."""

    def __init__(self, plan: Plan, instructions: list[Instruction]) -> None:
        self.plan = plan
        self.instructions = instructions
        program = plan.programs[0]
        self.operators = program.operators
        self.kinds = {value.name: value.kind for value in program.values}
        self.bytes = {value.name: value.bytes for value in program.values}
        self.fixed = sum(tensor.bytes for tensor in plan.tensors if tensor.name == FIXED)
        self.kept = {tensor.name for tensor in plan.tensors} - {FIXED}
        self.live: dict[str, int] = {}
        self.live_bytes = self.fixed
        self.done = 0
        """number of operators that have had their first run"""
        self.channels = {"spill": plan.device.write, "fetch": plan.device.read}
        self.now = self.disk = 0.0
        self.taken_up = 0.0
        """when the disk began its latest transfer"""
        self.compute = self.recompute = self.stall = 0.0
        self.moved = {"spill": 0, "fetch": 0}
        """bytes"""
        self.on_disk: set[str] = set()
        self.writing: dict[str, float] = {}
        self.landing: dict[str, float] = {}
        """output -> time at which its transfer to, or from, the disk is done"""
        self.most_live = self.fixed
        self.workspace = 0
        """workspace of the run that sets the peak"""
        self.index = -1
        self.held = {"constant": self.fixed, "activation": 0, "gradient": 0}
        self.peak_bytes = -1
        self.peak_index = 0
        self.peak_text = ""
        self.peak_live: tuple[str, ...] = ()
        # The timeline has a moment for each instruction that adds bytes.
        self.timeline = Timeline(sum(isinstance(instruction, Run | Fetch) for instruction in instructions))

    def fail(self, invariant: str, tensor: str, text: str) -> InvalidSchedule:
        return InvalidSchedule(invariant, "train", self.index, tensor, text)

    def run(self) -> Simulation:
        for index, instruction in enumerate(self.instructions):
            self.index = index
            self._replay(instruction)
        self.index = len(self.instructions)
        self._wait(self.disk)
        if self.done < len(self.operators):
            raise self.fail("operator-order", self.operators[self.done].target, "never runs")
        for name in sorted(self.live.keys() ^ self.kept):
            text = "is still resident" if name in self.live else "must be resident"
            raise self.fail("leak", name, f"{text} when the phase ends")
        if self.peak_bytes > self.plan.budget_bytes:
            text = f"{self.peak_bytes} bytes at the peak, {self.plan.budget_bytes} allowed"
            raise InvalidSchedule("budget", "train", -1, self.peak_text, text)
        if 0 < self.plan.peak_bytes < self.peak_bytes:
            text = f"the plan states {self.plan.peak_bytes}, the replay finds {self.peak_bytes}"
            raise InvalidSchedule("claims", "plan", -1, "peak_bytes", text)
        tensors = sorted(((self.bytes[name], name) for name in self.peak_live), key=lambda item: (-item[0], item[1]))
        phase = Phase(
            instructions=self.instructions,
            seconds=self.now,
            peak_bytes=self.peak_bytes,
            peak=Peak(
                instruction=self.peak_index,
                text=self.peak_text,
                tensors={name: size for size, name in tensors[:LARGEST]},
            ),
            compute_seconds=self.compute,
            recompute_seconds=self.recompute,
            stall_seconds=self.stall,
            read_bytes=self.moved["fetch"],
            write_bytes=self.moved["spill"],
        )
        return Simulation(
            train=phase,
            evaluate=None,
            timeline=self.timeline.points,
            peak_bytes=self.peak_bytes,
            arena_bytes=self.peak_bytes - self.workspace,
            workspace_bytes=self.workspace,
            live_bytes=self.most_live,
        )

    def _replay(self, instruction: Instruction) -> None:
        match instruction:
            case Run(layer, operator, (None,)) if layer == LAYER and 0 <= operator < len(self.operators):
                self._run(operator)
            case Free(name):
                self._free(name)
            case Spill(name) if name in self.bytes and self.plan.device.write != NO_CHANNEL:
                self._spill(name)
            case Fetch(name, 0) if name in self.bytes and self.plan.device.read != NO_CHANNEL:
                self._fetch(name)
            case _:
                raise self.fail("form", str(to_json(instruction)), "no such instruction")

    def _run(self, index: int) -> None:
        operator = self.operators[index]
        rerun = index < self.done
        if index > self.done:
            raise self.fail("operator-order", operator.target, "runs before its turn")
        if rerun and not operator.recomputable:
            raise self.fail("operator-order", operator.target, "may not run again")
        for name in operator.inputs:
            if name not in self.live:
                raise self.fail("use-before-resident", name, "is read but not resident")
        # An output that is being written may be read meanwhile; one that is being fetched may not.
        for name in operator.inputs:
            self._wait(self.landing.pop(name, self.now))
        output = operator.outputs[0]
        assert output is not None
        self._hold(output)
        self.done += not rerun
        self.now += operator.seconds
        self.compute += 0.0 if rerun else operator.seconds
        self.recompute += operator.seconds if rerun else 0.0
        self._record(f"{operator.target} ({operator.phase}{' again' if rerun else ''})", operator.workspace_bytes)

    def _hold(self, name: str) -> None:
        if name in self.live:
            raise self.fail("already-resident", name, "is made while it is resident")
        self.live[name] = self.bytes[name]
        self.live_bytes += self.bytes[name]
        self.held[self.kinds[name]] += self.bytes[name]
        self.most_live = max(self.most_live, self.live_bytes)

    def _record(self, text: str, workspace: int) -> None:
        total = self.live_bytes + workspace
        if total > self.peak_bytes:
            self.peak_bytes = total
            self.workspace = workspace
            self.peak_index = self.index
            self.peak_text = text
            self.peak_live = tuple(self.live)
        if self.timeline.fuller(total):
            by_kind = {**self.held, "workspace": workspace}
            self.timeline.put(total, instruction=self.index, seconds=self.now, total=total, by_kind=by_kind)

    def _wait(self, until: float) -> None:
        self.stall += max(0.0, until - self.now)
        self.now = max(self.now, until)

    def _move(self, verb: str, name: str) -> float:
        """Queue a transfer on the disk; the time at which it is done."""
        channel, size = self.channels[verb], self.bytes[name]
        self.taken_up = max(self.disk, self.now)
        self.disk = self.taken_up + channel.latency_seconds + size / channel.bytes_per_second
        self.moved[verb] += size
        return self.disk

    def _spill(self, name: str) -> None:
        if name not in self.live:
            raise self.fail("use-before-resident", name, "is written but not resident")
        if name in self.on_disk:
            raise self.fail("transfer", name, "was written before")
        self.on_disk.add(name)
        self.writing[name] = self._move("spill", name)

    def _fetch(self, name: str) -> None:
        if name not in self.on_disk:
            raise self.fail("transfer", name, "was never written")
        self._hold(name)
        self.landing[name] = self._move("fetch", name)
        self._record(f"{name} (fetched)", 0)

    def _free(self, name: str) -> None:
        if name not in self.live:
            raise self.fail("double-free", name, "is not resident")
        self._wait(max(self.writing.pop(name, self.now), self.landing.pop(name, self.now)))
        self._release(name)

    def _release(self, name: str) -> None:
        size = self.live.pop(name)
        self.live_bytes -= size
        self.held[self.kinds[name]] -= size
