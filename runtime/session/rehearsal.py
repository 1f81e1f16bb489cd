"""Carries a plan out for a few steps on made-up data, before it is trusted, and learns from what differs.

`rehearsed` makes a plan, rehearses it, and makes it anew from the corrected figures (`tightfit.profiles.learned`) until prediction
and run agree. Steps are timed instruction by instruction (`tightfit.runtime.engine.training.step_trace`); the peak is the kernel's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tightfit.planner.instructions import Accumulate, Fetch, Instruction, Read, Run, Spill, Unpack, Update
from tightfit.planner.plan_result import sealed
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.schema import MEZO, Phase, Plan
from tightfit.planner.search_options import PlanOptions
from tightfit.planner.simulation.plan_index import PlanIndex
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.learned import (
    ABOVE,
    KeptRehearsal,
    LearnedFigures,
    Rehearsal,
    corrected,
    figures_id,
    load_learned,
    save_learned,
    spread_bytes,
    update_kind,
)
from tightfit.profiles.measuring.cpu_load import OtherPrograms, crowded
from tightfit.profiles.measuring.worker import typical
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.schema import EXCHANGE, MOBILLM, Channel, Profile
from tightfit.runtime.common.errors import CapError, InputError, RunError, TightfitError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.strict_json import read_json
from tightfit.runtime.common.units import format_seconds, format_size
from tightfit.runtime.engine.training.job import passes_messages
from tightfit.runtime.engine.training.step_trace import INSTRUCTIONS, TRANSFERS
from tightfit.runtime.session.admission import check_machine
from tightfit.runtime.session.launch import prepared
from tightfit.runtime.session.options import RunOptions
from tightfit.runtime.supervision.spare_memory import free_memory
from tightfit.runtime.supervision.supervisor import Stages, supervise
from tightfit.runtime.supervision.training_process import RunOrder

ROUNDS, MOST_ROUNDS = 2, 6
"""the most rehearsals of one call: until predicted and measured seconds agree; until no plan holds more than it predicts"""
TOLERANCE = {"decoder": 0.05, "module": 0.10}
"""share of a step by which prediction and run may differ"""
TRACED = 3
"""steps that are timed, after the first, which faults memory in and builds kernels"""
ROOM = (0.25, 64 << 20)
"""Share and bytes by which a rehearsal's cap is above the budget, so that a plan which holds too much can be measured."""
TAKEN_BACK = 0.1
"""Share of a cgroup's limit that may be counted as used and is none the less free: page cache in use, which the kernel takes back."""
FEWEST_TRANSFERS = 8
"""of a direction, below which its figures stay as they were measured"""
SCALES = (0.1, 10.0)
"""smallest and largest factor of a figure that one rehearsal teaches"""
ANEW = "planned anew with what that taught"
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RehearsedPlan:
    """A plan, and what its rehearsals found: `lines` of text."""

    plan: Plan
    lines: list[str]
    interrupted: bool = False
    """whether Ctrl-C ended a rehearsal, so that the plan is the last one made"""
    first: Rehearsal | None = None
    """of the plan that was made before this call learned anything"""


def why_not(plan: Plan) -> str | None:
    """Why a plan is not rehearsed, in words; None: it can be."""
    if plan.train is None:
        return "it has no schedule"
    if plan.optimizer.get("name") in {EXCHANGE, MOBILLM} or passes_messages(plan.programs):
        return "it is one part of a fleet"
    try:
        check_machine(plan)
    except InputError as error:
        return str(error).split(";", 1)[0]
    return None


@keywords_of(PlanOptions)
def rehearse(profile: Profile, budget_bytes: int, options: PlanOptions) -> Plan:
    """As `tightfit.planner.plan.plan`, on the machine that the profile was measured on: the plan runs for a few steps on random data,
    and is made anew with the figures measured there. Its `rehearsal` has them; None: it could not be rehearsed.
    """
    from tightfit.planner.plan import planner_of

    return rehearsed(
        profile,
        lambda step: chosen(step, options.optimizer, options.max_grad_norm, LearnedFigures()),
        lambda step: planner_of(step).plan(
            budget_bytes,
            policy=options.policy,
            time_limit=options.time_limit,
            gap=options.gap,
            progress=options.progress,
        ),
    ).plan


def rehearsed(
    profile: Profile,
    step_of: Callable[[Profile], Profile],
    make: Callable[[Profile], Plan],
    *,
    go_on: Callable[[], bool] = lambda: True,
    tell: Callable[[str], None] = lambda line: None,
    showing: Callable[[], AbstractContextManager[Stages | None]] = nullcontext,
) -> RehearsedPlan:
    """The plan that `make` makes of the profile with all corrections that rehearsals have taught, rehearsed.

    `step_of` gives the profile of the step that is planned, with another optimizer for example. `tell` is called with each line of
    text, and what `showing` opens with the stages of a rehearsal. A plan for which `go_on` returns False is not rehearsed, but made
    with the corrections of earlier rehearsals.

    Raises what `make` raises. A rehearsal that fails leaves the plan as it is and says why.
    """
    identity = figures_id(profile)
    lines, first = [], None
    step = step_of(profile)
    plan = make(corrected(step, load_learned(identity)))

    def note(line: str) -> None:
        lines.append(line)
        tell(line)

    reason = why_not(plan)
    if reason is not None:  # which a plan tells itself: `tightfit.planner.report.explain`
        return RehearsedPlan(plan=plan, lines=[f"not rehearsed: {reason}"])
    for number in range(MOST_ROUNDS):
        if not go_on():
            break
        try:
            with showing() as stages:
                traced = _carry_out(plan, stages)
        except KeyboardInterrupt:
            return RehearsedPlan(plan=plan, lines=lines, interrupted=True)
        except TightfitError as error:
            note(f"not rehearsed: {error}")
            return RehearsedPlan(plan=plan, lines=lines, interrupted=isinstance(error, RunError) and error.interrupted)
        first = first or traced.rehearsal
        plan, trusted = taught(profile, step, plan, traced, number + 1)
        note(rehearsal_summary(traced.rehearsal))
        if trusted:
            break
        note(ANEW)
        try:
            plan = make(corrected(step, load_learned(identity)))
        except KeyboardInterrupt:
            return RehearsedPlan(plan=plan, lines=lines, interrupted=True)
        if plan.train is None:
            break
    return RehearsedPlan(plan=plan, lines=lines, first=first)


def taught(profile: Profile, step: Profile, plan: Plan, traced: TracedRehearsal, rounds: int) -> tuple[Plan, bool]:
    """(the plan with its rehearsal, whether it may be trusted), after the corrections of the profile's figures have taken in what the
    rehearsal teaches. `step` is the profile of the step that was planned; `rounds` counts the rehearsals so far.
    """
    identity = figures_id(profile)
    learned = _learn(load_learned(identity), step, plan, traced)
    save_learned(identity, learned)
    rehearsal = traced.rehearsal
    plan = sealed(plan.model_copy(update={"rehearsal": rehearsal}))
    *earlier, last = learned.rehearsals
    same = [one for one in earlier if _same_bytes(one, last)]
    trusted = _agrees(plan, rehearsal, same) or (rounds >= ROUNDS and _margin(plan, rehearsal, same) >= 0)
    return plan, trusted


def _agrees(plan: Plan, rehearsal: Rehearsal, earlier: Sequence[Rehearsal] = ()) -> bool:
    """Whether a plan may be trusted: its seconds are the run's, and its peak is at least the run's with the spread between runs, but not
    far above (apart from what PyTorch's start adds to it, whose allowance no plan changes). `earlier`: as of `_margin`.
    """
    error = abs(rehearsal.seconds / rehearsal.predicted_seconds - 1.0)
    timely = not rehearsal.judged or error <= TOLERANCE[plan.model.kind]
    margin = _margin(plan, rehearsal, earlier)
    return timely and 0 <= margin <= plan.start_bytes + 2 * ABOVE * rehearsal.predicted_bytes


def _margin(plan: Plan, rehearsal: Rehearsal, earlier: Sequence[Rehearsal] = ()) -> int:
    """Bytes by which the predicted peak is above what a run may hold; below 0 the plan cannot be trusted. `earlier`: rehearsals of plans
    with the same bytes.

    Runs differ by the spread (which a peak that the start sets includes), so that none holds more than the lowest and the spread; where
    rehearsals have differed by more, than the highest and the spread.
    """
    spread = 0 if plan.start_bytes else spread_bytes(plan.model.kind, rehearsal.held_bytes)
    held = [rehearsal.held_bytes, *(one.held_bytes for one in earlier)]
    within = max(held) - min(held) <= spread
    return rehearsal.predicted_bytes - (min(held) if within else max(held)) - spread


def _same_bytes(one: KeptRehearsal, other: KeptRehearsal) -> bool:
    """Whether two rehearsals were of plans with the same bytes, apart from what earlier ones had added."""
    return all(getattr(one, name) == getattr(other, name) for name in ("budget_bytes", "policy", "unlearned_bytes"))


def rehearsal_summary(rehearsal: Rehearsal) -> str:
    seconds = f"a step of {format_seconds(rehearsal.predicted_seconds)} took {format_seconds(rehearsal.seconds)}"
    if not rehearsal.judged:
        seconds += f" beside other programs on {rehearsal.busy_cores:.1f} cores, so seconds are not judged"
    return f"rehearsed: {seconds}; of {format_size(rehearsal.predicted_bytes)} {format_size(rehearsal.held_bytes)} were held"


# --- carrying a plan out -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TracedRehearsal:
    """A rehearsal with its trace."""

    rehearsal: Rehearsal
    phases: list[Phase]
    """the schedules that ran in the traced steps, in their order"""
    busy: list[Seconds]
    """of each schedule, the seconds of every instruction without waiting for the disk"""
    stalled: list[Seconds]
    """of each schedule, the seconds that every instruction waited for the disk"""
    transfers: list[Seconds]
    """of each schedule, [transfers, 2] begin and end, counted from its start"""


def _carry_out(plan: Plan, stages: Stages | None) -> TracedRehearsal:
    """Run a few steps of the plan on random data. Raises what a run raises."""
    folder = rehearsal_folder()
    try:
        load = OtherPrograms()
        with prepared_rehearsal(plan, folder, stages) as ready:
            try:
                supervise(ready, None, stages)
            except CapError:
                return over_cap(plan)
        return traced_rehearsal(plan, folder, load)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rehearsal_folder() -> Path:
    """A new folder for a rehearsal."""
    cache_directory().mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="rehearsal-", dir=cache_directory()))


def _rehearsed_steps(plan: Plan) -> tuple[int, list[int]]:
    """(steps of a rehearsal, the numbers of those that are timed)."""
    steps = -(-(TRACED + 1) // plan.accumulate) * plan.accumulate
    return steps, [number for number in range(2, TRACED + 2) if number <= steps]


def _roomier(plan: Plan, given_back: int) -> Plan:
    """The plan with a cap above its budget, as far as memory is free. Raises RunError where the plan itself has no place."""
    free, memory_text = free_memory(given_back=given_back)
    if free < plan.peak_bytes * (1 - TAKEN_BACK):
        raise RunError(f"{memory_text}, beside which the {format_size(plan.peak_bytes)} of a run have no place")
    extra = max(int(ROOM[0] * plan.budget_bytes), ROOM[1])
    return sealed(plan.model_copy(update={"budget_bytes": min(plan.budget_bytes + extra, max(plan.peak_bytes, free))}))


@contextmanager
def prepared_rehearsal(plan: Plan, folder: Path, stages: Stages | None, given_back: int = 0) -> Iterator[RunOrder]:
    """The order for a few steps of the plan on random data, whose files lie in `folder`, ready to be supervised. `given_back`: bytes
    that this process holds and will not hold beside the rehearsal.
    """
    steps, traced = _rehearsed_steps(plan)
    options = RunOptions(steps=steps, lr=0.0, checkpoint_every=0, keep_checkpoints=1, out=folder / "out", stages=stages)
    with prepared(_roomier(plan, given_back), "random", options, traced_steps=traced) as ready:
        assert isinstance(ready, RunOrder)
        yield ready


def traced_rehearsal(plan: Plan, folder: Path, load: OtherPrograms) -> TracedRehearsal:
    """What a rehearsal has left in `folder`; `load` has counted the other programs since it began."""
    busy_cores = load.taken(plan.device.threads)
    _, traced = _rehearsed_steps(plan)
    phases = [
        phase
        for number in traced
        for phase in (
            plan.steps[(number - 1) % len(plan.steps)],
            *([plan.update] if plan.update and number % plan.accumulate == 0 else []),
        )
    ]
    busy, stalled = _instructions(folder / "out" / INSTRUCTIONS, phases)
    transfers = _transfers(folder / "out" / TRANSFERS, phases)
    report: dict[str, Any] = read_json(folder / "out" / "report.json")
    seconds = sum(float(a.sum() + b.sum()) for a, b in zip(busy, stalled, strict=True)) / len(traced)
    predicted = sum(phase.seconds for phase in phases) / len(traced)
    return TracedRehearsal(
        rehearsal=Rehearsal(
            budget_bytes=plan.budget_bytes,
            policy=plan.policy,
            predicted_seconds=predicted,
            seconds=seconds,
            predicted_bytes=plan.peak_bytes,
            held_bytes=_measured_peak(report, plan),
            busy_cores=busy_cores,
            judged=not crowded(busy_cores, plan.device.threads),
        ),
        phases=phases,
        busy=busy,
        stalled=stalled,
        transfers=transfers,
    )


def _measured_peak(report: dict[str, Any], plan: Plan) -> int:
    """Peak bytes of all processes as from the command line: the training process's as measured, and the supervisor's as profiled, since
    here it is part of this program.
    """
    return int(report["processes"]["training"]["measured"]) + plan.device.floor.supervisor_bytes


def over_cap(plan: Plan) -> TracedRehearsal:
    """The rehearsal of a plan that held even more than its cap, which counts as its peak; no seconds are known."""
    rehearsal = Rehearsal(
        budget_bytes=plan.budget_bytes,
        policy=plan.policy,
        predicted_seconds=plan.step_seconds,
        seconds=plan.step_seconds,
        predicted_bytes=plan.peak_bytes,
        held_bytes=plan.budget_bytes + max(int(ROOM[0] * plan.budget_bytes), ROOM[1]),
        busy_cores=0.0,
        judged=False,
    )
    return TracedRehearsal(rehearsal=rehearsal, phases=[], busy=[], stalled=[], transfers=[])


def _instructions(path: Path, phases: Sequence[Phase]) -> tuple[list[Seconds], list[Seconds]]:
    figures = np.fromfile(path, dtype=np.float32).astype(np.float64).reshape(-1, 2)
    ends = np.cumsum([len(phase.instructions) for phase in phases])
    assert len(figures) == ends[-1], "the trace has another number of instructions than the schedule"
    pieces = np.split(figures, ends[:-1])
    return [piece[:, 0] for piece in pieces], [piece[:, 1] for piece in pieces]


def _transfers(path: Path, phases: Sequence[Phase]) -> list[Seconds]:
    figures = np.fromfile(path, dtype=np.float32).astype(np.float64).reshape(-1, 2)
    counts = [sum(isinstance(move, Read | Spill | Fetch) for move in phase.instructions) for phase in phases]
    return np.split(figures, np.cumsum(counts)[:-1])


# --- learning from it ----------------------------------------------------------------------------------------------


def _learn(learned: LearnedFigures, step: Profile, plan: Plan, traced: TracedRehearsal) -> LearnedFigures:
    """`learned` with what another rehearsal adds, of a plan that was made with `learned`. `step` is the measured profile of the step
    that is planned, without corrections.
    """
    rehearsal = traced.rehearsal
    lacked = rehearsal.held_bytes + spread_bytes(plan.model.kind, rehearsal.held_bytes) - rehearsal.predicted_bytes
    if lacked < 0:
        # Where the start sets the peak, what is held later is predicted to be `start_bytes` less; it was not more than the whole.
        lacked = min(0, lacked + plan.start_bytes)
    added = learned.added_bytes + lacked  # what was added before is part of the prediction
    if added < 0:
        added = min(0, added + int(ABOVE * rehearsal.predicted_bytes))
    first = not learned.rehearsals
    kept = KeptRehearsal(**vars(rehearsal), unlearned_bytes=rehearsal.predicted_bytes - learned.added_bytes)
    update: dict[str, Any] = {
        "added_bytes": added if first else max(added, learned.added_bytes),
        "rehearsals": [*learned.rehearsals, kept],
    }
    if not rehearsal.judged or not traced.phases:
        return learned.model_copy(update=update)
    return _learn_seconds(learned, step, plan, traced).model_copy(update=update)


def _learn_seconds(learned: LearnedFigures, step: Profile, plan: Plan, traced: TracedRehearsal) -> LearnedFigures:
    """`learned` with the seconds of a rehearsal."""
    index = PlanIndex(plan)
    program_of = {layer.name: layer.program for layer in plan.layers}
    seconds_of = {program.name: [operator.seconds for operator in program.operators] for program in plan.programs}
    alone: dict[tuple[str, int], list[float]] = {}
    beside: dict[tuple[str, int], list[float]] = {}
    unpacked, updated = [0.0, 0.0], [0.0, 0.0]
    lost, issued = {"read": 0.0, "write": 0.0}, {"read": 0.0, "write": 0.0}
    moves: dict[str, list[tuple[int, float]]] = {"read": [], "write": []}
    for phase, busy, stalled, transfers in zip(
        traced.phases, traced.busy, traced.stalled, traced.transfers, strict=True
    ):
        channels = [channel for move in phase.instructions if (channel := _channel_name(move)) is not None]
        sizes = [_size(move, index) for move in phase.instructions if _channel_name(move) is not None]
        for channel, size, (begin, end) in zip(channels, sizes, transfers, strict=True):
            moves[channel].append((size, float(end - begin)))
        ends = np.cumsum(busy + stalled)
        overlap = _overlap(ends - busy, ends, transfers)
        for number, instruction in enumerate(phase.instructions):
            seconds = float(busy[number])
            match instruction:
                case Run(layer, position):
                    key = (program_of[layer], position)
                    (beside if overlap[number] > 0 else alone).setdefault(key, []).append(seconds)
                case Unpack(weight):
                    unpacked[0] += seconds
                    unpacked[1] += index.tensors[weight].unpack_seconds
                case Update(trainable):
                    updated[0] += seconds
                    updated[1] += index.update_seconds[trainable]
                case Accumulate(trainable):
                    updated[0] += seconds
                    updated[1] += index.accumulate_seconds[trainable]
                case Read() | Fetch():
                    issued["read"] += seconds
                case Spill():
                    issued["write"] += seconds
    scale = _scale(alone, seconds_of)
    operators = {name: list(figures) for name, figures in learned.operators.items()}
    total = {channel: sum(duration for _, duration in pairs) for channel, pairs in moves.items()}
    for key in {**alone, **beside}:
        name, position = key
        pooled = operators.setdefault(name, [None] * len(seconds_of[name]))
        undisturbed = typical(alone[key]) if key in alone else scale * seconds_of[name][position]
        if key in alone:
            pooled[position] = _pooled(pooled[position], undisturbed, len(alone[key]))
        elif not any(learned.operators.get(name, ())):
            pooled[position] = (undisturbed, 1)
        slowed = sum(beside.get(key, ())) - undisturbed * len(beside.get(key, ()))
        for channel in lost:
            lost[channel] += slowed * total[channel] / max(sum(total.values()), 1e-12)
    result = learned.model_copy(
        update={
            "operators": operators,
            "unpack": learned.unpack * _factor(*unpacked),
            "updates": learned.updates
            | (
                {update_kind(step): learned.updates.get(update_kind(step), 1.0) * _factor(*updated)}
                if plan.optimizer.get("name") != MEZO and plan.accumulate == 1
                else {}
            ),
            "read": _channel(plan.device.read, moves["read"], lost["read"] + issued["read"]),
            "write": _channel(plan.device.write, moves["write"], lost["write"] + issued["write"]),
        }
    )
    return _match_whole_step(result, step, plan, traced)


def _match_whole_step(learned: LearnedFigures, step: Profile, plan: Plan, traced: TracedRehearsal) -> LearnedFigures:
    """`learned` with all operators' seconds scaled so that the predicted step takes as long as the measured one: freeing tensors and the
    interpreter between instructions take time that is no operator's own.
    """
    figures = corrected(step, learned)
    simulation = simulate(
        plan.model_copy(
            update={
                "device": plan.device.model_copy(update={"read": figures.device.read, "write": figures.device.write}),
                "tensors": figures.tensors,
                "programs": _matching_programs(plan, figures),
            }
        )
    )
    phases = {id(old): new for old, new in zip(plan.steps, (simulation.train, *simulation.cycle), strict=True)}
    if plan.update is not None and simulation.update is not None:
        phases[id(plan.update)] = simulation.update
    predicted = sum(phases[id(phase)].seconds for phase in traced.phases)
    computing = sum(phases[id(phase)].compute_seconds + phases[id(phase)].recompute_seconds for phase in traced.phases)
    seconds = sum(float(a.sum() + b.sum()) for a, b in zip(traced.busy, traced.stalled, strict=True))
    if computing <= 0:
        return learned
    factor = min(max((computing + seconds - predicted) / computing, 0.5), 2.0)
    return learned.model_copy(
        update={
            "operators": {
                name: [None if figure is None else (figure[0] * factor, figure[1]) for figure in figures]
                for name, figures in learned.operators.items()
            }
        }
    )


def _matching_programs(plan: Plan, figures: Profile) -> list[Any]:
    """The plan's programs with the operators' seconds of `figures`, where a program of the plan is whole."""
    by_name = {program.name: program for program in figures.programs}
    return [
        by_name[program.name]
        if program.name in by_name and len(by_name[program.name].operators) == len(program.operators)
        else program
        for program in plan.programs
    ]


def _channel_name(instruction: Instruction) -> str | None:
    if isinstance(instruction, Spill):
        return "write"
    return "read" if isinstance(instruction, Read | Fetch) else None


def _size(instruction: Instruction, index: PlanIndex) -> int:
    """Bytes that a transfer moves."""
    if isinstance(instruction, Read):
        return index.tensors[instruction.weight].packed_bytes
    assert isinstance(instruction, Spill | Fetch)
    return index.tensors[instruction.tensor].bytes


def _overlap(begins: Seconds, ends: Seconds, transfers: Seconds) -> Seconds:
    """For each instruction, the seconds during which a transfer was under way. Transfers do not overlap."""
    if not len(transfers):
        return np.zeros_like(begins)
    busy = np.concatenate([[0.0], np.cumsum(transfers[:, 1] - transfers[:, 0])])

    def until(moments: Seconds) -> Seconds:
        started = np.searchsorted(transfers[:, 0], moments, side="right")
        latest = np.maximum(started - 1, 0)
        within = np.minimum(moments, transfers[latest, 1]) - transfers[latest, 0]
        return np.where(started > 0, busy[latest] + within, 0.0)

    return until(ends) - until(begins)


def _scale(alone: dict[tuple[str, int], list[float]], seconds_of: dict[str, list[float]]) -> float:
    """By what factor operators took longer than predicted while no transfer was under way."""
    measured = sum(typical(calls) * len(calls) for calls in alone.values())
    return _factor(measured, sum(seconds_of[name][position] * len(calls) for (name, position), calls in alone.items()))


def _factor(measured: float, predicted: float) -> float:
    if measured <= 0 or predicted <= 0:
        return 1.0
    return min(max(measured / predicted, SCALES[0]), SCALES[1])


def _pooled(earlier: tuple[float, int] | None, seconds: float, calls: int) -> tuple[float, int]:
    """(mean seconds, calls) of earlier and new calls together; the earlier ones count for no more calls than there are new ones."""
    if earlier is None:
        return seconds, calls
    weight = min(earlier[1], calls)
    return (earlier[0] * weight + seconds * calls) / (weight + calls), weight + calls


def _channel(channel: Channel, transfers: Sequence[tuple[int, float]], lost: float) -> Channel:
    """The channel with figures fitted to measured `transfers` of (bytes, seconds), which made the cores lose `lost` seconds in all."""
    if len(transfers) < FEWEST_TRANSFERS:
        return channel
    sizes, seconds = (np.asarray(column, dtype=np.float64) for column in zip(*transfers, strict=True))
    predicted = channel.latency_seconds + sizes / channel.bytes_per_second
    latency, per_byte = channel.latency_seconds, 1.0 / channel.bytes_per_second
    fitted = None
    if sizes.max() > 2 * sizes.min():
        slope, intercept = np.polyfit(sizes, seconds, 1)
        fitted = (intercept, slope) if intercept >= 0 and slope > 0 else None
    if fitted is not None:
        latency, per_byte = float(fitted[0]), float(fitted[1])
    else:
        scale = _factor(float(seconds.sum()), float(predicted.sum()))
        latency, per_byte = latency * scale, per_byte * scale
    cost = len(transfers) * channel.compute_seconds_per_transfer + float(sizes.sum()) * channel.compute_seconds_per_byte
    lost = max(0.0, lost)
    lost_per_transfer, lost_per_byte = lost / len(transfers), 0.0
    if cost > 0:
        lost_per_transfer = channel.compute_seconds_per_transfer * lost / cost
        lost_per_byte = channel.compute_seconds_per_byte * lost / cost
    return channel.model_copy(
        update={
            "latency_seconds": latency,
            "bytes_per_second": 1.0 / per_byte,
            "compute_seconds_per_byte": lost_per_byte,
            "compute_seconds_per_transfer": lost_per_transfer,
            "doubt": None,
        }
    )
