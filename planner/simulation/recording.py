"""Records what one training step does when: the same replays as the simulator's, which note each instruction, each
transfer and each tensor as it comes and goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tightfit.planner.instructions import Instruction, Run
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.graph_replay import GraphReplay
from tightfit.planner.simulation.plan_index import PlanIndex
from tightfit.planner.simulation.replay import Replay
from tightfit.runtime.common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RecordedTransfer:
    """A transfer between memory and disk, which an instruction has started; seconds into the step."""

    instruction: int
    begin: float
    end: float


@dataclass(kw_only=True)
class StepRecording:
    """A training step. Lists without another note have an entry for each instruction."""

    begin: list[float] = field(default_factory=list)
    """seconds into the step at which the cores take the instruction up; before, from the end of the one before it, they
    wait for a transfer
    """
    end: list[float] = field(default_factory=list)
    again: list[bool] = field(default_factory=list)
    """whether an operator runs that has run before"""
    workspace: list[int] = field(default_factory=list)
    """bytes that it needs while it runs, beside tensors"""
    touched: list[int] = field(default_factory=list)
    """bytes of the arena that have been in use so far; without an arena those of the tensors"""
    came: list[tuple[int, str]] = field(default_factory=list)
    """(instruction, tensor) in order, for each that becomes resident; those of the step's start have instruction -1"""
    went: list[tuple[int, str]] = field(default_factory=list)
    transfers: list[RecordedTransfer] = field(default_factory=list)
    floor_bytes: int = 0
    """of the process before any tensor, the schedule included"""
    fixed_bytes: int = 0
    """of a bare graph: bytes that are always live"""
    seconds: float = 0.0
    """of the step; the last transfers may end later than the last instruction"""

    def note(self, before: tuple[float, float], after: tuple[float, float], **figures: Any) -> None:
        """`before` and `after` an instruction: the cores' time, and their seconds of waiting so far. They wait before
        they work.
        """
        self.begin.append(before[0] + after[1] - before[1])
        self.end.append(after[0])
        for name, figure in figures.items():
            getattr(self, name).append(figure)


def record(plan: Plan) -> StepRecording:
    """The training step of `plan`, of a cycle its first. Raises InvalidSchedule as `simulate` does, InputError where
    the plan has no schedule.
    """
    if plan.train is None:
        raise InputError(
            f"the plan is {plan.status} and has no schedule; plan with at least {plan.minimum_budget_bytes} bytes"
        )
    if plan.model.is_bare_graph:
        graph = _RecordedGraphReplay(plan, plan.train.instructions)
        graph.run()
        graph.recording.seconds = graph.now
        return graph.recording
    step = _RecordedReplay(PlanIndex(plan), plan.train, "train", "train")
    step.run()
    step.recording.seconds = step.now
    return step.recording


class _RecordedReplay(Replay):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.recording = StepRecording(floor_bytes=self.floor)

    def _replay(self, instruction: Instruction) -> int:
        before, repeated = (self.now, self.totals.stall), self.totals.recompute
        workspace = super()._replay(instruction)
        again = self.totals.recompute > repeated
        self.recording.note(before, (self.now, self.totals.stall), again=again, workspace=workspace, touched=self.top)
        return workspace

    def _allocate(self, name: str, offset: int) -> None:
        super()._allocate(name, offset)
        self.recording.came.append((self.index, name))

    def _release(self, name: str) -> None:
        super()._release(name)
        self.recording.went.append((self.index, name))

    def _move(self, size: int, *, out: bool) -> float:
        done = super()._move(size, out=out)
        self.recording.transfers.append(RecordedTransfer(instruction=self.index, begin=self.taken_up, end=done))
        return done


class _RecordedGraphReplay(GraphReplay):
    def __init__(self, plan: Plan, instructions: list[Instruction]) -> None:
        super().__init__(plan, instructions)
        self.recording = StepRecording(fixed_bytes=self.fixed)

    def _replay(self, instruction: Instruction) -> None:
        before, repeated = (self.now, self.stall), self.done
        super()._replay(instruction)
        running = isinstance(instruction, Run)
        again = running and self.done == repeated
        workspace = self.operators[instruction.operator].workspace_bytes if isinstance(instruction, Run) else 0
        self.recording.note(before, (self.now, self.stall), again=again, workspace=workspace, touched=self.live_bytes)

    def _hold(self, name: str) -> None:
        super()._hold(name)
        self.recording.came.append((self.index, name))

    def _release(self, name: str) -> None:
        super()._release(name)
        self.recording.went.append((self.index, name))

    def _move(self, verb: str, name: str) -> float:
        done = super()._move(verb, name)
        self.recording.transfers.append(RecordedTransfer(instruction=self.index, begin=self.taken_up, end=done))
        return done
