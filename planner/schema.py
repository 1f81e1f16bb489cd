"""The plan's data model and JSON form: the decisions for every tensor, the schedule that carries them out, and the
proof.

A schedule is a flat list of instructions. Every instruction that makes a tensor resident carries the arena offset of
each tensor it allocates, so that nothing is left to decide at run time. The planner writes the list, the simulator
replays it and alone states peak and seconds, the runtime executes it.

Tensor names: a weight ``w`` is resident as ``w`` (unpacked) and/or ``packed:w``; a trainable ``p`` has ``p``,
``grad:p`` (as bound by its layer), its optimizer's states (``adam_m:p``, ``adam_v:p``; ``momentum:p``; ``lion_m:p``;
``adafactor_v:p``) and, where an update takes several steps or gradients are clipped, ``grad_sum:p``; anything else is a
global tensor or ``layer/value``.

`tightfit.planner.instructions` says what each instruction does. Where several steps make one update (gradient
accumulation), the steps before the last add their gradients to ``grad_sum:p`` instead of updating.

Where gradients are clipped by the norm of all of them (`max_grad_norm` of `optimizer`), no trainable is updated before
every gradient is known: each step only adds to ``grad_sum:p``, and after the last step of an update the schedule
`update` runs, in which every trainable is updated from its sum.

Where `optimizer` is called ``mezo`` a training step has two forwards and no backward: every trainable is perturbed by
+1 before the first, by -2 before the second, and ``update`` adds epsilon z - rate (l+ - l-) / (2 epsilon) z, which
restores and moves it at once. A cycle has one training schedule per position; step n, counted from 1, runs the schedule
at (n - 1) mod length. A layer in a schedule's `skipped` has no backward operators in it, its trainables no update, and
its output's gradient is passed on as its input's.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema

from tightfit.planner.instructions import Instruction, read_all, write_all
from tightfit.profiles.learned import Rehearsal
from tightfit.profiles.measuring.cpu_load import crowded
from tightfit.profiles.schema import (
    MOBILLM,
    DeviceFigures,
    FrozenRecord,
    Layer,
    Model,
    Optimizer,
    Profile,
    Program,
    Tensor,
)

PLAN_VERSION = 10
FITTING = frozenset({"optimal", "feasible"})
"""those of a plan's states under which it has a schedule"""
MEZO = "mezo"
"""the optimizer of a plan whose gradients are estimated from two forwards"""


def _unbounded(value: Any) -> Any:
    return math.inf if value is None else value


Bound = Annotated[float, BeforeValidator(_unbounded)]
"""Seconds; infinite where nothing fits, which JSON can only write as null."""


Instructions = Annotated[
    list[Instruction],
    PlainValidator(read_all),
    PlainSerializer(write_all, return_type=list[list[Any]]),
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": {}}}),
]
"""typed in memory, arrays in JSON"""


class TimelinePoint(FrozenRecord):
    """Predicted memory after one instruction (or the peak during it)."""

    instruction: int
    seconds: float
    bytes: int = Field(description="whole process, floor included")
    by_kind: dict[str, int] = Field(
        description="floor, weight, packed, trainable, optimizer, activation, gradient, workspace, ..."
    )


class Peak(FrozenRecord):
    instruction: int
    text: str = Field(description="what runs there, in words: layer and operator")
    tensors: dict[str, int] = Field(description="the largest resident tensors there, bytes")


class Phase(FrozenRecord):
    """One schedule with its predicted figures."""

    instructions: Instructions
    seconds: float
    peak_bytes: int
    peak: Peak
    skipped: list[str] = Field([], description="layers whose backward is left out")
    compute_seconds: float = 0.0
    recompute_seconds: float = 0.0
    unpack_seconds: float = 0.0
    stall_seconds: float = 0.0
    read_bytes: int = 0
    write_bytes: int = 0


class Plan(FrozenRecord):
    version: int = PLAN_VERSION
    fingerprint: str
    profile_fingerprint: str
    policy: str = Field(description="solver, or the name of the fixed rule")
    status: Literal["optimal", "feasible", "infeasible", "unknown"] = Field(
        description=(
            "optimal: proven the best of its class, to rounding; feasible: within `gap` of the best; infeasible: proven"
            " that no plan of its class fits; unknown: none was found, and none is proven not to be there. A fixed rule"
            " is feasible where it fits"
        )
    )
    budget_bytes: int
    floor_bytes: int
    peak_bytes: int = Field(description="predicted VmHWM of the run, all phases")
    step_seconds: float = Field(
        description=(
            "by the model: the mean over a cycle, and over the steps that share an update; `expected_seconds` are what"
            " to expect"
        )
    )
    bound_seconds: Bound = Field(description="no plan of this class is faster at this budget")
    any_schedule_bound_seconds: Bound = Field(description="no schedule at all is faster at this budget")
    gap: float = Field(description="(step_seconds - bound_seconds) / step_seconds")
    any_schedule_gap: float
    solve_seconds: float
    deterministic: bool | None = Field(
        None, description="False: the time limit ended the search, another run may find another plan; None: not said"
    )
    ended_by: Literal["proof", "gap", "stalled", "time limit", "interrupt"] | None = Field(
        None,
        description=(
            "what ended the solver's search: the proof that no plan of this class is faster, to rounding; the gap that"
            " was asked for; that it had stopped gaining; the time limit; or Ctrl-C. None: a fixed rule, or not said"
        ),
    )
    minimum_budget_bytes: int | None = Field(None, description="where nothing fits: the smallest budget that does")
    minimum_bound_bytes: int | None = Field(None, description="proven: no plan of this class fits a smaller budget")
    minimum_budget_reason: str | None = None
    model: Model
    batch: int
    seq: int | None = None
    compute_dtype: str
    optimizer: Optimizer
    device: DeviceFigures
    tensors: list[Tensor]
    programs: list[Program]
    layers: list[Layer]
    loss: str
    token_losses: str | None
    decisions: dict[str, str] = Field(description="tensor -> kept, recomputed, offloaded, streamed, packed, unpacked")
    resident: dict[str, int] = Field(
        description="tensors resident across steps -> arena offset (trainables, states, kept weights, constants, batch)"
    )
    arena_bytes: int
    workspace_bytes: int = Field(description="largest transient heap use of any operator")
    train: Phase | None
    cycle: list[Phase] = Field([], description="training schedules of the steps that follow `train` in a cycle")
    evaluate: Phase | None = Field(description="forward only; uses the same arena and resident tensors")
    update: Phase | None = Field(
        None,
        description="where gradients are clipped: the update of all trainables, after the last step that adds to it",
    )
    timeline: list[TimelinePoint] = Field([], description="of `train`")
    rehearsal: Rehearsal | None = Field(
        None,
        description="what a few steps of the plan took and held on the machine that it is for; None: not rehearsed",
    )

    @property
    def fits(self) -> bool:
        """Whether there is a schedule, which fits the budget."""
        return self.status in FITTING

    @property
    def steps(self) -> list[Phase]:
        """The training schedules that successive steps run in turn: one, or those of a cycle; none
        where nothing fits.
        """
        return [] if self.train is None else [self.train, *self.cycle]

    @property
    def accumulate(self) -> int:
        """Number of steps whose gradients make one update."""
        return int(self.optimizer.get("accumulate", 1))

    @property
    def max_grad_norm(self) -> float | None:
        """The norm to which all gradients of an update together are scaled down; None: they are not clipped."""
        return self.optimizer.get("max_grad_norm")

    @property
    def expected_from(self) -> Literal["rehearsal", "model"]:
        """Where `expected_seconds` come from."""
        return "model" if self.rehearsal is None or self.rehearsal.seconds is None else "rehearsal"

    @property
    def expected_seconds(self) -> float:
        """What a step is expected to take: what it took in the plan's rehearsal; else `step_seconds`, the model's
        seconds, by which plans are compared.
        """
        if self.rehearsal is None or self.rehearsal.seconds is None:
            return self.step_seconds
        return self.rehearsal.seconds

    @property
    def busy_cores(self) -> float:
        """Cores that other programs took while `expected_seconds`, or the figures behind them, were measured."""
        if self.rehearsal is None or self.rehearsal.seconds is None:
            return self.device.busy_cores
        return self.rehearsal.busy_cores

    @property
    def busy_machine(self) -> bool:
        """Whether other programs took so much that a step is to be expected to take less on free cores."""
        return crowded(self.busy_cores, self.device.threads)

    @property
    def places_per_step(self) -> int | None:
        """Tokens for which a step's rows have room, padding included; None: not a language model's."""
        return self.batch * self.model.rows_of_sample * self.seq if self.seq else None

    @property
    def beside(self) -> list[Phase]:
        """The schedules that run beside the training steps: of an evaluation, and of the update where it is apart."""
        return [phase for phase in (self.evaluate, self.update) if phase is not None]

    @property
    def start_bytes(self) -> int:
        """By how many bytes the imports at the process's start exceed the most it holds later; 0 where something later
        sets the peak.
        """
        floor = self.device.floor
        schedules = [*self.steps, *self.beside]
        instructions = sum(len(phase.instructions) for phase in schedules)
        later = floor.held_bytes + floor.instruction_bytes * instructions + self.arena_bytes + self.workspace_bytes
        return max(0, min(self.peak_bytes, floor.start_peak_bytes) - max(0, later))

    @property
    def exact(self) -> bool:
        """Whether steps follow the exact gradient, so that every such plan of a profile gives the same results to the
        bit.
        """
        other = self.optimizer.get("name") in {MEZO, MOBILLM}
        return not other and not any(phase.skipped for phase in self.steps)


def tile_tokens(step: Profile | Plan) -> int:
    """Tokens, or samples of a module, that go through a layer at a time."""
    return step.batch * (step.seq or 1) // max(program.tiles for program in step.programs)
