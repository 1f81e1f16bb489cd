"""The constraints of the whole step over its layers' figures: bytes window by window, time, disk; and bytes counted for
columns.

Time: the step lasts as long as its windows together, a window at least as long as its computation, and by the end of a
window the disk has done what was needed by then. How far ahead transfers begin is left open, which makes the time a
lower bound for the class; the simulator says what a plan really takes. Numbers in brackets are those of the blocks in
docs/formulation.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tightfit.planner.problem.layer_figures import DISK, KIB, MS, LayerFigures
from tightfit.planner.problem.layer_types import LayeredStep, transfer_seconds
from tightfit.planner.solvers.lp import Linear, LinearProgram

INSTANT = 1e5
"""KiB per ms above which a disk's transfers are taken to need no time of their own in a window"""
LinearFigures = LayerFigures[Linear]
"""a layer's figures as expressions, in KiB and ms"""


@dataclass(kw_only=True)
class StepConstraints:
    """The step's figures, as its constraints define them."""

    bytes: int
    """variable: KiB at the fullest window, instructions included"""
    spare: dict[str, list[Linear]]
    """"forward", "backward" and "evaluate", per layer: KiB of `bytes` that are free in that window, at least, beside
    what waits for the disk
    """
    total_ms: Linear
    disk_ms: Linear


@dataclass(frozen=True)
class Window:
    """A stretch of the training step that belongs to one layer."""

    layer: int
    phase: Literal["forward", "backward"]


def windows(count: int) -> list[Window]:
    """The windows of a training step of `count` layers, in order."""
    forward = [Window(layer, "forward") for layer in range(count)]
    return [*forward, *(Window(layer, "backward") for layer in reversed(range(count)))]


def add_step_constraints(
    program: LinearProgram, problem: LayeredStep, layers: list[LinearFigures], *, careful: bool = False
) -> StepConstraints:
    """Post (11) to (16) over the layers' figures."""
    count = len(layers)
    used = program.variable()
    instructions = program.variable()
    outcome = 1 + (problem.profile.token_losses is not None)
    # (11) the instructions of both schedules
    program.at_least(Linear(-2.0 * outcome).add(instructions), *(terms.instructions for terms in layers))
    per_instruction = problem.profile.device.floor.instruction_bytes / KIB

    def chain(order: Iterable[int], *fields: str) -> list[Linear]:
        """Running sums over the layers in `order`: entry i is the sum before the i-th."""
        sums: list[Linear] = [Linear()]
        for index in order:
            step = program.variable()
            program.at_least(
                Linear().add(step).plus(sums[-1], -1.0), *(getattr(layers[index], name) for name in fields)
            )
            sums.append(Linear().add(step))
        return sums

    forward_order, backward_order = list(range(count)), list(reversed(range(count)))
    before = chain(forward_order, "between")
    after = chain(backward_order, "outside")
    outside = after[count]
    constant = problem.constant_bytes / KIB
    order = windows(count)
    peaks: list[Linear] = []
    """per window: KiB that are left for what waits for the disk"""
    # (11) bytes of each training window; the rows are posted with (15)
    for window in order:
        index, terms = window.layer, layers[window.layer]
        others = Linear(constant).plus(before[index]).plus(after[count - 1 - index]).add(instructions, per_instruction)
        is_backward = window.phase == "backward"
        across = problem.across_backward[index] if is_backward else problem.across_forward[index]
        free = Linear(-across / KIB).add(used).plus(others, -1.0)
        peaks.append(free.plus(terms.backward_peak if is_backward else terms.forward_peak, -1.0))
    spare: dict[str, list[Linear]] = {"forward": [], "backward": [], "evaluate": []}
    # (12) bytes of each evaluation window
    for index, terms in enumerate(layers):
        free = Linear(-constant - problem.across_evaluate[index] / KIB).add(used).add(instructions, -per_instruction)
        free.plus(outside, -1.0).plus(terms.outside).plus(terms.evaluate_peak, -1.0)
        program.at_least(free)
        spare["evaluate"].append(free)
    # (13) a window lasts at least as long as its computation; and by its end the cores have done, since the step began,
    # all computation so far and all that it costs them to have what was needed so far read and fetched
    clock, worked = [Linear()], Linear()
    for window in order:
        terms, now, work = layers[window.layer], program.variable(), program.variable()
        is_backward = window.phase == "backward"
        computation = terms.backward_seconds if is_backward else terms.forward_seconds
        arriving = terms.arriving_backward if is_backward else terms.arriving_forward
        program.at_least(Linear().add(now).plus(clock[-1], -1.0), computation)
        program.exactly(Linear().add(work), worked, computation, arriving)
        worked = Linear().add(work)
        program.at_least(Linear().add(now).add(work, -1.0))
        clock.append(Linear().add(now))
    program.at_least(Linear().plus(clock[-1]).plus(worked, -1.0), *(terms.leaving for terms in layers))
    _add_disk(program, problem, layers, order, clock, peaks, careful=careful)
    window_index = {(window.layer, window.phase): moment for moment, window in enumerate(order)}
    for index in forward_order:
        spare["forward"].append(peaks[window_index[index, "forward"]])
        spare["backward"].append(peaks[window_index[index, "backward"]])
    # (16) the disk over several windows
    nested = chain(backward_order, "spills_forward", "fetches_backward")
    spilled = chain(forward_order, "states_spilled")
    for index in forward_order:
        # Window i of the step, counted from 0, is layer i's forward.
        backward = window_index[index, "backward"]
        inside = Linear().plus(clock[backward + 1]).plus(clock[index], -1.0)
        program.at_least(inside, nested[count - index])
        tail = Linear().plus(clock[-1]).plus(clock[backward], -1.0)
        program.at_least(tail, spilled[index + 1])
    total = program.variable()
    program.at_least(Linear().add(total), *(getattr(terms, name) for terms in layers for name in DISK))
    program.at_least(Linear().plus(clock[-1]).add(total, -1.0))
    return StepConstraints(bytes=used, spare=spare, total_ms=clock[-1], disk_ms=Linear().add(total))


def _add_disk(
    program: LinearProgram,
    problem: LayeredStep,
    layers: list[LinearFigures],
    order: Sequence[Window],
    clock: list[Linear],
    peaks: list[Linear],
    *,
    careful: bool,
) -> None:
    """(14) What the disk does window by window, and (15) the memory that waits for it.

    A window lasts at least as long as the disk is busy in it. What is read or fetched before the window that needs it,
    and what is spilled and not yet written, takes memory meanwhile. The constraints hold for any plan of the class;
    with `careful` they ask for fetches one window ahead and count a spill to the end of its window, which plans can
    really keep.
    """
    rates = _kib_per_ms(problem)
    needed = {name: Linear() for name in rates}
    transferred = {name: Linear() for name in rates}
    for moment, window in enumerate(order):
        forward = window.phase != "backward"
        terms = layers[window.layer]
        requests = {
            "reads": terms.reads_forward if forward else terms.reads_backward,
            "fetches": Linear() if forward else terms.fetches_backward,
            "spills": terms.spills_forward if forward else Linear(),
        }
        # (14) needed and transferred: ms of each sort of transfer that windows so far ask for, and that the disk has
        # done
        busy = Linear().plus(clock[moment + 1]).plus(clock[moment], -1.0)
        states = [] if forward or not careful else [terms.states_fetched, terms.states_spilled]
        waiting = Linear()
        flows: list[Linear] = []
        for name, rate in rates.items():
            if not rate:
                continue
            before, due = transferred[name], needed[name]
            if requests[name].terms or requests[name].constant:
                step = program.variable()
                program.exactly(Linear().add(step), due, requests[name])
                needed[name] = Linear().add(step)
            now = program.variable()
            transferred[name] = Linear().add(now)
            flows.append(Linear().add(now).plus(before, -1.0))
            program.at_least(flows[-1])
            if name == "spills":
                # Only what is there can be written; what is not written stays in memory.
                program.at_least(Linear().plus(needed[name]).add(now, -1.0))
                unserved = Linear().plus(needed[name] if careful else due).add(now, -1.0)
            else:
                program.at_least(Linear().add(now).plus(needed[name], -1.0))
                if careful and name == "fetches":
                    program.at_least(Linear().plus(before).plus(needed[name], -1.0))
                unserved = Linear().plus(transferred[name] if careful else before).plus(needed[name], -1.0)
            # (15) ms of this sort whose bytes wait throughout the window
            held = program.variable()
            program.at_least(Linear().add(held), unserved)
            waiting.add(held, rate)
        program.at_least(busy, *flows, *states)
        # (11) with what waits for the disk
        program.at_least(peaks[moment].plus(waiting, -1.0))
    if rates["spills"]:
        program.at_least(transferred["spills"], needed["spills"])


def _kib_per_ms(problem: LayeredStep) -> dict[str, float]:
    """(15) KiB that a millisecond of disk time moves at least, for each sort of transfer; 0 where there is none of
    it.
    """
    reads: list[float] = []
    spills: list[float] = []
    fetches: list[float] = []
    for kind in problem.types:
        reads.extend(w.read_bytes / w.read_seconds for w in kind.weights.values() if w.read_seconds)
        for value in kind.offloadable:
            size = kind.raw_bytes[value]
            spills.append(size / transfer_seconds(kind.write, size))
            fetches.append(size / transfer_seconds(kind.read, size))
    result = {}
    for name, rates in (("reads", reads), ("fetches", fetches), ("spills", spills)):
        rate = min(rates, default=0.0) / KIB / MS
        # Nothing ever waits for a disk faster than that, and its rates would make the program ill-conditioned.
        result[name] = rate if rate <= INSTANT else 0.0
    return result
