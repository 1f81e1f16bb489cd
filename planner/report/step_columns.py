"""What the timeline to move in (``timeline.js``) draws: one training step of a plan in columns, which pack well.

Times are whole ticks, an instruction's or a tensor's name is an index into a list of names, and numbers of instructions
are given as differences from the one before.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from tightfit.planner.instructions import (
    Accumulate,
    Fetch,
    Free,
    Instruction,
    Pass,
    Perturb,
    Read,
    Run,
    Spill,
    Unpack,
    Update,
)
from tightfit.planner.report.costs import CostLedger
from tightfit.planner.report.memory_categories import MemoryBand, bands, peak_parts
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.recording import record
from tightfit.profiles.devices.words import words_of

FINENESS = 8
"""decimal digits to which a moment of the step is told"""
AGAIN = "again"
WORDS = {
    "forward": "forward",
    "backward": "backward",
    "inference": "forward",
    AGAIN: "made again",
    "unpack": "unpack a weight",
    "update": "update",
    "accumulate": "add to a sum of gradients",
    "perturb": "shift by noise",
    "pass": "hand a gradient on",
    "read": "start to read a weight",
    "fetch": "start to fetch",
    "spill": "start to write",
    "free": "free",
}
"""what an instruction does -> how it is told"""


def step_columns(plan: Plan) -> dict[str, Any]:
    """The training step of a feasible plan, as ``timeline.js`` reads it; of a cycle the first. Every moment and every
    byte is of a replay by the simulator.

    Of each instruction: `what` it does and `of` what (an operator's layer, or a tensor), ticks for which the cores
    `wait` before it and `work` at it, bytes of `workspace`, and by how many bytes more of the arena are `touched` than
    before. Events `came` and `went` are tensors that become resident and are given up; a transfer has the instruction
    that starts it, when it begins, and its length.
    """
    assert plan.train is not None
    recording, ledger = record(plan), CostLedger(plan)
    tick = _tick(recording.seconds)
    instructions = plan.train.instructions
    names, layers, operators, whats = _Names(), _Names(), _Names(), _Names()
    owners = ledger.index.owners()
    what, of, operator = [], [], []
    for index, instruction in enumerate(instructions):
        what.append(whats.of(_what(instruction, ledger, again=recording.again[index])))
        if isinstance(instruction, Run):
            of.append(layers.of(instruction.layer))
            operator.append(operators.of(ledger.index.operators[instruction.layer][instruction.operator].target))
        else:
            of.append(names.of(_tensor(instruction)))
            operator.append(-1)
    came = [(index, names.of(name)) for index, name in recording.came]
    went = [(index, names.of(name)) for index, name in recording.went]
    begin, end = _ticks(recording.begin, tick), _ticks(recording.end, tick)
    since = _ticks([transfer.begin for transfer in recording.transfers], tick)
    until = _ticks([transfer.end for transfer in recording.transfers], tick)
    decided = _decided(plan, ledger, names)
    tensors = ledger.index.tensors
    kinds = _kinds(plan, [tensors[name].kind for name in names.all])
    place = {kind.name: index for index, kind in enumerate(kinds)}
    return {
        "model": plan.model.name,
        "policy": plan.policy,
        "budget": plan.budget_bytes,
        "peak": {
            "instruction": plan.train.peak.instruction,
            "bytes": plan.peak_bytes,
            "start": plan.device.floor.start_peak_bytes,
        },
        "seconds": recording.seconds,
        "tick": tick,
        "elsewhere": words_of(plan.device).elsewhere,
        "graph": plan.model.is_bare_graph,
        "floor": recording.floor_bytes,
        "fixed": recording.fixed_bytes,
        "kinds": [{"name": kind.name, "label": kind.label} for kind in kinds],
        "whats": [{"name": name, "label": WORDS[name]} for name in whats.all],
        "layers": layers.all,
        "operators": operators.all,
        "instructions": {
            "what": what,
            "of": of,
            "operator": operator,
            "wait": [later - earlier for earlier, later in zip([0, *end], begin)],
            "work": [until - since for since, until in zip(begin, end)],
            "workspace": recording.workspace,
            "touched": _changes(recording.touched),
        },
        "tensors": {
            "name": names.all,
            "kind": [place[tensors[name].kind] for name in names.all],
            "bytes": [tensors[name].bytes for name in names.all],
            "layer": [layers.known.get(owners.get(name, ""), -1) for name in names.all],
        },
        "came": _events(came),
        "went": _events(went),
        "transfers": {
            "instruction": _changes([transfer.instruction for transfer in recording.transfers]),
            "begin": _changes(since),
            "length": [later - earlier for earlier, later in zip(since, until)],
            "out": [int(isinstance(instructions[transfer.instruction], Spill)) for transfer in recording.transfers],
        },
        "decided": decided,
        "parts": [{"name": kind.name, "label": kind.label, "bytes": size} for kind, size in peak_parts(plan)],
    }


def packed_columns(plan: Plan) -> str:
    """The columns as a page has them within itself: JSON, packed with gzip, in base64."""
    text = json.dumps(step_columns(plan), separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


class _Names:
    """Names by the order in which they are first asked for."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def of(self, name: str) -> int:
        return self.known.setdefault(name, len(self.known))

    @property
    def all(self) -> list[str]:
        return list(self.known)


def _tick(seconds: float) -> float:
    """The length of a tick in seconds: a power of ten, of which the step has no more than 10 ** `FINENESS`."""
    return 10.0 ** (math.ceil(math.log10(seconds)) - FINENESS) if seconds > 0 else 1.0


def _ticks(moments: Iterable[float], tick: float) -> list[int]:
    return [round(moment / tick) for moment in moments]


def _changes(values: Sequence[int]) -> list[int]:
    """Each value less the one before it."""
    return [later - earlier for earlier, later in pairwise([0, *values])]


def _events(events: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    """(instruction, tensor) as two columns; those of the step's start count for the instruction -1."""
    return {
        "instruction": _changes([index for index, _ in events]),
        "tensor": [tensor for _, tensor in events],
    }


def _what(instruction: Instruction, ledger: CostLedger, *, again: bool) -> str:
    if not isinstance(instruction, Run):
        return instruction.verb
    return AGAIN if again else ledger.index.operators[instruction.layer][instruction.operator].phase


def _tensor(instruction: Instruction) -> str:
    """The tensor that an instruction other than an operator is about."""
    match instruction:
        case Pass(_, below):
            return below
        case Run():
            raise AssertionError(instruction)
        case (
            Read(name)
            | Unpack(name)
            | Free(name)
            | Spill(name)
            | Fetch(name)
            | Update(name)
            | Perturb(name)
            | Accumulate(name)
        ):
            return name


def _kinds(plan: Plan, present: Sequence[str]) -> list[MemoryBand]:
    """The kinds of memory that the step can have, in stacking order."""
    beside = {"workspace", "constant"} if plan.model.is_bare_graph else {"floor", "workspace", "fragmentation"}
    return bands({*present, *beside}, plan.device.kind)


def _decided(plan: Plan, ledger: CostLedger, names: _Names) -> dict[str, list[Any]]:
    """Of each tensor that was decided on or that costs anything: the decision, what it costs per step, and what the
    other ways would.

    `moved` are the bytes read and written. `make` is the seconds of making it once more (of a weight: of unpacking it),
    `move` those of the channel for moving it there and back (of a weight: of reading it once); None where that cannot
    be.
    """
    decisions = _Names()
    columns: dict[str, list[Any]] = {
        name: [] for name in ("tensor", "decision", "recompute", "unpack", "read", "write", "moved", "make", "move")
    }
    for name, cost in ledger.costs().items():
        if name not in ledger.index.tensors:
            continue
        make, move = ledger.other_ways(name)
        figures = {
            "tensor": names.of(name),
            "decision": -1 if cost.decision is None else decisions.of(cost.decision),
            "recompute": _short(cost.recompute_seconds),
            "unpack": _short(cost.unpack_seconds),
            "read": _short(cost.read_seconds),
            "write": _short(cost.write_seconds),
            "moved": cost.moved_bytes,
            "make": _short(make),
            "move": _short(move),
        }
        for column, figure in figures.items():
            columns[column].append(figure)
    return {**columns, "decisions": decisions.all}


def _short(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds:.6g}")
