"""The data that the page gets about a plan, and about the difference between two. Bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from tightfit.planner.report.diff import ChangeGroup, PlanChange
from tightfit.planner.service.wire.schema import DIGEST, Digest, ResponseBody, example_of

SORT = {
    "kind": "activation",
    "before": "recomputed",
    "after": "kept",
    "bytes": 3145728,
    "compute_seconds": -0.004,
    "transfer_seconds": 0.0,
    "moved_bytes": 0,
}


class KindName(ResponseBody):
    name: str
    label: str


class MemoryPart(KindName):
    bytes: int


class Series(ResponseBody):
    """Memory over the step in slices: each shows its fullest moment."""

    seconds: float = Field(description="of the step")
    starts: list[float]
    ends: list[float]
    total: list[int] = Field(description="bytes in every slice")
    peak: int = Field(description="the slice with the most in use")
    sizes: list[list[int]] = Field(description="bytes, a list over the slices for each of `kinds`")
    kinds: list[KindName] = Field(description="in stacking order")


class PeakShown(ResponseBody):
    """The fullest moment of the training step, and the instruction that sets it."""

    text: str = Field(examples=["model.layers.11: mlp (backward)"])
    instruction: int
    bytes: int = Field(description="the process at that moment")
    parts: list[MemoryPart] = Field(description="add up to `bytes`")
    tensors: list[tuple[str, int]] = Field(description="the largest resident there")


class LayerShown(ResponseBody):
    """A layer, or an operator of a bare graph."""

    name: str
    program: str
    forward_seconds: float
    backward_seconds: float
    decisions: dict[str, dict[str, int]] = Field(
        description="activations, weights, states -> decision -> bytes", examples=[{"weights": {"streamed": 4194304}}]
    )


class ChannelShown(ResponseBody):
    name: str = Field(examples=["read"])
    seconds: float
    share: float = Field(description="of the step")
    bytes: int


class PlanView(ResponseBody):
    """A plan, folded to what a person looks at. What a plan without a schedule lacks is null or empty."""

    model_config = example_of(
        plan=DIGEST,
        model="SmolLM2-135M",
        about="LoRA rank 8, batch 16, sequence 64, bfloat16",
        summary={"status": "infeasible", "budget_bytes": 104857600, "minimum_budget_bytes": 200540160},
        plain=["It does not fit 100.0 MiB: the smallest budget that is enough is 191.3 MiB, 91.3 MiB more."],
        sentences=["the smallest budget that fits is 191.3 MiB, 91.3 MiB more than 100.0 MiB"],
        not_runnable="the plan has no schedule: its budget is too small; plan again with more memory",
    )

    plan: Digest
    model: str
    about: str
    summary: dict[str, Any]
    plain: list[str] = Field(description="what happens, what limits, how near to the best it is; a sentence each")
    sentences: list[str] = Field(description="the same in the planner's own words")
    not_runnable: str | None = Field(
        None, description="why the plan cannot be run on the service's machine; null: it can"
    )
    timeline: Series | None = None
    peak: PeakShown | None = None
    layers: list[LayerShown] = []
    channels: list[ChannelShown] = []


class StepPeak(ResponseBody):
    instruction: int = Field(description="that sets the peak of the training step")
    bytes: int = Field(description="of the run")
    start: int = Field(description="bytes that starting the process reaches, before any step")


class StepInstructions(ResponseBody):
    """Columns with an entry for each instruction."""

    what: list[int] = Field(description="index into `whats`")
    of: list[int] = Field(description="of an operator its layer, an index into `layers`; else an index into `tensors`")
    operator: list[int] = Field(description="index into `operators`; -1: it runs none")
    wait: list[int] = Field(description="ticks for which the cores wait for a transfer, before they take it up")
    work: list[int] = Field(description="ticks for which they are at it")
    workspace: list[int] = Field(description="bytes that it needs while it runs, beside tensors")
    touched: list[int] = Field(description="bytes of the arena in use so far, less those at the instruction before")


class StepTensors(ResponseBody):
    """Columns with an entry for each tensor."""

    name: list[str]
    kind: list[int] = Field(description="index into `kinds`")
    bytes: list[int]
    layer: list[int] = Field(description="index into `layers`; -1: of none")


class StepEvents(ResponseBody):
    instruction: list[int] = Field(
        description="less that of the event before; the start of the step is the instruction -1"
    )
    tensor: list[int]


class StepTransfers(ResponseBody):
    instruction: list[int] = Field(description="that starts it, less that of the transfer before")
    begin: list[int] = Field(description="tick, less that at which the transfer before begins")
    length: list[int] = Field(description="ticks")
    out: list[int] = Field(description="1: written; 0: read")


class StepDecided(ResponseBody):
    """Columns with an entry for each tensor that was decided on or costs something; seconds per step."""

    decisions: list[str]
    tensor: list[int]
    decision: list[int] = Field(description="index into `decisions`; -1: there was nothing to decide")
    recompute: list[float]
    unpack: list[float]
    read: list[float] = Field(description="of the channel; likewise `write`")
    write: list[float]
    make: list[float | None] = Field(
        description="of making it once more, of a weight of unpacking it once; null: cannot be"
    )
    move: list[float | None] = Field(
        description="of moving it there and back, of a weight of reading it once; null: cannot be"
    )


class PlanTimeline(ResponseBody):
    """One training step of a plan, instruction by instruction, as the simulator replays it: of a cycle the first. Columns, in which
    times are ticks of `tick` seconds.
    """

    model_config = example_of(
        model="SmolLM2-135M",
        policy="solver",
        budget=367001600,
        peak={"instruction": 227, "bytes": 366897152, "start": 0},
        seconds=2.5,
        tick=1e-8,
        elsewhere="disk",
        graph=False,
        floor=230686720,
        fixed=0,
        kinds=[{"name": "activation", "label": "activations"}],
        whats=[{"name": "forward", "label": "forward"}],
        layers=["layer0"],
        operators=["mm"],
        instructions={
            "what": [0],
            "of": [0],
            "operator": [0],
            "wait": [0],
            "work": [250000000],
            "workspace": [0],
            "touched": [4194304],
        },
        tensors={"name": ["layer0/mm"], "kind": [0], "bytes": [4194304], "layer": [0]},
        came={"instruction": [0], "tensor": [0]},
        went={"instruction": [], "tensor": []},
        transfers={"instruction": [], "begin": [], "length": [], "out": []},
        decided={
            "decisions": ["kept"],
            "tensor": [0],
            "decision": [0],
            "recompute": [0.0],
            "unpack": [0.0],
            "read": [0.0],
            "write": [0.0],
            "make": [0.002],
            "move": [0.009],
        },
        parts=[{"name": "floor", "label": "Python and PyTorch", "bytes": 230686720}],
    )

    model: str
    policy: str
    budget: int
    peak: StepPeak
    seconds: float = Field(description="of the step; the last transfers may end after the last instruction")
    tick: float
    elsewhere: str = Field(description="where tensors lie that are not in memory")
    graph: bool = Field(description="whether it is a bare graph, which has operators and no layers")
    floor: int = Field(description="bytes of the process before any tensor, the schedule included")
    fixed: int = Field(description="bytes of a bare graph that are always live")
    kinds: list[KindName] = Field(description="in stacking order")
    whats: list[KindName] = Field(description="what instructions do")
    layers: list[str]
    operators: list[str]
    instructions: StepInstructions
    tensors: StepTensors
    came: StepEvents = Field(description="tensors that become resident, in order")
    went: StepEvents = Field(description="tensors that are given up, in order")
    transfers: StepTransfers
    decided: StepDecided
    parts: list[MemoryPart] = Field(description="of the peak of the run, by kind")


@dataclass(frozen=True, kw_only=True)
class TensorChange(PlanChange):
    """A tensor that two plans treat differently, and the layer that it is shown with; seconds are the second plan's less the
    first's, per step.
    """

    layer: str


class Difference(ResponseBody):
    """What the second plan does otherwise."""

    model_config = example_of(
        plans=[{"status": "optimal", "step_seconds": 2.77}, {"status": "optimal", "step_seconds": 2.65}],
        groups=[SORT | {"tensors": 30}],
        changes=[SORT | {"name": "model.layers.0/act", "layer": "model.layers.0"}],
        left_out=29,
    )

    plans: list[dict[str, Any]] = Field(description="both plans in figures")
    groups: list[ChangeGroup] = Field(description="changes of the same kind of tensor between the same two decisions")
    changes: list[TensorChange] = Field(description="largest first")
    left_out: int = Field(description="smaller changes that are not listed")
