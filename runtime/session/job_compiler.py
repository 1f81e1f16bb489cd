"""Compiles a plan and the settings of a run into the job that the training process reads.

A job is a JSON header and flat integer arrays (`tightfit.runtime.engine.training.job`), so that a schedule of twenty
thousand instructions takes half a megabyte there; the plan itself stays in the process that prepares the run. Tensors
become numbers, the lowest ones those of tensors that stay between steps or are ever in the spill file.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
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
    to_json,
)
from tightfit.planner.problem.step_graph import state_roles
from tightfit.planner.problem.tensor_index import TensorIndex
from tightfit.planner.schema import Phase, Plan
from tightfit.profiles.schema import Layer, Program, Tensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.job import (
    ACCUMULATE,
    BLOCK,
    EXPERTS_AT,
    FETCH,
    FREE,
    LOSS,
    PASS,
    PERTURB,
    READ,
    RUN,
    SPILL,
    TOKEN_LOSSES,
    UNIT,
    UNPACK,
    UPDATE,
    Job,
    draws_numbers,
    kept_buffers,
    program_headers,
    starts_of,
)
from tightfit.runtime.engine.training.job_tables import SEPARATOR


def compile_job(plan: Plan, settings: Mapping[str, Any]) -> Job:
    """Compile a plan that has a schedule; `settings` (`settings_of`) are copied into the header.

    Raises InputError for an offset that is not aligned.
    """
    index = TensorIndex(plan)
    numbers, sizes = _number_tensors(plan, index)
    tables, starts = _tables(plan, index, numbers)
    writer = _InstructionWriter(plan, numbers)
    train, cycle = array("i"), []
    for position, phase in enumerate(plan.steps):
        begin = len(train)
        train.extend(writer.words(phase, position))
        cycle.append([begin, len(train)])
    update = [len(train)]
    train.extend(writer.words(plan.update) if plan.update else ())
    update.append(len(train))
    evaluate = writer.words(plan.evaluate) if plan.evaluate else array("i")
    extents, spill_bytes = _extents(sizes, train, evaluate)
    offsets = array("q", [0]) * len(numbers)
    for name, offset in plan.resident.items():
        offsets[numbers[name]] = _units(offset, ["resident", name]) * UNIT
    return Job(
        header={
            **settings,
            **_header(plan, index, numbers, sizes, spill_bytes=spill_bytes, cycle=cycle),
            "update": update if plan.update else None,
            "max_grad_norm": plan.max_grad_norm,
        },
        sizes=sizes,
        extents=extents,
        where=offsets,
        tables=tables,
        starts=starts,
        weights=_weights(plan),
        trainables=_trainables(plan, index, numbers),
        train=train,
        evaluate=evaluate,
    )


def _of_kind(plan: Plan, kind: str) -> list[Tensor]:
    return [tensor for tensor in plan.tensors if tensor.kind == kind]


def _positions(parts: Iterable[Tensor | Layer | Program]) -> dict[str, int]:
    return {part.name: position for position, part in enumerate(parts)}


# --- tensors ----------------------------------------------------------------------------------------------------------


def _number_tensors(plan: Plan, index: TensorIndex) -> tuple[dict[str, int], array[int]]:
    """The number of every tensor by name, and the bytes of those that stay between steps or are ever spilled.

    The latter have the lowest numbers.
    """
    phases = [*plan.steps, *plan.beside]
    transferred = {each.tensor for phase in phases for each in phase.instructions if isinstance(each, Spill | Fetch)}
    lasting = [name for name in index.tensors if name in transferred or name in plan.resident]
    numbers = {name: number for number, name in enumerate(dict.fromkeys((*lasting, *index.tensors)))}
    return numbers, array("q", [index.tensors[name].bytes for name in itertools.islice(numbers, len(lasting))])


def _tables(plan: Plan, index: TensorIndex, numbers: Mapping[str, int]) -> tuple[array[int], array[int]]:
    """The layers' tables, one after the other, and the index at which each starts."""
    tables, starts = array("i"), array("i")
    for layer in plan.layers:
        starts.append(len(tables))
        tables.extend(numbers[name] for name in index.names[layer.name].values())
    return tables, starts


# --- instructions -----------------------------------------------------------------------------------------------------


class _InstructionWriter:
    """Translates instructions to words."""

    def __init__(self, plan: Plan, numbers: Mapping[str, int]) -> None:
        self.numbers = numbers
        self.layers = _positions(plan.layers)
        self.weights = _positions(_of_kind(plan, "weight"))
        self.trainables = _positions(_of_kind(plan, "trainable"))
        self.updates = _updates([plan.update] if plan.update else plan.steps)
        self.marks = {plan.loss: LOSS}
        """code to write just before the instruction that frees a tensor"""
        if plan.token_losses:
            self.marks[plan.token_losses] = TOKEN_LOSSES

    def words(self, phase: Phase, position: int = 0) -> array[int]:
        """The words of a schedule; a training schedule is the one at `position` in the cycle."""
        words = array("i")
        for instruction in phase.instructions:
            words.extend(self._instruction(instruction, position))
        return words

    def _instruction(self, instruction: Instruction, position: int) -> tuple[int, ...]:
        number = self.numbers

        def units(at: int, alignment: int = UNIT) -> int:
            return _units(at, to_json(instruction), alignment)

        match instruction:
            case Read(weight, at):
                return READ, self.weights[weight], number[f"packed:{weight}"], units(at, BLOCK)
            case Unpack(weight, at):
                return UNPACK, self.weights[weight], number[weight], number[f"packed:{weight}"], units(at)
            case Run(layer, operator, offsets):
                places = (-1 if at is None else units(at) for at in offsets)
                return RUN, self.layers[layer], operator, len(offsets), *places
            case Free(tensor):
                mark = (self.marks[tensor],) if tensor in self.marks else ()
                return *mark, FREE, number[tensor]
            case Spill(tensor):
                return SPILL, number[tensor]
            case Fetch(tensor, at):
                return FETCH, number[tensor], units(at)
            case Update(trainable):
                return UPDATE, self.trainables[trainable], *self.updates[position, trainable]
            case Perturb(trainable, times):
                return PERTURB, self.trainables[trainable], times
            case Pass(above, below):
                return PASS, number[above], number[below]
            case Accumulate(trainable, at):
                return ACCUMULATE, self.trainables[trainable], units(at)


def _updates(steps: Sequence[Phase]) -> dict[tuple[int, str], tuple[int, int]]:
    """(position in the cycle, trainable) -> (its updates per cycle, which of them is made there, counted from 1)."""
    positions_of: dict[str, list[int]] = {}
    for position, phase in enumerate(steps):
        for instruction in phase.instructions:
            if isinstance(instruction, Update):
                positions_of.setdefault(instruction.trainable, []).append(position)
    return {
        (position, name): (len(positions), ordinal)
        for name, positions in positions_of.items()
        for ordinal, position in enumerate(positions, 1)
    }


def _units(at: int, instruction: Sequence[Any], alignment: int = UNIT) -> int:
    if at % alignment:
        raise InputError(
            f"offset {at} of {instruction[:2]} is not a multiple of {alignment}; the plan is damaged, plan again"
        )
    return at // UNIT


# --- the spill file ---------------------------------------------------------------------------------------------------


def _extents(sizes: array[int], train: array[int], evaluate: array[int]) -> tuple[array[int], int]:
    """The offset in the spill file of every tensor that is ever spilled (-1 for others), and the file's size in bytes.

    Only spilled tensors are ever fetched or stay there between steps. Offsets are multiples of `BLOCK`.
    """
    extents = array("q", [-1]) * len(sizes)
    end = 0
    for number in sorted(_spilled(train) | _spilled(evaluate)):
        extents[number] = end
        end += -(-sizes[number] // BLOCK) * BLOCK
    return extents, end


def _spilled(words: array[int]) -> set[int]:
    return {words[position + 1] for position in starts_of(words) if words[position] == SPILL}


# --- weights, trainables, the hole -----------------------------------------------------------------------------------


def _catalogue(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The header's entry for weights or trainables: their names, and lists of the dtypes and shapes that occur."""
    return {
        "names": SEPARATOR.join(t.name for t in tensors),
        "dtypes": list(dict.fromkeys(t.dtype for t in tensors)),
        "shapes": [list(shape) for shape in dict.fromkeys(tuple(t.shape) for t in tensors)],
    }


def _weights(plan: Plan) -> array[int]:
    resident, words = plan.resident, array("q")
    catalogue = _catalogue(weights := _of_kind(plan, "weight"))
    for t in weights:
        words.extend((catalogue["dtypes"].index(t.dtype), catalogue["shapes"].index(list(t.shape))))
        words.extend((t.packed_bytes, resident.get(t.name, -1), resident.get(f"packed:{t.name}", -1)))
    return words


def _trainables(plan: Plan, index: TensorIndex, numbers: Mapping[str, int]) -> array[int]:
    resident, words = plan.resident, array("q")
    catalogue = _catalogue(trainables := _of_kind(plan, "trainable"))
    for t in trainables:
        # If no schedule has a backward, there is no gradient, and nothing reads its number.
        words.extend((catalogue["shapes"].index(list(t.shape)), numbers.get(f"grad:{t.name}", -1)))
        for name in (t.name, *index.states[t.name]):
            words.extend((numbers[name], resident.get(name, -1)))
    return words


def hole(plan: Plan, numbers: Mapping[str, int], sizes: Sequence[int]) -> tuple[int, int]:
    """The largest byte range [start, end) of the arena, in whole blocks, in which no tensor stays between steps."""
    occupied = sorted((offset, offset + sizes[numbers[name]]) for name, offset in plan.resident.items())
    largest, end = (0, 0), 0
    for start, stop in [*occupied, (plan.arena_bytes, 0)]:
        low, high = -(-end // BLOCK) * BLOCK, start // BLOCK * BLOCK
        largest = max(largest, (low, high), key=lambda candidate: candidate[1] - candidate[0])
        end = max(end, stop)
    return largest


# --- header -----------------------------------------------------------------------------------------------------------


def _header(
    plan: Plan,
    index: TensorIndex,
    numbers: Mapping[str, int],
    sizes: Sequence[int],
    *,
    spill_bytes: int,
    cycle: list[list[int]],
) -> dict[str, Any]:
    """The job's header but for the settings; `cycle` has the word range [begin, end) of each training schedule."""
    programs = _positions(plan.programs)

    gathered = {
        numbers[name]: name
        for layer, operators in index.operators.items()
        for operator in operators
        for name in (index.names[layer][value] for value in operator.gathers)
    }
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    losses = tensors.get(plan.token_losses) if plan.token_losses else None
    buffers = kept_buffers(plan.layers, plan.programs)
    return {
        "budget_bytes": plan.budget_bytes,
        # The training process's share of the budget.
        "cap_bytes": plan.budget_bytes - plan.device.floor.supervisor_bytes,
        "device": plan.device.kind,
        "arena_bytes": plan.arena_bytes,
        "hole": hole(plan, numbers, sizes),
        "spill_bytes": spill_bytes,
        "batch": plan.batch,
        "seq": plan.seq,
        "accumulate": plan.accumulate,
        "states": list(state_roles(plan.optimizer)),
        "kind": plan.model.kind,
        "lora": plan.model.lora,
        "tables": plan.model.tables,
        "programs": program_headers(program.model_dump() for program in plan.programs),
        "inputs": _placements(plan, "batch"),
        "token_losses": [numbers[losses.name], losses.shape] if losses else None,
        "layer_programs": [programs[layer.program] for layer in plan.layers],
        # By its name a layer draws the same random numbers in every plan.
        "layer_names": SEPARATOR.join(layer.name for layer in plan.layers) if draws_numbers(plan.programs) else "",
        "weights": _catalogue(_of_kind(plan, "weight")),
        "cycle": cycle,
        "trainables": _catalogue(_of_kind(plan, "trainable")),
        "constants": _placements(plan, "constant"),
        "buffers": [[name, tensors[name].dtype, tensors[name].shape, plan.resident[name]] for name in buffers],
        "gathered": list(gathered.items()),
        "routed": _routed(plan, index, numbers),
        "loss": numbers[plan.loss],
    }


def _routed(plan: Plan, index: TensorIndex, numbers: Mapping[str, int]) -> list[int]:
    """The entries of `tightfit.runtime.engine.training.routing.Routing`: for matrices of experts that are read anew in
    every step, each by the operators of one layer, and of one set of rows, whose experts' numbers are a tensor of their
    own.
    """
    places, programs = _positions(_of_kind(plan, "weight")), {program.name: program for program in plan.programs}
    found: dict[int, tuple[int, int, int]] = {}
    chosen: dict[int, tuple[set[int], set[int]]] = {}
    parts: set[int] = set()
    """weights of operators that are given a part of a tensor as the experts' numbers"""
    for layer in plan.layers:
        names, program = index.names[layer.name], programs[layer.program]
        values = {value.name: value for value in program.values}
        for operator in program.operators:
            if operator.target not in EXPERTS_AT:
                continue
            at, first_weight, first = EXPERTS_AT[operator.target]
            rows = operator.args[at]["operand"]
            told = values[rows["value"]]
            matrices = [given["operand"] for given in operator.args[first_weight : first_weight + 4] if given]
            gate_up, down, *_ = matrices
            count = down["size"][0] // gate_up["size"][1]
            for operand in matrices:
                name = names[operand["value"]]
                if name in plan.resident or f"packed:{name}" in plan.resident:
                    continue
                weight = places[name]
                found[weight] = operator.args[first], count, math.prod(rows["size"])
                sets = chosen.setdefault(weight, (set(), set()))
                sets[operator.phase == "inference"].add(numbers[names[rows["value"]]])
                if (rows["size"], rows["stride"], told.dtype) != (told.shape, told.stride, "int64"):
                    parts.add(weight)
    return [
        word
        for weight, entry in found.items()
        if weight not in parts and all(len(tensors) <= 1 for tensors in chosen[weight])
        for word in (weight, *entry, *(next(iter(tensors), -1) for tensors in chosen[weight]))
    ]


def _placements(plan: Plan, kind: str) -> list[list[Any]]:
    return [[t.name, t.dtype, t.shape, plan.resident.get(t.name, -1)] for t in _of_kind(plan, kind)]
