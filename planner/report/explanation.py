"""The record of what a plan does and why: what sets its peak and fills it, what becomes of its tensors, what it makes
again, how busy cores and disk are, what memory is worth.

`account` counts on the schedule, `tightfit.planner.report.marginal_value` adds the neighbouring budgets. Whatever puts
a plan into words, tables or pictures reads this record beside the plan's own fields: `explain` writes sentences,
`render` tables for the terminal, `view` what pages show, `figures` pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from tightfit.planner.instructions import Run
from tightfit.planner.problem.clipping import accumulate_seconds
from tightfit.planner.problem.step_graph import SUM
from tightfit.planner.report.costs import Cost, CostLedger
from tightfit.planner.report.memory_categories import peak_parts
from tightfit.planner.schedule.multi_layer_recompute import rerun_layers
from tightfit.planner.schema import Phase, Plan, tile_tokens
from tightfit.profiles.models.family import families
from tightfit.profiles.schema import FrozenRecord
from tightfit.runtime.engine.training.adapter import table_slice

LARGEST = 8
"""tensors named at the peak"""
LEAST_TILE = 128
"""tokens; with fewer at a time products take clearly longer for a token"""
BITS_A_WEIGHT = {"4bit": 4.5, "8bit": 8.5, "16bit": 16.0}
"""precision of the frozen weights -> bits that a weight takes, its share of its block's scale included"""
PhaseName = Literal["train", "evaluate", "update"]
Sort = Literal["activations", "weights", "states", "trained"]
SORTS: Mapping[str, Sort] = {
    "activation": "activations",
    "gradient": "activations",
    "weight": "weights",
    "optimizer": "states",
    "trainable": "trained",
}
"""kind of tensor -> the sort that decisions about it are told under"""


class DecidedTensors(FrozenRecord):
    """The tensors of one sort that one decision is about."""

    sort: Sort = Field(description="states are the optimizer's, trained the values of what is trained")
    decision: str = Field(description="kept, recomputed, offloaded, streamed, packed or unpacked")
    tensors: int
    bytes: int
    packed_bytes: int = Field(description="of weights packed in memory or on disk: what they take there; else 0")


class MemoryPart(FrozenRecord):
    """A kind of what fills the memory at the peak."""

    name: str
    label: str = Field(description="its name for people")
    bytes: int


class PeakAccount(FrozenRecord):
    """The instruction that sets the peak, and what the process holds then. The five parts add up to `bytes`.

    Where the start of the process sets the peak (`start_bytes`), the instruction is the one at which the schedules
    reach theirs.
    """

    phase: PhaseName
    instruction: int
    text: str = Field(description="what runs there, in words")
    layer: str | None = Field(description="None where a transfer or an update sets the peak")
    operator: str | None
    bytes: int = Field(description="whole process: the plan's peak_bytes")
    floor_bytes: int = Field(description="Python and PyTorch; on a card its context")
    start_bytes: int = Field(
        0,
        description=(
            "by how much importing Python and PyTorch passes all that follows; 0: something later sets the peak"
        ),
    )
    schedule_bytes: int = Field(description="the plan's instructions in memory")
    tensor_bytes: int = Field(description="the arena: tensors resident at once, and gaps between them")
    workspace_bytes: int = Field(description="the largest transient use of any operator")
    by_kind: dict[str, int] = Field(description="kind of tensor -> bytes resident at the instruction, largest first")
    tensors: dict[str, int] = Field(description="the largest tensors resident there, bytes")


class RecomputedGroup(FrozenRecord):
    """Operators of one kind that run again."""

    layers: int = Field(description="how many layers they belong to")
    program: str = Field(description="the kind of layer")
    operator: str
    runs: int
    seconds: float


class Recomputation(FrozenRecord):
    seconds: float = Field(description="per step; the plan's recompute_seconds")
    share: float = Field(description="of the step")
    tensors: int = Field(description="activations that are dropped and made again")
    bytes: int = Field(description="of these: what keeping them all would take")
    operators: list[RecomputedGroup] = Field(description="by kind of layer and operator, dearest first")
    by_layer: dict[str, float] = Field(description="layer -> seconds, in forward order")
    layer_inputs: int = Field(0, description="of the tensors: those that one layer makes for another")
    layers_twice: int = Field(0, description="layers that go forward again, in runs, before a later one's backward")


class ChannelUse(FrozenRecord):
    name: Literal["compute", "read", "write"]
    seconds: float = Field(description="busy, per step")
    share: float = Field(description="of the step")
    bytes: int = Field(0, description="moved per step")


class OperatorUse(FrozenRecord):
    """What all operators of one kind take in a step, made again or not."""

    operator: str = Field(description="its target")
    runs: int
    seconds: float
    share: float = Field(description="of the step")
    flops: float = Field(description="of the matrix products among them; 0 where there are none")


class MarginalValue(FrozenRecord):
    """A neighbouring budget."""

    change_bytes: int
    budget_bytes: int
    bound_seconds: float | None = Field(
        description="proven by the model: no plan of the class is faster there; None: the model finds no plan there"
    )
    price_seconds: float | None = Field(
        description=(
            "what the change costs (above 0) or saves (below) per step by the model's prices: the bound there less the"
            " bound here"
        )
    )
    step_seconds: float | None = Field(
        None, description="of the plan made there; None: not planned again, or none found"
    )
    status: str | None = Field(None, description="of the plan made there; None: not planned again")


class Remedy(FrozenRecord):
    """A change that makes the smallest budget smaller."""

    change: str
    saves_bytes: int = Field(description="at the instruction that sets the smallest budget; another may take its place")
    field: Literal["tile", "batch", "seq", "lora_rank", "base"] | None = Field(
        None, description="what to change of what is profiled: an option of profiling"
    )
    value: int | str | None = Field(None, description="to what")


class Shortfall(FrozenRecord):
    """Why no plan fits."""

    minimum_budget_bytes: int
    missing_bytes: int
    peak: PeakAccount = Field(description="of the plan with the smallest budget")
    remedies: list[Remedy] = Field(description="largest first")


class Clipping(FrozenRecord):
    """What it takes to clip gradients by the norm of all of them: sums, and updates that wait for the last gradient."""

    max_grad_norm: float
    sum_bytes: int = Field(description="of the sums of gradients, in memory or on disk")
    sum_bytes_on_disk: int
    adding_seconds: float = Field(description="per step: adding gradients to the sums, and squaring these")
    update_seconds: float = Field(description="of the update of all trainables")
    stall_seconds: float = Field(description="of these: the cores wait for the disk")
    read_bytes: int = Field(description="by one update; likewise write_bytes")
    write_bytes: int
    seconds: float = Field(description="per step, of both: the update's are shared by the steps that make one")
    unclipped_seconds: float = Field(
        description=(
            "per step: what updates take that follow right on their gradients in the backward, without transfers"
        )
    )


class Explanation(FrozenRecord):
    """What `plan --json` says under "explanation". Fields that do not apply are null or empty."""

    peak: PeakAccount | None = None
    memory: list[MemoryPart] = Field([], description="what fills the process at its peak, together its peak_bytes")
    decisions: list[DecidedTensors] = Field([], description="what becomes of tensors, by sort and decision")
    recomputation: Recomputation | None = None
    channels: list[ChannelUse] = []
    operators: list[OperatorUse] = Field([], description="of the cores' work, by kind of operator, dearest first")
    waiting_seconds: float = Field(0.0, description="per step: the cores wait for a transfer")
    neighbours: list[MarginalValue] = Field([], description="the budgets beside this one")
    shortfall: Shortfall | None = None
    clipping: Clipping | None = None


def account(plan: Plan) -> Explanation:
    """Peak, recomputation and channels of a plan that has a schedule; empty for one that has none."""
    if plan.train is None:
        return Explanation()
    ledger = CostLedger(plan)
    costs = ledger.costs()
    return Explanation(
        peak=peak_account(plan, ledger),
        memory=[MemoryPart(name=kind.name, label=kind.label, bytes=size) for kind, size in peak_parts(plan)],
        decisions=_decisions(ledger, costs),
        recomputation=_recomputation(plan, plan.train, ledger, costs),
        channels=_channels(plan.train, costs),
        operators=_operators(plan.train, ledger),
        waiting_seconds=plan.train.stall_seconds,
        clipping=_clipping(plan),
    )


def _decisions(ledger: CostLedger, costs: dict[str, Cost]) -> list[DecidedTensors]:
    counts: dict[tuple[Sort, str], list[tuple[int, int]]] = defaultdict(list)
    for name, cost in costs.items():
        if cost.decision is not None and cost.kind in SORTS:
            packed = cost.decision in ("packed", "streamed") and name in ledger.index.tensors
            counts[SORTS[cost.kind], cost.decision].append(
                (cost.bytes, ledger.index.tensors[name].packed_bytes if packed else 0)
            )
    return [
        DecidedTensors(
            sort=sort,
            decision=decision,
            tensors=len(sizes),
            bytes=sum(size for size, _ in sizes),
            packed_bytes=sum(packed for _, packed in sizes),
        )
        for (sort, decision), sizes in counts.items()
    ]


def _clipping(plan: Plan) -> Clipping | None:
    if plan.update is None or plan.max_grad_norm is None:
        return None
    trained = [tensor for tensor in plan.tensors if tensor.kind == "trainable"]
    adding = sum(accumulate_seconds(tensor, plan.optimizer) for tensor in trained)
    return Clipping(
        max_grad_norm=plan.max_grad_norm,
        sum_bytes=sum(tensor.bytes for tensor in trained),
        sum_bytes_on_disk=sum(tensor.bytes for tensor in trained if f"{SUM}{tensor.name}" not in plan.resident),
        adding_seconds=adding,
        update_seconds=plan.update.seconds,
        stall_seconds=plan.update.stall_seconds,
        read_bytes=plan.update.read_bytes,
        write_bytes=plan.update.write_bytes,
        seconds=adding + plan.update.seconds / plan.accumulate,
        unclipped_seconds=sum(tensor.update_seconds for tensor in trained),
    )


def shortfall(plan: Plan, smallest: Plan) -> Explanation:
    """Why `plan` has no schedule, from the plan of the smallest budget of the same profile and policy."""
    ledger = CostLedger(smallest)
    peak = peak_account(smallest, ledger)
    return Explanation(
        shortfall=Shortfall(
            minimum_budget_bytes=smallest.peak_bytes,
            missing_bytes=smallest.peak_bytes - plan.budget_bytes,
            peak=peak,
            remedies=_remedies(smallest, ledger, peak),
        )
    )


def has_phases(plan: Plan) -> bool:
    """Whether the plan's step has a forward and a backward; only bare graphs may have no such division."""
    return not plan.model.is_bare_graph or any(
        operator.phase == "backward" for program in plan.programs for operator in program.operators
    )


def peak_text(plan: Plan, phase: Phase) -> str:
    """What runs at the peak of one of the plan's schedules, in words; operators of steps without phases are named
    without one.
    """
    text = phase.peak.text
    if has_phases(plan):
        return text
    return text.removesuffix(" (forward)").replace(" (forward again)", " (run again)")


def peak_account(plan: Plan, ledger: CostLedger) -> PeakAccount:
    """What sets the peak of a plan with a schedule."""
    name, phase = _fullest(plan)
    index = phase.peak.instruction
    layer, operator = _runs(phase, index, ledger)
    resident = ledger.resident_at(phase, index)
    by_kind: dict[str, int] = defaultdict(int)
    for tensor, size in resident.items():
        by_kind[ledger.index.tensors[tensor].kind] += size
    largest = sorted(resident.items(), key=lambda item: (-item[1], item[0]))[:LARGEST]
    floor = plan.device.floor.held_bytes
    return PeakAccount(
        phase=name,
        instruction=index,
        text=peak_text(plan, phase),
        layer=layer,
        operator=operator,
        bytes=plan.peak_bytes,
        floor_bytes=floor,
        start_bytes=plan.start_bytes,
        schedule_bytes=plan.peak_bytes - floor - plan.start_bytes - plan.arena_bytes - plan.workspace_bytes,
        tensor_bytes=plan.arena_bytes,
        workspace_bytes=plan.workspace_bytes,
        by_kind=dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        tensors=dict(largest),
    )


def _runs(phase: Phase, instruction: int, ledger: CostLedger) -> tuple[str | None, str | None]:
    """Layer and operator that run at the instruction, where it runs any."""
    if 0 <= instruction < len(phase.instructions):
        match phase.instructions[instruction]:
            case Run(layer, operator):
                return layer, ledger.index.operators[layer][operator].target
    return None, None


def _recomputation(plan: Plan, train: Phase, ledger: CostLedger, costs: dict[str, Cost]) -> Recomputation:
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    by_layer: dict[str, float] = defaultdict(float)
    for layer, position in ledger.again():
        operator = ledger.index.operators[layer][position]
        key = (ledger.programs[layer], operator.target)
        groups[key].append(operator.seconds)
        layers[key].add(layer)
        by_layer[layer] += operator.seconds
    dropped = {name: cost.bytes for name, cost in costs.items() if cost.decision == "recomputed"}
    bound_names = {name for layer in plan.layers for name in layer.bindings.values()}
    operators = [
        RecomputedGroup(layers=len(layers[key]), program=key[0], operator=key[1], runs=len(times), seconds=sum(times))
        for key, times in groups.items()
    ]
    return Recomputation(
        seconds=train.recompute_seconds,
        share=_share(train.recompute_seconds, train),
        tensors=len(dropped),
        bytes=sum(dropped.values()),
        operators=sorted(operators, key=lambda group: -group.seconds),
        by_layer={name: by_layer[name] for name in ledger.programs if name in by_layer},
        layer_inputs=len(bound_names & dropped.keys()),
        layers_twice=0 if plan.model.is_bare_graph else len(rerun_layers(plan)),
    )


def _channels(train: Phase, costs: dict[str, Cost]) -> list[ChannelUse]:
    compute = train.compute_seconds + train.recompute_seconds + train.unpack_seconds
    read = sum(cost.read_seconds for cost in costs.values())
    write = sum(cost.write_seconds for cost in costs.values())
    return [
        ChannelUse(name="compute", seconds=compute, share=_share(compute, train)),
        ChannelUse(name="read", seconds=read, share=_share(read, train), bytes=train.read_bytes),
        ChannelUse(name="write", seconds=write, share=_share(write, train), bytes=train.write_bytes),
    ]


def _operators(train: Phase, ledger: CostLedger) -> list[OperatorUse]:
    found: dict[str, tuple[int, float, float]] = {}
    for operator in ledger.ran():
        runs, seconds, flops = found.get(operator.target, (0, 0.0, 0.0))
        found[operator.target] = runs + 1, seconds + operator.seconds, flops + operator.flops
    uses = [
        OperatorUse(operator=target, runs=runs, seconds=seconds, share=_share(seconds, train), flops=flops)
        for target, (runs, seconds, flops) in found.items()
    ]
    return sorted(uses, key=lambda use: (-use.seconds, use.operator))


def _fullest(plan: Plan) -> tuple[PhaseName, Phase]:
    """The schedule that sets the peak of a plan that has one."""
    phases: list[tuple[PhaseName, Phase | None]] = [
        ("train", max(plan.steps, key=lambda step: step.peak_bytes)),
        ("evaluate", plan.evaluate),
        ("update", plan.update),
    ]
    return max(((name, phase) for name, phase in phases if phase is not None), key=lambda named: named[1].peak_bytes)


def _share(seconds: float, train: Phase) -> float:
    return seconds / train.seconds if train.seconds else 0.0


def _remedies(plan: Plan, ledger: CostLedger, peak: PeakAccount) -> list[Remedy]:
    """Estimates of what half the tile, half the batch, half the sequence, half the adapter's rank, or frozen weights in
    4 bits would save at the peak; a tile of half the tokens keeps some of these bytes, as keys and values of the
    others.
    """
    _, phase = _fullest(plan)
    trained = set(ledger.index.of_kind("trainable"))
    by_tokens = by_rank = packed = 0
    for name, size in ledger.resident_at(phase, peak.instruction).items():
        kind = ledger.index.tensors[name].kind
        if kind in ("trainable", "optimizer") or name.removeprefix("grad:") in trained:
            same_at_any_rank = name.endswith(".lora_magnitude_vector.weight") or table_slice(name.rpartition(":")[2])
            by_rank += 0 if same_at_any_rank else size
        elif kind in ("activation", "gradient", "batch"):
            by_tokens += size
        elif kind == "packed":
            packed += size
    rank = int((plan.model.lora or {}).get("rank", 1))
    remedies = []
    halves: tuple[tuple[Literal["tile", "batch", "seq", "lora_rank"], int, int, str], ...] = (
        ("tile", _tile_to_halve(plan), by_tokens, "tiles of {} tokens"),
        ("batch", plan.batch, by_tokens, "a batch of {}"),
        ("seq", plan.seq or 1, by_tokens, "a sequence of {} tokens"),
        ("lora_rank", rank, by_rank, "a LoRA rank of {}"),
    )
    for field, amount, size, phrase in halves:
        halved = amount // 2
        saved = size * (amount - halved) // amount if amount > 1 else 0
        if saved:
            change = f"{phrase.format(halved)} instead of {amount}"
            remedies.append(Remedy(change=change, saves_bytes=saved, field=field, value=halved))
    base = plan.model.base
    if base in BITS_A_WEIGHT and (saved := int(packed * (1 - BITS_A_WEIGHT["4bit"] / BITS_A_WEIGHT[base]))):
        change = f"frozen weights in 4 bits instead of {base.removesuffix('bit')}"
        remedies.append(Remedy(change=change, saves_bytes=saved, field="base", value="4bit"))
    return sorted(remedies, key=lambda remedy: -remedy.saves_bytes)


def _tile_to_halve(plan: Plan) -> int:
    """Tokens that go through a layer at a time, where half as many may: whole samples or equal parts of one; else 0."""
    model, seq = plan.model, plan.seq or 1
    of_transformers = model.config.get("model_type") not in families()
    dropout = (model.lora or {}).get("lora_dropout")
    if model.kind != "decoder" or of_transformers or model.preference is not None or dropout:
        return 0
    tokens = tile_tokens(plan)
    half = tokens // 2
    return tokens if half >= LEAST_TILE and tokens == 2 * half and (half % seq == 0 or seq % half == 0) else 0
