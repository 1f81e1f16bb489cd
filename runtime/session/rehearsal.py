"""Carries a plan out for a few steps on made-up data, before it is trusted.

What its steps took is what a step is expected to take (`Plan.expected_seconds`). `rehearsed` learns from it by which
factors the profile's seconds differ, and by how many bytes its floor (`tightfit.profiles.learned`). It makes the plan
anew where another one may be faster with these factors, or where the plan held more than it says. Steps are timed
instruction by instruction (`tightfit.runtime.engine.training.step_trace`); the peak is the kernel's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tightfit.planner.instructions import Accumulate, Fetch, Instruction, Perturb, Read, Run, Spill, Unpack, Update
from tightfit.planner.plan_result import sealed
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.report.step_words import rehearsal_words
from tightfit.planner.schema import Phase, Plan
from tightfit.planner.search_options import SOLVER, PlanOptions
from tightfit.planner.simulation.plan_index import PlanIndex
from tightfit.profiles.learned import (
    PERTURBING,
    UNPACKING,
    UPDATES,
    LearnedFigures,
    Rehearsal,
    corrected,
    figures_id,
    kind_of,
    load_learned,
    save_learned,
    spread_bytes,
)
from tightfit.profiles.measuring.cpu_load import OtherPrograms, wait_for_cores
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.schema import EXCHANGE, MOBILLM, Profile
from tightfit.runtime.common.errors import CapError, InputError, RunError, TightfitError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.common.strict_json import read_json
from tightfit.runtime.common.units import format_size
from tightfit.runtime.engine.training.job import passes_messages
from tightfit.runtime.engine.training.step_trace import INSTRUCTIONS, TRANSFERS
from tightfit.runtime.session.admission import check_machine
from tightfit.runtime.session.launch import prepared
from tightfit.runtime.session.options import RunOptions
from tightfit.runtime.supervision.spare_memory import free_memory
from tightfit.runtime.supervision.supervisor import supervise
from tightfit.runtime.supervision.training_process import RunOrder

MOST_ROUNDS = 6
"""rehearsals of one call, if every plan holds more than it says; a plan that another may be faster than is made anew
once
"""
WORTH = 0.05
"""share of a step by which another plan may be faster, from which on the plan is made anew"""
TRACED = 3
"""steps that are timed, after the first, which faults memory in and builds kernels"""
ROOM = (0.25, 64 << 20)
"""Share and bytes by which a rehearsal's cap is above the budget, so that a plan which holds too much can be
measured.
"""
TAKEN_BACK = 0.1
"""Share of a cgroup's limit that may be counted as used and is none the less free: page cache in use, which the kernel
takes back.
"""
ABOVE = 0.01
"""share of a peak by which a prediction may be above what was held before later ones are lowered"""
FEWEST_TRANSFERS = 8
"""of a direction, below which its factor stays as it is"""
LEAST_SHARE = 0.01
"""share of a step that a kind of operator takes at least, for its factor to say that another plan may be faster"""
FACTORS = (0.1, 10.0)
"""smallest and largest factor that one rehearsal teaches"""
ANEW = "planned anew with what that taught"
Seconds = npt.NDArray[np.float64]


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
    """As `tightfit.planner.plan.plan`, on the machine that the profile was measured on: the plan runs for a few steps
    on random data, and is made anew where that is worth it. Its `rehearsal` says what was seen; None: it could not be
    rehearsed.
    """
    from tightfit.planner.plan import planner_of

    plan, _ = rehearsed(
        profile,
        lambda step: chosen(step, options.optimizer, options.max_grad_norm, LearnedFigures()),
        lambda step: planner_of(step).plan(
            budget_bytes,
            policy=options.policy,
            time_limit=options.time_limit,
            gap=options.gap,
            progress=options.progress,
        ),
    )
    return plan


def rehearsed(
    profile: Profile,
    step_of: Callable[[Profile], Profile],
    make: Callable[[Profile], Plan],
    *,
    go_on: Callable[[], bool] = lambda: True,
    tell: Callable[[str], None] = lambda line: None,
    showing: Callable[[], AbstractContextManager[Progress | None]] = nullcontext,
    wait: bool = False,
) -> tuple[Plan, bool]:
    """(the plan that `make` makes of the profile with all corrections that rehearsals have taught, rehearsed; whether
    Ctrl-C ended a rehearsal, so that the plan is the last one made).

    `step_of` gives the profile of the step that is planned, with another optimizer for example. `tell` is called with
    each line of text, and what `showing` opens with the stages of a rehearsal. A plan for which `go_on` returns False
    is not rehearsed, but made with the corrections of earlier rehearsals. With `wait`, other programs are waited for
    (`wait_for_cores`).

    Raises what `make` raises. A rehearsal that fails leaves the plan as it is and says why.
    """
    identity, step = figures_id(profile), step_of(profile)
    plan = make(corrected(step, load_learned(identity)))
    try:
        for number in range(MOST_ROUNDS):
            if (
                why_not(plan) is not None or not go_on()
            ):  # why not, a plan tells itself: `tightfit.planner.report.explain`
                break
            try:
                with showing() as stages:
                    if wait:
                        wait_for_cores(plan.device.threads, tell, stages)
                    traced = _carry_out(plan, stages)
            except TightfitError as error:
                tell(f"not rehearsed: {error}")
                return plan, isinstance(error, RunError) and error.interrupted
            plan, anew = taught(identity, plan, traced, number + 1)
            tell(rehearsal_words(plan))
            if not anew:
                break
            tell(ANEW)
            plan = make(corrected(step, load_learned(identity)))
    except KeyboardInterrupt:
        return plan, True
    return plan, False


def taught(identity: str, plan: Plan, traced: TracedRehearsal, rounds: int) -> tuple[Plan, bool]:
    """(the plan with its rehearsal, whether it is to be made anew), after what is known of the profile's figures
    (`figures_id`) has taken in what the rehearsal teaches. `rounds` counts the rehearsals so far.
    """
    plan = sealed(plan.model_copy(update={"rehearsal": traced.rehearsal}))
    learned, passed = _learn_bytes(load_learned(identity), plan, traced.rehearsal.held_bytes)
    gain = 0.0
    if traced.phases and not plan.busy_machine:
        learned, gain = _learn_seconds(learned, plan, traced)
    save_learned(identity, learned)
    return plan, passed or (rounds == 1 and plan.policy == SOLVER and gain > WORTH)


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


def _carry_out(plan: Plan, stages: Progress | None) -> TracedRehearsal:
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
    """The plan with a cap above its budget, as far as memory is free. Raises RunError where the plan itself has no
    place.
    """
    free, memory_text = free_memory(given_back=given_back)
    if free < plan.peak_bytes * (1 - TAKEN_BACK):
        raise RunError(f"{memory_text}, beside which the {format_size(plan.peak_bytes)} of a run have no place")
    extra = max(int(ROOM[0] * plan.budget_bytes), ROOM[1])
    return sealed(plan.model_copy(update={"budget_bytes": min(plan.budget_bytes + extra, max(plan.peak_bytes, free))}))


@contextmanager
def prepared_rehearsal(plan: Plan, folder: Path, stages: Progress | None, given_back: int = 0) -> Iterator[RunOrder]:
    """The order for a few steps of the plan on random data, whose files lie in `folder`, ready to be supervised.
    `given_back`: bytes that this process holds and will not hold beside the rehearsal.
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
    seconds = report["step_seconds"]["measured"]
    return TracedRehearsal(
        rehearsal=Rehearsal(seconds=seconds, held_bytes=_measured_peak(report, plan), busy_cores=busy_cores),
        phases=phases,
        busy=busy,
        stalled=stalled,
        transfers=transfers,
    )


def _measured_peak(report: dict[str, Any], plan: Plan) -> int:
    """Peak bytes of all processes as from the command line: the training process's as measured, and the supervisor's as
    profiled, since here it is part of this program.
    """
    return int(report["processes"]["training"]["measured"]) + plan.device.floor.supervisor_bytes


def over_cap(plan: Plan) -> TracedRehearsal:
    """The rehearsal of a plan that held even more than its cap, which counts as its peak; no seconds are known."""
    held = plan.budget_bytes + max(int(ROOM[0] * plan.budget_bytes), ROOM[1])
    rehearsal = Rehearsal(seconds=None, held_bytes=held, busy_cores=0.0)
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


def _learn_bytes(learned: LearnedFigures, plan: Plan, held: int) -> tuple[LearnedFigures, bool]:
    """(`learned` with what a run is known to hold, whether runs of the plan may hold more than it says), where one held
    `held` bytes.

    Runs of a plan differ by a spread. A prediction that is raised leaves two, so that a rehearsal of the next plan,
    which may hold one more than this one did, shows that it has one left. Only the first rehearsal of a profile lowers
    a prediction.
    """
    spread = spread_bytes(plan.model.kind, held)
    passed = (
        held + (0 if plan.start_bytes else spread) > plan.peak_bytes
    )  # a peak that the start sets includes the spread
    lacking = held + 2 * spread - (plan.peak_bytes - plan.start_bytes)
    added = learned.added_bytes or 0
    if passed:
        added += lacking
    elif learned.added_bytes is None:
        added = min(0, lacking + int(ABOVE * plan.peak_bytes))
    return learned.model_copy(update={"added_bytes": added}), passed


def _learn_seconds(learned: LearnedFigures, plan: Plan, traced: TracedRehearsal) -> tuple[LearnedFigures, float]:
    """(`learned` with the factors by which the seconds of the rehearsal differ from the plan's, which was made with
    `learned`; the share of a step by which another plan may be faster).

    Where no factor is below `low` or above `high`, what this plan spends on having little memory (running operators
    again, unpacking, waiting) is at most high / low times what the best plan spends: with the plan's own figures it
    spent the least.
    """
    index = PlanIndex(plan)
    predicted: dict[str, float] = defaultdict(float)
    measured: dict[str, float] = defaultdict(float)
    moves: dict[str, int] = defaultdict(int)
    channels = {"read": plan.device.read, "write": plan.device.write}
    whole = moving = spent = 0.0
    """seconds: of all; that moving bytes costs the cores, as the profile says; that more memory could save"""
    for phase, busy, stalled, transfers in zip(
        traced.phases, traced.busy, traced.stalled, traced.transfers, strict=True
    ):
        whole += float(busy.sum() + stalled.sum())
        spent += float(stalled.sum())
        ran: set[tuple[str, int]] = set()
        times = iter(transfers)
        for instruction, seconds in zip(phase.instructions, map(float, busy), strict=True):
            if isinstance(instruction, Read | Fetch | Spill):
                way, size = "write" if isinstance(instruction, Spill) else "read", _size(instruction, index)
                begin, end = next(times)
                measured[way] += float(end - begin)
                predicted[way] += channels[way].latency_seconds + size / channels[way].bytes_per_second
                moves[way] += 1
                moving += channels[way].compute_seconds_per_transfer + size * channels[way].compute_seconds_per_byte
            elif priced := _priced(instruction, index):
                kind, expected = priced
                measured[kind] += seconds
                predicted[kind] += expected
                again = isinstance(instruction, Run) and (instruction.layer, instruction.operator) in ran
                spent += seconds if again or kind == UNPACKING else 0.0
                if isinstance(instruction, Run):
                    ran.add((instruction.layer, instruction.operator))
    kinds = [kind for kind in measured if kind not in channels and predicted[kind] > 0]
    computing = sum(float(busy.sum()) for busy in traced.busy) - moving
    # Freeing tensors and the interpreter take time that is no operator's own: all operators share it.
    share = computing / max(sum(measured[kind] for kind in kinds), 1e-12)
    factors = {kind: _bounded(share * measured[kind] / predicted[kind]) for kind in kinds}
    ways = {
        way: _bounded(measured[way] / predicted[way]) if moves[way] >= FEWEST_TRANSFERS else 1.0 for way in channels
    }
    telling = [*ways.values(), *(factors[kind] for kind in kinds if measured[kind] >= LEAST_SHARE * whole)]
    return (
        learned.model_copy(
            update={
                "kinds": learned.kinds | {kind: learned.kinds.get(kind, 1.0) * factors[kind] for kind in kinds},
                **{way: getattr(learned, way) * factor for way, factor in ways.items()},
            }
        ),
        (1 - min(telling) / max(telling)) * spent / max(whole, 1e-12),
    )


def _priced(instruction: Instruction, index: PlanIndex) -> tuple[str, float] | None:
    """The kind of what an instruction computes, and its seconds by the plan; None where it computes nothing."""
    match instruction:
        case Run(layer, position):
            operator = index.layers[layer][0][position]
            return kind_of(operator.target), operator.seconds
        case Unpack(weight):
            return UNPACKING, index.tensors[weight].unpack_seconds
        case Update(trainable) | Perturb(trainable):
            return PERTURBING if index.two_forwards else UPDATES, index.update_seconds[trainable]
        case Accumulate(trainable):
            return UPDATES, index.accumulate_seconds[trainable]
    return None


def _size(transfer: Read | Fetch | Spill, index: PlanIndex) -> int:
    """Bytes that a transfer moves."""
    if isinstance(transfer, Read):
        return index.tensors[transfer.weight].packed_bytes
    return index.tensors[transfer.tensor].bytes


def _bounded(factor: float) -> float:
    return min(max(factor, FACTORS[0]), FACTORS[1])
