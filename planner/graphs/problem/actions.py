"""A schedule in full: the ordered list of runs, frees, disk writes and fetches, with its seconds and its peak.

Plans are made of `Carried`. Without a disk the re-runs of `schedule` determine the list. Where outputs are moved, a
write is first placed right after its output is made and a fetch right before its reader;
`tightfit.planner.schedule.prefetch` then moves both into free memory and the disk's idle time, as it does for decoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, lifetimes, pruned, runs
from tightfit.planner.instructions import Fetch, Instruction, Run, Verb
from tightfit.planner.problem.layer_types import transfer_seconds
from tightfit.planner.schedule.lowering import NAMED, DraftInstruction, live_profile
from tightfit.planner.schedule.prefetch import clock, prefetch
from tightfit.profiles.graph_input import LAYER

Action = tuple[Verb, int]
"""(run, free, spill or fetch; operator)"""
WORK = "workspace of "


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A schedule as its full list of actions, with the figures that follow from it."""

    actions: tuple[Action, ...]
    seconds: float
    peak_bytes: int
    """fixed bytes included"""


def carry(dag: Dag, reruns: Iterable[Rerun], budget_bytes: int = 1 << 62) -> Carried:
    """The full schedule of `reruns`. Re-runs of outputs in `dag.moved` become fetches, issued early where
    `budget_bytes` has room for them.
    """
    actions = drafted(dag, reruns)
    if not dag.moved:
        return timed(dag, actions)
    entries = _entries(dag, actions)
    moved = prefetch(tuple(entries), _inputs(dag), (), _sizes(dag), budget_bytes - dag.fixed_bytes)
    position = {name: i for i, name in enumerate(dag.names)}
    kept = [e for e in moved if not e.name.startswith(WORK)]
    return timed(dag, [(e.verb, e.operator if e.verb == "run" else position[e.name]) for e in kept])


def touch_and_go(dag: Dag) -> frozenset[Rerun]:
    """The schedule of least memory: each input is fetched just before its reader, unless the previous operator made or
    read it. `dag` has all outputs moved, so each re-run is a fetch.
    """
    result: set[Rerun] = set()
    for i in range(1, len(dag)):
        result.update((i, j) for j in dag.inputs[i] if j != i - 1 and j not in dag.inputs[i - 1])
    return frozenset(result)


def worth_moving(dag: Dag, price: float) -> list[int]:
    """Outputs that cannot be recomputed, or whose recomputation takes more seconds than `price` times their write and
    fetch.
    """
    return [i for i in range(len(dag)) if not dag.recomputable[i] or price * dag.trip_seconds(i) < dag.seconds[i]]


def drafted(dag: Dag, reruns: Iterable[Rerun]) -> list[Action]:
    """The actions before any transfer is moved: runs and fetches, each followed by the frees of outputs it was the last
    to need; a write right after the run that makes its output.
    """
    sequence = runs(dag, pruned(dag, reruns))
    gone: list[list[int]] = [[] for _ in sequence]
    for life in lifetimes(dag, sequence):
        if life.end < len(sequence) - 1 or not dag.keep[life.operator]:
            gone[life.end].append(life.operator)
    fetched = {i for stage, i in sequence if stage != i and i in dag.moved}
    actions: list[Action] = []
    for (stage, i), over in zip(sequence, gone):
        actions.append(("fetch" if stage != i and i in dag.moved else "run", i))
        if stage == i and i in fetched:
            actions.append(("spill", i))
        actions.extend(("free", other) for other in sorted(over))
    return actions


def timed(dag: Dag, actions: Sequence[Action]) -> Carried:
    """Actions with their seconds and peak bytes. With a disk the seconds are those of
    `tightfit.planner.schedule.prefetch.clock`.
    """
    entries = _entries(dag, actions)
    peak = dag.fixed_bytes + max(live_profile(tuple(entries), (), _sizes(dag)), default=0)
    if dag.read is None:
        seconds = sum(dag.seconds[i] for verb, i in actions if verb == "run")
    else:
        seconds = clock(entries, _inputs(dag)).seconds
    return Carried(actions=tuple(actions), seconds=seconds, peak_bytes=peak)


def instructions(dag: Dag, actions: Iterable[Action]) -> list[Instruction]:
    """The plan's instruction list, without arena offsets. Left out: the artificial sink, and the frees after it of
    outputs that must be there at the end.
    """
    kept = dag.inputs[-1] if dag.sink else ()
    result: list[Instruction] = []
    ended = False
    for verb, i in actions:
        if i >= dag.operators:
            ended = ended or verb == "run"
        elif verb == "run":
            result.append(Run(LAYER, i, (None,)))
        elif verb == "fetch":
            result.append(Fetch(dag.names[i], 0))
        elif not (ended and verb == "free" and i in kept):
            result.append(NAMED[verb](dag.names[i]))
    return result


def _inputs(dag: Dag) -> dict[tuple[int, int], tuple[str, ...]]:
    return {(0, i): tuple(dag.names[j] for j in inputs) for i, inputs in enumerate(dag.inputs)}


def _sizes(dag: Dag) -> dict[str, int]:
    sizes = dict(zip(dag.names, dag.bytes))
    return sizes | {WORK + name: size for name, size in zip(dag.names, dag.workspace)}


def _entries(dag: Dag, actions: Iterable[Action]) -> list[DraftInstruction]:
    """The actions as entries of `tightfit.planner.schedule`; an operator's workspace becomes an output that is freed at
    once.
    """
    entries = []
    for verb, i in actions:
        name, work = dag.names[i], dag.workspace[i]
        transfer = 0.0
        if verb in {"spill", "fetch"}:
            channel = dag.write if verb == "spill" else dag.read
            assert channel is not None
            transfer = transfer_seconds(channel, dag.bytes[i])
        outputs = () if verb != "run" else (name, WORK + name) if work else (name,)
        entries.append(
            DraftInstruction(
                verb=verb,
                name="" if verb == "run" else name,
                layer=0,
                operator=i,
                outputs=outputs,
                seconds=dag.seconds[i] if verb == "run" else 0.0,
                transfer=transfer,
            )
        )
        if verb == "run" and work:
            entries.append(
                DraftInstruction(
                    verb="free", name=WORK + name, layer=0, operator=i, outputs=(), seconds=0.0, transfer=0.0
                )
            )
    return entries
