"""What a replay of a plan finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from tightfit.planner.schema import Phase, TimelinePoint


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The figures of a plan, as its replay finds them."""

    train: Phase
    evaluate: Phase | None
    """None for a bare graph"""
    timeline: list[TimelinePoint]
    """memory over the (first) training step"""
    peak_bytes: int
    """predicted VmHWM of the run: import peak, or floor + instructions + arena + workspace"""
    arena_bytes: int
    workspace_bytes: int
    live_bytes: int
    """most bytes of resident tensors at once, below which no arena could be"""
    cycle: list[Phase] = field(default_factory=list)
    """the training steps that follow `train` in a cycle"""
    update: Phase | None = None
    """where gradients are clipped: the update of all trainables"""
    accumulate: int = 1
    """steps that share an update"""

    @property
    def step_seconds(self) -> float:
        """Seconds of a training step, with its share of an update that is apart; of a cycle, their mean."""
        apart = 0.0 if self.update is None else self.update.seconds / self.accumulate
        return sum(phase.seconds for phase in (self.train, *self.cycle)) / (1 + len(self.cycle)) + apart
