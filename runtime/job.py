"""The job: a plan and the settings of a run, compiled for the lean process.

The parent reads the plan with all its checks and writes this file; the child reads a short JSON header and flat integer
arrays, so that a schedule of twenty thousand instructions costs it half a megabyte. Tensors are numbers, offsets are in
units of 64 bytes, an instruction is a run of int32 words:

    READ weight packed at | UNPACK weight tensor packed at | RUN layer operator count at... | FREE tensor
    SPILL tensor | FETCH tensor at | UPDATE trainable updates-per-cycle which-of-them | PERTURB trainable times
    PASS tensor tensor | LOSS | TOKEN_LOSSES

`LOSS` and `TOKEN_LOSSES` stand just before the instruction that frees these tensors. The training schedules of a cycle
follow each other in `train`; the header's `cycle` says where each begins and ends.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiles.errors import InputError

READ, UNPACK, RUN, FREE, SPILL, FETCH, UPDATE, PERTURB, PASS, LOSS, TOKEN_LOSSES = range(11)
CODES = ("read", "unpack", "run", "free", "spill", "fetch", "update", "perturb", "pass", "loss", "token_losses")
UNIT = 64
BLOCK = 4096
VERSION = 1
STATES = ("adam_m", "adam_v", "grad_sum")
_ARRAYS = (("sizes", "q"), ("extents", "q"), ("tables", "i"), ("starts", "i"), ("train", "i"), ("evaluate", "i"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """`header` is JSON; the arrays are indexed by tensor number, or are lists of words."""

    header: dict[str, Any]
    sizes: array[int]
    """Bytes of each tensor."""
    extents: array[int]
    """Where each tensor lies in the spill file, bytes; -1: nowhere."""
    tables: array[int]
    """Tensor number of every program value of every layer, layer after layer."""
    starts: array[int]
    """Where each layer's table starts."""
    train: array[int]
    evaluate: array[int]

    def write(self, path: str) -> None:
        arrays = [getattr(self, name) for name, _ in _ARRAYS]
        header = json.dumps({**self.header, "arrays": [len(a) for a in arrays]}, separators=(",", ":")).encode()
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for part in arrays:
                part.tofile(file)

    @classmethod
    def read(cls, path: str) -> Job:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            arrays = {}
            for (name, kind), length in zip(_ARRAYS, header.pop("arrays")):
                arrays[name] = array(kind)
                arrays[name].fromfile(file, length)
        return cls(header=header, **arrays)


class _Numbers:
    """Tensor names to numbers, with their bytes."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self.sizes = array("q")

    def add(self, name: str, size: int) -> int:
        number = self.of.setdefault(name, len(self.of))
        if number == len(self.sizes):
            self.sizes.append(size)
        return number


def compile_job(plan: Mapping[str, Any], settings: Mapping[str, Any]) -> Job:
    """`plan` is `planner.schema.Plan` as a dict; `settings` go into the header untouched."""
    tensors = {t["name"]: t for t in plan["tensors"]}
    numbers = _Numbers()
    for name, tensor in tensors.items():
        numbers.add(name, tensor["bytes"])
    programs = {p["name"]: index for index, p in enumerate(plan["programs"])}
    tables, starts = array("i"), array("i")
    for layer in plan["layers"]:
        starts.append(len(tables))
        for value in plan["programs"][programs[layer["program"]]]["values"]:
            bound = layer["bindings"].get(value["name"])
            tables.append(numbers.add(bound or f"{layer['name']}/{value['name']}", value["bytes"]))
    weights = [t for t in plan["tensors"] if t["kind"] == "weight"]
    weight_index = {t["name"]: index for index, t in enumerate(weights)}
    trainables = [t for t in plan["tensors"] if t["kind"] == "trainable"]
    roles = STATES[: int(plan["optimizer"].get("state_tensors", 2))]
    for t in trainables:
        for role in ("grad", *roles):
            numbers.add(f"{role}:{t['name']}", t["bytes"])
    for t in weights:
        numbers.add(f"packed:{t['name']}", t["packed_bytes"])

    layer_index = {layer["name"]: index for index, layer in enumerate(plan["layers"])}
    trainable_index = {t["name"]: index for index, t in enumerate(trainables)}
    marks = {plan["loss"]: LOSS}
    if plan["token_losses"]:
        marks[plan["token_losses"]] = TOKEN_LOSSES

    steps = [plan["train"], *plan["cycle"]] if plan["train"] else []
    updates = _updates(steps)

    def words(phase: Mapping[str, Any] | None, position: int = 0) -> array[int]:
        made = array("i")
        for instruction in phase["instructions"] if phase else ():
            code = instruction[0]
            if code == "run":
                _, layer, operator, at = instruction
                made.extend(
                    (
                        RUN,
                        layer_index[layer],
                        operator,
                        len(at),
                        *(-1 if a is None else _units(a, instruction) for a in at),
                    )
                )
            elif code == "free":
                if instruction[1] in marks:
                    made.append(marks[instruction[1]])
                made.extend((FREE, numbers.of[instruction[1]]))
            elif code == "read":
                packed = numbers.of[f"packed:{instruction[1]}"]
                made.extend((READ, weight_index[instruction[1]], packed, _units(instruction[2], instruction, BLOCK)))
            elif code == "unpack":
                name, at = instruction[1], _units(instruction[2], instruction)
                made.extend((UNPACK, weight_index[name], numbers.of[name], numbers.of[f"packed:{name}"], at))
            elif code == "spill":
                made.extend((SPILL, numbers.of[instruction[1]]))
            elif code == "fetch":
                made.extend((FETCH, numbers.of[instruction[1]], _units(instruction[2], instruction)))
            elif code == "update":
                made.extend((UPDATE, trainable_index[instruction[1]], *updates[position, instruction[1]]))
            elif code == "perturb":
                made.extend((PERTURB, trainable_index[instruction[1]], instruction[2]))
            elif code == "pass":
                made.extend((PASS, numbers.of[instruction[1]], numbers.of[instruction[2]]))
            else:
                raise InputError(
                    f"the plan holds an unknown instruction {instruction!r}; it was written by another version, plan again"
                )
        return made

    train, bounds = array("i"), []
    for position, phase in enumerate(steps):
        begin = len(train)
        train.extend(words(phase, position))
        bounds.append([begin, len(train)])
    evaluate = words(plan["evaluate"])
    resident: dict[str, int] = plan["resident"]
    extents, spill_bytes = _extents(numbers, train, evaluate)
    gathered = {
        numbers.of[layer["bindings"][value]]: layer["bindings"][value]
        for layer in plan["layers"]
        for operator in plan["programs"][programs[layer["program"]]]["operators"]
        for value in operator["gathers"]
    }

    def place(name: str) -> int:
        return resident.get(name, -1)

    header = {
        **settings,
        "version": VERSION,
        "budget_bytes": plan["budget_bytes"],
        "arena_bytes": plan["arena_bytes"],
        "spill_bytes": spill_bytes,
        "batch": plan["batch"],
        "seq": plan["seq"],
        "accumulate": plan["optimizer"].get("accumulate", 1),
        "kind": plan["model"]["kind"],
        "lora": plan["model"]["lora"],
        "programs": [program_header(p) for p in plan["programs"]],
        "layer_programs": [programs[layer["program"]] for layer in plan["layers"]],
        "weights": [
            [t["name"], t["dtype"], t["shape"], t["packed_bytes"], place(t["name"]), place(f"packed:{t['name']}")]
            for t in weights
        ],
        "cycle": bounds,
        "trainables": [
            [
                t["name"],
                t["shape"],
                [numbers.of[t["name"]], place(t["name"])],
                [[numbers.of[n], place(n)] for n in (f"{role}:{t['name']}" for role in roles)],
                numbers.of[f"grad:{t['name']}"],
            ]
            for t in trainables
        ],
        "constants": [
            [t["name"], t["dtype"], t["shape"], place(t["name"])] for t in plan["tensors"] if t["kind"] == "constant"
        ],
        "inputs": [
            [t["name"], t["dtype"], t["shape"], place(t["name"])] for t in plan["tensors"] if t["kind"] == "batch"
        ],
        "resident": [[numbers.of[name], _units(at, ["resident", name])] for name, at in resident.items()],
        "gathered": list(gathered.items()),
        "loss": numbers.of[plan["loss"]],
        "token_losses": [numbers.of[plan["token_losses"]], tensors[plan["token_losses"]]["shape"]]
        if plan["token_losses"]
        else None,
    }
    return Job(
        header=header,
        sizes=numbers.sizes,
        extents=extents,
        tables=tables,
        starts=starts,
        train=train,
        evaluate=evaluate,
    )


def _updates(steps: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], tuple[int, int]]:
    """(position in the cycle, trainable) -> its updates per cycle, and which of them this is, counted from 1."""
    at: dict[str, list[int]] = {}
    for position, phase in enumerate(steps):
        for instruction in phase["instructions"]:
            if instruction[0] == "update":
                at.setdefault(instruction[1], []).append(position)
    return {
        (position, name): (len(positions), which)
        for name, positions in at.items()
        for which, position in enumerate(positions, 1)
    }


def _units(at: int, instruction: Sequence[Any], alignment: int = UNIT) -> int:
    if at % alignment:
        raise InputError(
            f"offset {at} of {instruction[:2]} is not a multiple of {alignment}; the plan is damaged, plan again"
        )
    return at // UNIT


def program_header(program: Mapping[str, Any]) -> dict[str, Any]:
    """What the child needs of a program."""
    return {
        "values": [[v["name"], v["dtype"], v["shape"], v["stride"]] for v in program["values"]],
        "operators": [
            {key: op[key] for key in ("target", "args", "kwargs", "outputs", "gathers")} for op in program["operators"]
        ],
    }


def program_values(program: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of a program as the job holds it: name -> dtype, shape, stride."""
    return {
        name: {"dtype": dtype, "shape": shape, "stride": stride} for name, dtype, shape, stride in program["values"]
    }


def _extents(numbers: _Numbers, train: array[int], evaluate: array[int]) -> tuple[array[int], int]:
    """A block-aligned extent for every tensor that is ever spilled: only such are fetched, or live there between steps."""
    extents = array("q", [-1]) * len(numbers.of)
    end = 0
    for number in sorted(_spilled(train) | _spilled(evaluate)):
        extents[number] = end
        end += -(-numbers.sizes[number] // BLOCK) * BLOCK
    return extents, end


def _spilled(words: array[int]) -> set[int]:
    found = set()
    place = 0
    while place < len(words):
        if words[place] == SPILL:
            found.add(words[place + 1])
        place += width(words, place)
    return found


def width(words: Sequence[int], place: int) -> int:
    """Words of the instruction that starts at `place`."""
    code = words[place]
    return 4 + words[place + 3] if code == RUN else (4, 5, 0, 2, 2, 3, 4, 3, 3, 1, 1)[code]
