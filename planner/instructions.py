"""The instructions of a schedule, one type each: what the planner writes, the simulator replays and the runtime
executes.

They have two encodings. A plan file holds JSON arrays, the verb first and the fields in the order in which they stand
here (`to_json`, `from_json`); the training process reads runs of int32 words (`tightfit.runtime.session.job_compiler`).
A field `at` is an offset in the arena, in bytes: every instruction that makes a tensor resident says where, so that
nothing is left to decide at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

Verb = Literal["read", "unpack", "run", "free", "spill", "fetch", "update", "perturb", "pass", "accumulate"]
"""the name of a kind of instruction, which drafts, whose tensors have no offsets yet, carry too"""


@dataclass(frozen=True, slots=True)
class Read:
    """Start reading the packed bytes of a weight from the store into ``packed:`` and its name."""

    verb: ClassVar[Verb] = "read"
    weight: str
    at: int


@dataclass(frozen=True, slots=True)
class Unpack:
    """Wait for the read; make the weight from its packed bytes."""

    verb: ClassVar[Verb] = "unpack"
    weight: str
    at: int


@dataclass(frozen=True, slots=True)
class Run:
    """Run one operator of the layer's program; `at` has an offset for each output, None for one that is not used."""

    verb: ClassVar[Verb] = "run"
    layer: str
    operator: int
    at: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Free:
    """Give the bytes of a tensor back; waits for a spill of it that is still being written."""

    verb: ClassVar[Verb] = "free"
    tensor: str


@dataclass(frozen=True, slots=True)
class Spill:
    """Start writing a tensor to the spill file; it stays resident until it is freed."""

    verb: ClassVar[Verb] = "spill"
    tensor: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """Start reading a tensor back from the spill file; its users wait for it."""

    verb: ClassVar[Verb] = "fetch"
    tensor: str
    at: int


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer update of a trainable in place, from its gradient and states, all of them resident; where gradients
    are clipped, from the sum that is one of the states.
    """

    verb: ClassVar[Verb] = "update"
    trainable: str


@dataclass(frozen=True, slots=True)
class Perturb:
    """Add `times` epsilon z to a trainable; z ~ N(0, 1) is drawn again from the step's seed and the
    trainable's name.
    """

    verb: ClassVar[Verb] = "perturb"
    trainable: str
    times: int


@dataclass(frozen=True, slots=True)
class Pass:
    """The gradient `above` becomes the gradient `below`, of the same shape, where it lies; `above` is gone."""

    verb: ClassVar[Verb] = "pass"
    above: str
    below: str


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Add the gradient of a trainable to the sum of an update's, ``grad_sum:`` and its name, at `at`.

    Where an update takes one step only, the gradient is copied, and the sum need not be resident before.
    """

    verb: ClassVar[Verb] = "accumulate"
    trainable: str
    at: int


Instruction = Read | Unpack | Run | Free | Spill | Fetch | Update | Perturb | Pass | Accumulate
TYPES: tuple[type[Instruction], ...] = (Read, Unpack, Run, Free, Spill, Fetch, Update, Perturb, Pass, Accumulate)
BY_VERB: dict[str, type[Instruction]] = {str(kind.verb): kind for kind in TYPES}
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": lambda operand: isinstance(operand, str),
    "int": lambda operand: type(operand) is int,
    "tuple[int | None, ...]": lambda operand: (
        isinstance(operand, tuple) and all(at is None or type(at) is int for at in operand)
    ),
}
"""type of a field -> test whether an operand in a JSON array is of that type"""
_OPERANDS = {kind.verb: tuple(_CHECKS[str(field.type)] for field in fields(kind)) for kind in TYPES}


def to_json(instruction: Instruction) -> list[Any]:
    """The instruction as a plan file's array: the verb, then the fields."""
    if isinstance(instruction, Run):
        return ["run", instruction.layer, instruction.operator, list(instruction.at)]
    return [instruction.verb, *(getattr(instruction, name) for name in instruction.__slots__)]


def from_json(array: Sequence[Any]) -> Instruction:
    """The instruction that an array of a plan file encodes. Raises ValueError where it encodes none."""
    kind = BY_VERB.get(array[0]) if array and isinstance(array[0], str) else None
    if kind is None:
        raise ValueError(f"{array!r} is no instruction")
    operands: list[Any] = [tuple(operand) if isinstance(operand, list) else operand for operand in array[1:]]
    checks = _OPERANDS[kind.verb]
    if len(operands) != len(checks) or not all(check(operand) for check, operand in zip(checks, operands)):
        raise ValueError(f"{array!r} has other operands than the instruction takes")
    return kind(*operands)


def read_all(arrays: Iterable[Any]) -> list[Instruction]:
    """Instructions from a list of instructions, or of a plan file's arrays. Raises ValueError for an array that encodes
    none.
    """
    return [item if isinstance(item, TYPES) else from_json(item) for item in arrays]


def write_all(instructions: Iterable[Instruction]) -> list[list[Any]]:
    """The instructions as a plan file's arrays."""
    return [to_json(instruction) for instruction in instructions]
