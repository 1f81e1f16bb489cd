"""Replays a plan without an arena: the budget is on the bytes that are live, as a bare graph's profile gives them.

The simulator's half for model kind ``graph``; `planner.simulate.simulate` is the door. Invariants and their names are those of
`planner.simulate`; here any operator that may run again may do so at any time after its first run.
"""

from __future__ import annotations

from typing import Any

from planner.schema import Peak, Phase, Plan, TimelinePoint
from planner.simulate import LARGEST, POINTS, InvalidSchedule, Simulation
from profiles.bare import FIXED, LAYER
from profiles.errors import InputError


def replay(plan: Plan) -> Simulation:
    """Raises InvalidSchedule where an invariant breaks, InputError where the plan has no schedule."""
    if plan.train is None:
        raise InputError(
            f"the plan is {plan.status} and has no schedule; plan with at least {plan.minimum_budget_bytes} bytes"
        )
    return _Replay(plan, plan.train.instructions).run()


class _Replay:
    def __init__(self, plan: Plan, instructions: list[list[Any]]) -> None:
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
        """operators that ran for the first time"""
        self.now = 0.0
        self.compute = 0.0
        self.most_live = self.fixed
        self.workspace = 0
        """of the run that sets the peak"""
        self.index = -1
        self.held = {"constant": self.fixed, "activation": 0, "gradient": 0}
        self.peak_bytes = -1
        self.peak_index = 0
        self.peak_text = ""
        self.peak_live: tuple[str, ...] = ()
        self.points: list[TimelinePoint] = []

    def fail(self, invariant: str, tensor: str, text: str) -> InvalidSchedule:
        return InvalidSchedule(invariant, "train", self.index, tensor, text)

    def run(self) -> Simulation:
        for index, instruction in enumerate(self.instructions):
            self.index = index
            match instruction:
                case ["run", layer, int(operator), [None]] if layer == LAYER and 0 <= operator < len(self.operators):
                    self._run(operator)
                case ["free", str(name)]:
                    self._free(name)
                case _:
                    raise self.fail("form", str(instruction), "no such instruction")
        self.index = len(self.instructions)
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
            recompute_seconds=self.now - self.compute,
        )
        return Simulation(
            train=phase,
            evaluate=None,
            timeline=self._timeline(),
            peak_bytes=self.peak_bytes,
            arena_bytes=self.peak_bytes - self.workspace,
            workspace_bytes=self.workspace,
            live_bytes=self.most_live,
        )

    def _run(self, index: int) -> None:
        operator = self.operators[index]
        again = index < self.done
        if index > self.done:
            raise self.fail("operator-order", operator.target, "runs before its turn")
        if again and not operator.recomputable:
            raise self.fail("operator-order", operator.target, "may not run again")
        for name in operator.inputs:
            if name not in self.live:
                raise self.fail("use-before-resident", name, "is read but not resident")
        output = operator.outputs[0]
        assert output is not None
        if output in self.live:
            raise self.fail("already-resident", output, "is made while it is resident")
        self.live[output] = self.bytes[output]
        self.live_bytes += self.bytes[output]
        self.held[self.kinds[output]] += self.bytes[output]
        self.done += not again
        self.now += operator.seconds
        self.compute += 0.0 if again else operator.seconds
        self.most_live = max(self.most_live, self.live_bytes)
        total = self.live_bytes + operator.workspace_bytes
        if total > self.peak_bytes:
            self.peak_bytes = total
            self.workspace = operator.workspace_bytes
            self.peak_index = self.index
            self.peak_text = f"{operator.target} ({operator.phase}{' again' if again else ''})"
            self.peak_live = tuple(self.live)
        by_kind = {kind: size for kind, size in self.held.items() if size}
        if operator.workspace_bytes:
            by_kind["workspace"] = operator.workspace_bytes
        self.points.append(TimelinePoint(instruction=self.index, seconds=self.now, bytes=total, by_kind=by_kind))

    def _free(self, name: str) -> None:
        if name not in self.live:
            raise self.fail("double-free", name, "is not resident")
        size = self.live.pop(name)
        self.live_bytes -= size
        self.held[self.kinds[name]] -= size

    def _timeline(self) -> list[TimelinePoint]:
        """At most POINTS moments, the fullest of each stretch of runs."""
        stride = max(1, -(-len(self.points) // POINTS))
        return [
            max(self.points[start : start + stride], key=lambda point: point.bytes)
            for start in range(0, len(self.points), stride)
        ]
