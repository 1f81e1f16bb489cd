"""When a stage's schedule reaches its messages: the moments at which it asks for them and has handed them over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tightfit.planner.instructions import Instruction, Run
from tightfit.planner.schema import Phase, Plan
from tightfit.planner.simulation.plan_index import PlanIndex
from tightfit.planner.simulation.replay import Replay, Role
from tightfit.runtime.engine.training.job import RECEIVE, SEND

__all__ = ["Marks", "marks_of"]


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Seconds from the beginning of a schedule that never waits for a message; 0 for a message that it has none of."""

    receive_up: float = 0.0
    """it asks for activations"""
    send_up: float = 0.0
    """it has handed activations over"""
    receive_down: float = 0.0
    """it asks for gradients"""
    send_down: float = 0.0
    """it has handed gradients over"""
    middle: float = 0.0
    """its first backward operator begins; where there is none, as `seconds`"""
    seconds: float
    """it ends"""


def marks_of(plan: Plan) -> tuple[Marks, Marks]:
    """The marks of a plan's training schedule, and of its forward alone. Raises InvalidSchedule where an invariant of
    the schedule breaks.
    """
    assert plan.train is not None
    assert plan.evaluate is not None
    index = PlanIndex(plan)
    return _marks(_Marked(index, plan.train, "train")), _marks(_Marked(index, plan.evaluate, "evaluate"))


def _marks(replay: _Marked) -> Marks:
    replay.run()
    return Marks(seconds=replay.now, middle=replay.middle if replay.middle is not None else replay.now, **replay.marks)


class _Marked(Replay):
    """A replay that notes when it runs the operators that send and receive."""

    def __init__(self, world: PlanIndex, phase: Phase, role: Role) -> None:
        super().__init__(world, phase, role, role)
        self.marks: dict[str, float] = {}
        self.middle: float | None = None

    def _replay(self, instruction: Instruction) -> int:
        before = self.now
        workspace = super()._replay(instruction)
        if isinstance(instruction, Run):
            operator = self.declared.layers[instruction.layer][0][instruction.operator]
            if operator.phase == "backward" and self.middle is None:
                self.middle = before
            direction = _direction(operator.kwargs)
            if operator.target == RECEIVE:
                self.marks.setdefault(f"receive_{direction}", before)
            elif operator.target == SEND:
                self.marks[f"send_{direction}"] = self.now
        return workspace


def _direction(options: Mapping[str, object]) -> str:
    return str(options.get("direction", ""))
