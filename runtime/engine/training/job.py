"""The job file of a training process: a plan and the settings of a run, compiled into a JSON header and integer arrays.

`tightfit.runtime.session.job_compiler` makes it. In this form a schedule of twenty thousand instructions takes half a
megabyte. Tensors are numbers, the lowest ones those of tensors that stay between steps or are ever spilled. Offsets in
instructions are in units of 64 bytes. An instruction is a sequence of int32 words:

    READ weight packed at | UNPACK weight tensor packed at | RUN layer operator count at... | FREE tensor
    SPILL tensor | FETCH tensor at | UPDATE trainable updates-per-cycle which-of-them | PERTURB trainable times
    PASS tensor tensor | ACCUMULATE trainable at | LOSS | TOKEN_LOSSES

A RUN lists one offset per output (-1: the output is unused). PASS gives the second tensor the place of the first.
`LOSS` and `TOKEN_LOSSES` make the executor read those tensors; they stand just before the instruction that frees them.
The training schedules of a cycle follow each other in `train`; the header's `cycle` says where each begins and ends.
Where gradients are clipped, the update of all trainables is last in `train`, and the header's `update` says where.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

READ, UNPACK, RUN, FREE, SPILL, FETCH, UPDATE, PERTURB, PASS, ACCUMULATE, LOSS, TOKEN_LOSSES = range(12)
CODES = (
    "read",
    "unpack",
    "run",
    "free",
    "spill",
    "fetch",
    "update",
    "perturb",
    "pass",
    "accumulate",
    "loss",
    "token_losses",
)
SEND, RECEIVE = PASSING = ("tightfit.send", "tightfit.receive")
"""operators that hand tensors to, or get them from, another member of a fleet"""
POSITIONS_AT = {
    "tightfit.attention": 6,
    "tightfit.attention_backward": 9,
    "tightfit.tile_attention": 3,
    "tightfit.tile_attention_backward": 6,
}
"""operators -> the place of their argument that says which samples share a row"""
TILES_AT = {"tightfit.tile_attention": 1, "tightfit.tile_attention_backward": 2}
"""operators -> the place of their argument that holds a tensor for each tile of the text so far; the last argument is
the sliding window
"""
EXPERTS_AT = {
    "tightfit.experts": (2, 4, 8),
    "tightfit.experts_backward": (4, 6, 10),
    "tightfit.adapted_experts": (2, 4, 8),
    "tightfit.adapted_experts_backward": (4, 6, 10),
}
"""operators -> the places of their arguments for the numbers of the chosen experts, the first of two matrices and two
biases, and the number of the first expert that these are of
"""
BEGINS_AT = {"tightfit.head_chunk": 4} | {target: first for target, (_, _, first) in EXPERTS_AT.items()}
"""operators -> the place of their argument that says where the part begins that they work on: they do the same wherever
it does
"""
DROPOUT = "tightfit.dropout"
"""prefix of the operators that draw random numbers of a step and a layer (`tightfit.runtime.engine.device.draws`)"""
KEEP_STATE = "tightfit.keep_state"
"""operator that changes a buffer, its first input: the module's running statistics"""
UNIT = 64
BLOCK = 4096
STATES = ("adam_m", "adam_v", "grad_sum")
"""the optimizer's states in a checkpoint of a fleet, which trains with AdamW"""
_ARRAYS = (
    ("sizes", "q"),
    ("extents", "q"),
    ("where", "q"),
    ("tables", "i"),
    ("starts", "i"),
    ("weights", "q"),
    ("trainables", "q"),
    ("train", "i"),
    ("evaluate", "i"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job in memory. `sizes`, `extents` and `where` are indexed by tensor number; all figures are bytes.

    The executor takes `where` and `tables` over: it changes the one and empties the other.
    """

    header: dict[str, Any]
    sizes: array[int]
    """Bytes of each tensor that stays between steps or is ever spilled; these have the lowest numbers."""
    extents: array[int]
    """Byte offset of each of those in the spill file; -1: never there."""
    where: array[int]
    """Byte offset in the arena of every tensor; 0 for those that do not stay there between steps."""
    tables: array[int]
    """Tensor number of every program value of every layer, layer after layer."""
    starts: array[int]
    """Index in `tables` at which each layer's part starts."""
    weights: array[int]
    """For `tightfit.runtime.engine.training.job_tables.Weights`: of each weight in the header the indices of its dtype
    and shape in the header's lists, its packed bytes, and its byte offsets in the arena where it stays unpacked and
    packed (-1: it does not).
    """
    trainables: array[int]
    """For `tightfit.runtime.engine.training.job_tables.Trainables`: of each trainable in the header the index of its
    shape in the header's list, the number of its gradient, and number and byte offset (-1: in the spill file) of its
    value and of each state.
    """
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


def passes_messages(programs: Iterable[Any]) -> bool:
    """Whether operators of a plan's or profile's programs send or receive: it is that of a member that has some of the
    layers.
    """
    return any(operator.target in PASSING for program in programs for operator in program.operators)


def draws_numbers(programs: Iterable[Any]) -> bool:
    """Whether operators of a plan's or profile's programs draw random numbers of a step and a layer."""
    return any(operator.target.startswith(DROPOUT) for program in programs for operator in program.operators)


def kept_buffers(layers: Iterable[Any], programs: Iterable[Any]) -> list[str]:
    """Names of the buffers that the operators of a plan's or profile's programs change, each once."""
    changed = {
        program.name: [operator.inputs[0] for operator in program.operators if operator.target == KEEP_STATE]
        for program in programs
    }
    return list(dict.fromkeys(layer.bindings[value] for layer in layers for value in changed[layer.program]))


def program_headers(programs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The parts of the programs of a step that the training process needs, for the job's header.

    Of layers in tiles, an operator that is another's but for the tensors that it reads and makes is written as
    ``{"like": [number of a program, number in it], "values": these tensors in the order of `tensors_of`}``.
    """
    known: dict[str, list[int]] = {}
    return [_program_header(program, number, known) for number, program in enumerate(programs)]


def _program_header(program: Mapping[str, Any], place: int, known: dict[str, list[int]]) -> dict[str, Any]:
    operators = [
        {key: op[key] for key in ("target", "args", "kwargs", "outputs", "gathers")}
        | ({"copied": True} if op.get("copied") else {})
        for op in program["operators"]
    ]
    if program.get("tiles", 1) > 1:
        by_name = {value["name"]: value for value in program["values"]}
        for number, operator in enumerate(operators):
            form = json.dumps([operator_key(program["operators"][number], by_name), operator.get("copied")])
            like = known.setdefault(form, [place, number])
            if like != [place, number]:
                operators[number] = {"like": like, "values": tensors_of(operator)}
    values = [[v["name"], v["dtype"], v["shape"], v["stride"]] for v in program["values"]]
    return {"values": values, "operators": operators}


def tensors_of(operator: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that an operator of a program reads and makes, each once, in the order of its arguments and
    results.
    """
    names: dict[str, None] = {}

    def collect(argument: Any) -> None:
        if isinstance(argument, dict) and "operand" in argument:
            names[argument["operand"]["value"]] = None
        elif isinstance(argument, list):
            for item in argument:
                collect(item)

    collect([*operator["args"], *operator.get("kwargs", {}).values()])
    names.update((name, None) for name in operator["outputs"] if name is not None)
    return list(names)


def renamed_arguments(tree: Any, names: Mapping[str, Any]) -> Any:
    """An operator's arguments with other names for its tensors; those that are not in `names` keep theirs."""
    if isinstance(tree, list):
        return [renamed_arguments(item, names) for item in tree]
    if isinstance(tree, dict) and "operand" in tree:
        operand = tree["operand"]
        return {"operand": {**operand, "value": names.get(operand["value"], operand["value"])}}
    if isinstance(tree, dict):
        return {key: renamed_arguments(item, names) for key, item in tree.items()}
    return tree


def operator_key(operator: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]]) -> str:
    """A key that is equal for operators whose arguments differ only in the names and contents of tensors."""
    names: dict[str, int] = {}
    layouts = []
    for name in [*operator["inputs"], *operator["outputs"]]:
        if name is not None and name not in names:
            names[name] = len(names)
            layouts.append([values[name]["dtype"], values[name]["shape"], values[name]["stride"]])
    outputs = [None if name is None else names[name] for name in operator["outputs"]]
    args = renamed_arguments(operator["args"], names), renamed_arguments(operator.get("kwargs", {}), names)
    return json.dumps([operator["target"], args, outputs, layouts])


def program_values(program: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of a program in the header's form (`program_headers`): name -> dtype, shape, stride."""
    return {
        name: {"dtype": dtype, "shape": shape, "stride": stride} for name, dtype, shape, stride in program["values"]
    }


def operators_run(job: Job) -> set[tuple[int, int]]:
    """The operators that the schedules run, as (index of the program, index of the operator in it)."""
    programs = job.header["layer_programs"]
    return {
        (programs[words[place + 1]], words[place + 2])
        for words in (job.train, job.evaluate)
        for place in starts_of(words)
        if words[place] == RUN
    }


def starts_of(words: Sequence[int]) -> Iterator[int]:
    """Index of the first word of each instruction."""
    place = 0
    while place < len(words):
        yield place
        place += width(words, place)


def width(words: Sequence[int], place: int) -> int:
    """Number of words of the instruction that starts at `place`."""
    code = words[place]
    return 4 + words[place + 3] if code == RUN else (4, 5, 0, 2, 2, 3, 4, 3, 3, 3, 1, 1)[code]
