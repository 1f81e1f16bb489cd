"""Carries a plan out for a few steps on made-up data, before it is trusted, and learns from what differs.

`rehearsed` makes a plan, rehearses it, and makes it anew from the corrected figures (`tightfit.profiles.learned`) until prediction
and run agree. Steps are timed instruction by instruction (`tightfit.runtime.engine.training.step_trace`); the peak is the kernel's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tightfit.planner.instructions import Accumulate, Fetch, Instruction, Read, Run, Spill, Unpack, Update
from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import sealed
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.schema import MEZO, Phase, Plan
from tightfit.planner.search_options import PlanOptions
from tightfit.planner.simulation.plan_index import PlanIndex
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.learned import (
    ABOVE,
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
"""rehearsals of one call, at most: to bring the seconds together, and until a plan holds no more than it says"""
TOLERANCE = {"decoder": 0.05, "module": 0.10}
"""share of a step by which prediction and run may differ"""
TRACED = 3
"""steps that are timed, after the first, which faults memory in and builds kernels"""
ROOM = (0.25, 64 << 20)
"""Share and bytes by which the cap of a rehearsal is above the budget, so that it tells how much a plan holds that holds too much."""
FEWEST_TRANSFERS = 8
"""of a direction, below which its figures stay as they were measured"""
SCALES = (0.1, 10.0)
"""smallest and largest factor of a figure that one rehearsal teaches"""
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A plan, and in words what its rehearsals found, a line each."""

    plan: Plan
    said: list[str]
    interrupted: bool = False
    """whether Ctrl-C ended a rehearsal, without which the plan is as it was made"""
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
    """As `tightfit.planner.plan.plan`, on the machine that the profile was measured on: the plan is carried out for a few steps on
    made-up data, and made anew with what that teaches. Its `rehearsal` says what was found; None: it could not be rehearsed.
    """
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
    tell: Callable[[str], None] = lambda words: None,
    showing: Callable[[], AbstractContextManager[Stages | None]] = nullcontext,
) -> Made:
    """The plan that `make` finds for the profile with all that rehearsals have taught, rehearsed.

    `step_of` gives the profile of the step that is planned, with another optimizer for example. `tell` is called with each line as
    it is found, and the stages of a rehearsal are told to what `showing` opens. Where `go_on` says no after a plan was made, that plan is not rehearsed, but profits from earlier rehearsals.

    Raises what `make` raises. A rehearsal that fails leaves the plan as it is and says why.
    """
    identity = figures_id(profile)
    learned, said, first = load_learned(identity), [], None
    step = step_of(profile)
    plan = make(corrected(step, learned))

    def told(words: str) -> None:
        said.append(words)
        tell(words)

    reason = why_not(plan)
    if reason is not None:  # which a plan tells itself: `tightfit.planner.report.explain`
        return Made(plan=plan, said=[f"not rehearsed: {reason}"])
    for turn in range(MOST_ROUNDS):
        if not go_on():
            break
        try:
            with showing() as stages:
                taken = _carried_out(plan, stages)
        except KeyboardInterrupt:
            return Made(plan=plan, said=said, interrupted=True)
        except TightfitError as error:
            told(f"not rehearsed: {error}")
            return Made(plan=plan, said=said, interrupted=isinstance(error, RunError) and error.interrupted)
        first = first or taken.rehearsal
        learned = _with(learned, step, plan, taken)
        save_learned(identity, learned)
        plan = sealed(plan.model_copy(update={"rehearsal": taken.rehearsal}))
        told(_words(taken.rehearsal))
        if _agrees(plan, taken.rehearsal) or (turn + 1 >= ROUNDS and _left(plan, taken.rehearsal) >= 0):
            break
        told("planned anew with what that taught")
        try:
            plan = make(corrected(step, learned))
        except KeyboardInterrupt:
            return Made(plan=plan, said=said, interrupted=True)
        if plan.train is None:
            break
    return Made(plan=plan, said=said, first=first)


def _agrees(plan: Plan, rehearsal: Rehearsal) -> bool:
    """Whether a plan may be trusted: its seconds are those of the run, its peak holds the run with the spread of starts and
    is not far above, unless the start sets it, whose allowance no plan changes.
    """
    apart = abs(rehearsal.seconds / rehearsal.predicted_seconds - 1.0)
    timely = not rehearsal.judged or apart <= TOLERANCE[plan.model.kind]
    left = _left(plan, rehearsal)
    return timely and left >= 0 and (plan.start_bytes > 0 or left <= 2 * ABOVE * rehearsal.predicted_bytes)


def _left(plan: Plan, rehearsal: Rehearsal) -> int:
    """Bytes that the peak leaves beside what was held and the spread of starts, which a peak that the start sets has in it already;
    below 0 the plan cannot be trusted.
    """
    spread = 0 if plan.start_bytes else spread_bytes(plan.model.kind, rehearsal.held_bytes)
    return rehearsal.predicted_bytes - rehearsal.held_bytes - spread


def _words(rehearsal: Rehearsal) -> str:
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
    own: list[Seconds]
    """of each, the seconds of every instruction without waiting for the disk"""
    stalled: list[Seconds]
    transfers: list[Seconds]
    """of each, [transfers, 2] begin and end, counted from the schedule's start"""


def _carried_out(plan: Plan, stages: Stages | None) -> TracedRehearsal:
    """Run a few steps of the plan on random data. Raises what a run raises."""
    phases_of = {number: plan.steps[(number - 1) % len(plan.steps)] for number in range(1, TRACED + 2)}
    steps = -(-(TRACED + 1) // plan.accumulate) * plan.accumulate
    traced = [number for number in phases_of if 1 < number <= steps]
    free, what = free_memory()
    if free < plan.peak_bytes:
        raise RunError(f"{what}, beside which the {format_size(plan.peak_bytes)} of a run have no place")
    room = max(int(ROOM[0] * plan.budget_bytes), ROOM[1])
    budget = min(plan.budget_bytes + room, max(plan.peak_bytes, free))
    roomy = sealed(plan.model_copy(update={"budget_bytes": budget}))
    cache_directory().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=cache_directory()))
    try:
        others = OtherPrograms()
        options = RunOptions(
            steps=steps, lr=0.0, checkpoint_every=0, keep_checkpoints=1, out=folder / "out", stages=stages
        )
        with prepared(roomy, "random", options, traced_steps=traced) as ready:
            assert isinstance(ready, RunOrder)
            try:
                report = supervise(ready, None, stages)
            except CapError:
                return _beyond(plan, roomy)
        busy = others.taken(plan.device.threads)
        phases = [
            phase
            for number in traced
            for phase in (phases_of[number], *([plan.update] if plan.update and number % plan.accumulate == 0 else []))
        ]
        own, stalled = _instructions(folder / "out" / INSTRUCTIONS, phases)
        transfers = _transfers(folder / "out" / TRANSFERS, phases)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = sum(float(a.sum() + b.sum()) for a, b in zip(own, stalled, strict=True)) / len(traced)
    predicted = sum(phase.seconds for phase in phases) / len(traced)
    return TracedRehearsal(
        rehearsal=Rehearsal(
            budget_bytes=plan.budget_bytes,
            policy=plan.policy,
            predicted_seconds=predicted,
            seconds=seconds,
            predicted_bytes=plan.peak_bytes,
            held_bytes=_held(report, plan),
            busy_cores=busy,
            judged=not crowded(busy, plan.device.threads),
        ),
        phases=phases,
        own=own,
        stalled=stalled,
        transfers=transfers,
    )


def _held(report: dict[str, Any], plan: Plan) -> int:
    """Peak bytes of all processes as from the command line: of the training process as measured, of the supervisor, which here is
    part of this program, as the profile has it.
    """
    return int(report["processes"]["training"]["measured"]) + plan.device.floor.supervisor_bytes


def _beyond(plan: Plan, roomy: Plan) -> TracedRehearsal:
    """What is known of a plan that held even more than the cap of its rehearsal."""
    rehearsal = Rehearsal(
        budget_bytes=plan.budget_bytes,
        policy=plan.policy,
        predicted_seconds=plan.step_seconds,
        seconds=plan.step_seconds,
        predicted_bytes=plan.peak_bytes,
        held_bytes=roomy.budget_bytes,
        busy_cores=0.0,
        judged=False,
    )
    return TracedRehearsal(rehearsal=rehearsal, phases=[], own=[], stalled=[], transfers=[])


def _instructions(path: Path, phases: Sequence[Phase]) -> tuple[list[Seconds], list[Seconds]]:
    figures = np.fromfile(path, dtype=np.float32).astype(np.float64).reshape(-1, 2)
    ends = np.cumsum([len(phase.instructions) for phase in phases])
    assert len(figures) == ends[-1], "the trace has another number of instructions than the schedule"
    pieces = np.split(figures, ends[:-1])
    return [piece[:, 0] for piece in pieces], [piece[:, 1] for piece in pieces]


def _transfers(path: Path, phases: Sequence[Phase]) -> list[Seconds]:
    figures = np.fromfile(path, dtype=np.float32).astype(np.float64).reshape(-1, 2)
    counts = [sum(isinstance(one, Read | Spill | Fetch) for one in phase.instructions) for phase in phases]
    return np.split(figures, np.cumsum(counts)[:-1])


# --- learning from it ----------------------------------------------------------------------------------------------


def _with(learned: LearnedFigures, step: Profile, plan: Plan, taken: TracedRehearsal) -> LearnedFigures:
    """What is known after another rehearsal of a plan that was made with what was known before it. `step`: the profile as it was
    measured, of the step that is planned.
    """
    rehearsal = taken.rehearsal
    # What was added before is part of the prediction.
    spread = spread_bytes(plan.model.kind, rehearsal.held_bytes)
    needed = rehearsal.held_bytes + spread - (rehearsal.predicted_bytes - learned.added_bytes)
    if plan.start_bytes and needed < learned.added_bytes:
        needed = learned.added_bytes  # the start sets the peak: what is held later is not known
    if needed < 0:
        needed = min(0, needed + int(ABOVE * rehearsal.predicted_bytes))
    first = not learned.rehearsals
    update: dict[str, Any] = {
        "added_bytes": needed if first else max(needed, learned.added_bytes),
        "rehearsals": [*learned.rehearsals, rehearsal],
    }
    if not rehearsal.judged or not taken.phases:
        return learned.model_copy(update=update)
    return _timed(learned, step, plan, taken).model_copy(update=update)


def _timed(learned: LearnedFigures, step: Profile, plan: Plan, taken: TracedRehearsal) -> LearnedFigures:
    """`learned` with the seconds of a rehearsal."""
    index = PlanIndex(plan)
    program_of = {layer.name: layer.program for layer in plan.layers}
    seconds_of = {program.name: [operator.seconds for operator in program.operators] for program in plan.programs}
    alone: dict[tuple[str, int], list[float]] = {}
    beside: dict[tuple[str, int], list[float]] = {}
    unpacked, updated = [0.0, 0.0], [0.0, 0.0]
    lost, issued = {"read": 0.0, "write": 0.0}, {"read": 0.0, "write": 0.0}
    moved: dict[str, list[tuple[int, float]]] = {"read": [], "write": []}
    for phase, own, stalled, transfers in zip(taken.phases, taken.own, taken.stalled, taken.transfers, strict=True):
        ways = [way for one in phase.instructions if (way := _way(one)) is not None]
        sizes = [_size(one, index) for one in phase.instructions if _way(one) is not None]
        for way, size, (begin, end) in zip(ways, sizes, transfers, strict=True):
            moved[way].append((size, float(end - begin)))
        ends = np.cumsum(own + stalled)
        overlap = _overlap(ends - own, ends, transfers)
        for number, one in enumerate(phase.instructions):
            spent = float(own[number])
            match one:
                case Run(layer, position):
                    key = (program_of[layer], position)
                    (beside if overlap[number] > 0 else alone).setdefault(key, []).append(spent)
                case Unpack(weight):
                    unpacked[0] += spent
                    unpacked[1] += index.tensors[weight].unpack_seconds
                case Update(trainable):
                    updated[0] += spent
                    updated[1] += index.update_seconds[trainable]
                case Accumulate(trainable):
                    updated[0] += spent
                    updated[1] += index.accumulate_seconds[trainable]
                case Read() | Fetch():
                    issued["read"] += spent
                case Spill():
                    issued["write"] += spent
    scale = _scale(alone, seconds_of)
    operators = {name: list(figures) for name, figures in learned.operators.items()}
    total = {way: sum(seconds for _, seconds in transfers_) for way, transfers_ in moved.items()}
    for key in {**alone, **beside}:
        name, position = key
        known = operators.setdefault(name, [None] * len(seconds_of[name]))
        clean = typical(alone[key]) if key in alone else scale * seconds_of[name][position]
        if key in alone:
            known[position] = _pooled(known[position], clean, len(alone[key]))
        elif not any(learned.operators.get(name, ())):
            known[position] = (clean, 1)
        slowed = sum(beside.get(key, ())) - clean * len(beside.get(key, ()))
        for way in lost:
            lost[way] += slowed * total[way] / max(sum(total.values()), 1e-12)
    made = learned.model_copy(
        update={
            "operators": operators,
            "unpack": learned.unpack * _factor(*unpacked),
            "updates": learned.updates
            | (
                {update_kind(step): learned.updates.get(update_kind(step), 1.0) * _factor(*updated)}
                if plan.optimizer.get("name") != MEZO and plan.accumulate == 1
                else {}
            ),
            "read": _channel(plan.device.read, moved["read"], lost["read"] + issued["read"]),
            "write": _channel(plan.device.write, moved["write"], lost["write"] + issued["write"]),
        }
    )
    return _closed(made, step, plan, taken)


def _closed(made: LearnedFigures, step: Profile, plan: Plan, taken: TracedRehearsal) -> LearnedFigures:
    """`made` with operators that are as much longer or shorter as the seconds of the whole step still differ: freeing, and the
    interpreter between instructions, are no operator's own.
    """
    figures = corrected(step, made)
    again = simulate(
        plan.model_copy(
            update={
                "device": plan.device.model_copy(update={"read": figures.device.read, "write": figures.device.write}),
                "tensors": figures.tensors,
                "programs": _like(plan, figures),
            }
        )
    )
    phases = {id(old): new for old, new in zip(plan.steps, (again.train, *again.cycle), strict=True)}
    if plan.update is not None and again.update is not None:
        phases[id(plan.update)] = again.update
    predicted = sum(phases[id(phase)].seconds for phase in taken.phases)
    computing = sum(phases[id(phase)].compute_seconds + phases[id(phase)].recompute_seconds for phase in taken.phases)
    seconds = sum(float(a.sum() + b.sum()) for a, b in zip(taken.own, taken.stalled, strict=True))
    if computing <= 0:
        return made
    factor = min(max((computing + seconds - predicted) / computing, 0.5), 2.0)
    return made.model_copy(
        update={
            "operators": {
                name: [None if one is None else (one[0] * factor, one[1]) for one in figures]
                for name, figures in made.operators.items()
            }
        }
    )


def _like(plan: Plan, figures: Profile) -> list[Any]:
    """The plan's programs with the seconds of those of `figures`; a plan may run a part of them."""
    found = {program.name: program for program in figures.programs}
    return [
        found[program.name]
        if program.name in found and len(found[program.name].operators) == len(program.operators)
        else program
        for program in plan.programs
    ]


def _way(instruction: Instruction) -> str | None:
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
    """Of each instruction the seconds during which a transfer was under way. Transfers follow one another."""
    if not len(transfers):
        return np.zeros_like(begins)
    busy = np.concatenate([[0.0], np.cumsum(transfers[:, 1] - transfers[:, 0])])

    def until(moments: Seconds) -> Seconds:
        place = np.searchsorted(transfers[:, 0], moments, side="right")
        before = np.maximum(place - 1, 0)
        within = np.minimum(moments, transfers[before, 1]) - transfers[before, 0]
        return np.where(place > 0, busy[before] + within, 0.0)

    return until(ends) - until(begins)


def _scale(alone: dict[tuple[str, int], list[float]], seconds_of: dict[str, list[float]]) -> float:
    """By how much operators took longer than predicted where no transfer was under way."""
    taken = sum(typical(calls) * len(calls) for calls in alone.values())
    return _factor(taken, sum(seconds_of[name][at] * len(calls) for (name, at), calls in alone.items()))


def _factor(taken: float, predicted: float) -> float:
    if taken <= 0 or predicted <= 0:
        return 1.0
    return min(max(taken / predicted, SCALES[0]), SCALES[1])


def _pooled(known: tuple[float, int] | None, seconds: float, calls: int) -> tuple[float, int]:
    """The mean of what is known and of new calls; what is known counts for no more calls than there are new ones."""
    if known is None:
        return seconds, calls
    weight = min(known[1], calls)
    return (known[0] * weight + seconds * calls) / (weight + calls), weight + calls


def _channel(channel: Channel, moved: Sequence[tuple[int, float]], lost: float) -> Channel:
    """A channel as its transfers of (bytes, seconds) were, which made the cores lose `lost` seconds in all."""
    if len(moved) < FEWEST_TRANSFERS:
        return channel
    sizes, seconds = (np.asarray(column, dtype=np.float64) for column in zip(*moved, strict=True))
    predicted = channel.latency_seconds + sizes / channel.bytes_per_second
    latency, per_byte = channel.latency_seconds, 1.0 / channel.bytes_per_second
    fitted = None
    if sizes.max() > 2 * sizes.min():
        per_byte_found, latency_found = np.polyfit(sizes, seconds, 1)
        fitted = (latency_found, per_byte_found) if latency_found >= 0 and per_byte_found > 0 else None
    if fitted is not None:
        latency, per_byte = float(fitted[0]), float(fitted[1])
    else:
        scale = _factor(float(seconds.sum()), float(predicted.sum()))
        latency, per_byte = latency * scale, per_byte * scale
    cost = len(moved) * channel.compute_seconds_per_transfer + float(sizes.sum()) * channel.compute_seconds_per_byte
    lost = max(0.0, lost)
    per_transfer, of_byte = lost / len(moved), 0.0
    if cost > 0:
        per_transfer = channel.compute_seconds_per_transfer * lost / cost
        of_byte = channel.compute_seconds_per_byte * lost / cost
    return channel.model_copy(
        update={
            "latency_seconds": latency,
            "bytes_per_second": 1.0 / per_byte,
            "compute_seconds_per_byte": of_byte,
            "compute_seconds_per_transfer": per_transfer,
            "doubt": None,
        }
    )
